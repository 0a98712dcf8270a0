"""``samfed compare``: finished runs side by side, with intervals and a paired test.

A *row* is a method with its seeds: the runs ``<row>-seed<k>``, and a run that is named ``<row>``.
"""

from __future__ import annotations

import csv
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from pipeline.config import Config, deciding_settings
from pipeline.disk import read_json
from pipeline.errors import ConfigError, DataError, IdentityError, StageError
from pipeline.federation.runs import RunFolder
from pipeline.methods import METHODS, Method
from pipeline.segmentation.metrics import bootstrap_means, sign_flip_test

log = logging.getLogger("samfed.comparison")

DEFAULT_REFERENCE = "sam_fed"
METRICS = ("dice", "hd95")  # columns of ``EvaluatedRun.scores``

_SEED = 0  # of bootstrap and test: a table does not depend on the settings it is asked with
_DASH = "\N{EM DASH}"


@dataclass(frozen=True)
class EvaluatedRun:
    """One folder of ``cache/runs`` as read by :func:`load_evaluated`."""

    name: str
    config: Config  # as used
    partition: str  # sha256 of the partition.json that it was made on
    images: tuple[tuple[str, str, str], ...]  # client, image id and group, sorted
    scores: NDArray[np.float64]  # (N, 2): Dice 0..1 and HD95 in px, in the order of ``images``

    @property
    def seed(self) -> int:
        """Of the rounds."""
        return self.config.seed


# --------------------------------------------------------------------------- reading


def compare(
    runs: Path, names: Sequence[str] = (), *, reference: str | None = None
) -> dict[str, Any]:
    """Compare evaluated runs, a row for each method.

    Args:
        runs: the folder ``cache/runs``; nothing in it is written.
        names: rows or runs, in the order of the table; all evaluated runs if there is none, by
            method and name.
        reference: the row that differences refer to; ``sam_fed``, if it is there.

    Returns:
        as :func:`compare_rows`.

    Raises:
        ConfigError: a name or the reference is not there, or runs of a row are not seeds of one
        method. StageError: a run is not evaluated yet. IdentityError: runs of different
        partitions, images or image sizes. DataError: a file is not what samfed writes.
    """
    chosen = _choose(runs, names)
    rows = {row: [load_evaluated(runs / name) for name in each] for row, each in chosen.items()}
    if not names:
        order = get_args(Method)
        methods = {row: order.index(each[0].config.federate.method) for row, each in rows.items()}
        rows = {row: rows[row] for row in sorted(rows, key=lambda row: (methods[row], row))}
    return compare_rows(rows, reference=reference)


def row_of(name: str) -> str:
    """The row that a run belongs to: its name without ``-seed<k>``."""
    return re.sub(r"(?<=.)-seed\d+$", "", name)


def _choose(folder: Path, names: Sequence[str]) -> dict[str, list[str]]:
    """Evaluated runs by row; runs that a row still waits for are left out with a warning."""
    found = sorted(path.name for path in folder.glob("[!.]*") if path.is_dir())
    ready = {name for name in found if (folder / name / "metrics.json").is_file()}
    if not ready and not names:
        raise StageError(f"{folder}: found no evaluated run; run `samfed evaluate` first")
    chosen: dict[str, list[str]] = {}
    waiting: list[str] = []
    for wanted in names or dict.fromkeys(map(row_of, found)):
        members = [name for name in found if wanted in (name, row_of(name))]
        if not members:
            there = ", ".join(found) or "none"
            raise ConfigError(f"{wanted}: no such row or run in {folder}; found {there}")
        if names and not ready.intersection(members):
            missing = folder / members[0] / "metrics.json"
            raise StageError(f"{missing}: not found; run `samfed evaluate` first")
        waiting += [name for name in members if name not in ready]
        for name in members:
            if name in ready and name not in chosen.setdefault(row_of(name), []):
                chosen[row_of(name)].append(name)
    if waiting:
        log.warning("left out, not evaluated yet: %s", ", ".join(dict.fromkeys(waiting)))
    return chosen


def load_evaluated(folder: Path) -> EvaluatedRun:
    """Read ``params.yaml``, ``per_image.csv``, ``metrics.json`` and the partition of one run.

    Raises:
        StageError: the run is not trained, or not evaluated, yet. ConfigError: its seed is not
        the one in its name. DataError: a file is not what samfed writes.
    """
    run = RunFolder(folder)
    config = run.config()
    named = re.search(r".-seed(\d+)$", folder.name)
    if named and int(named[1]) != config.seed:
        raise ConfigError(
            f"{folder}: made with seed {config.seed}, but its name says {int(named[1])}; rename it"
        )
    metrics = read_json(folder / "metrics.json", stage="evaluate")
    path = folder / "per_image.csv"
    table = _read_scores(path)
    images = tuple(sorted(table))
    scores = np.array([table[image] for image in images], dtype=np.float64)
    try:
        pooled = metrics["test"]["pooled"]
        same = pooled["n"] == len(images) and abs(pooled["dice"] - scores[:, 0].mean()) < 1e-5
    except (KeyError, TypeError) as error:
        fault = f"no test metrics in it ({error})"
        path = folder / "metrics.json"
        raise DataError(f"{path}: {fault}; run `samfed evaluate` again") from error
    if not same:  # a file cut short, or left by a killed evaluation
        raise DataError(f"{path}: not the images of metrics.json; run `samfed evaluate` again")
    return EvaluatedRun(folder.name, config, run.partition_sha256(), images, scores)


def _read_scores(path: Path) -> dict[tuple[str, str, str], list[float]]:
    """Dice and HD95 by client, image id and group."""
    if not path.is_file():
        raise StageError(f"{path}: not found; run `samfed evaluate` first")
    table: dict[tuple[str, str, str], list[float]] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for line in csv.DictReader(file):
                image = (line["client"], line["image_id"], line["group"])
                values = [float(line[name]) for name in METRICS]
                if image in table or not all(map(math.isfinite, values)):
                    raise ValueError(f"{image[1]} is there twice or has no score")
                table[image] = values
        if not table:
            raise ValueError("no images")
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise DataError(
            f"{path}: not the scores of images ({error}); run `samfed evaluate` again"
        ) from error
    return table


# --------------------------------------------------------------------------- comparing


def compare_rows(
    rows: Mapping[str, Sequence[EvaluatedRun]], *, reference: str | None = None
) -> dict[str, Any]:
    """Compare rows of runs; the order of a row's runs changes nothing.

    Per image, scores are averaged over a row's seeds. Intervals and tests are over groups: they
    answer for other patients, not for other seeds.

    Args:
        rows: at least one run in each, in the order of the result.
        reference: the row that differences refer to; ``sam_fed``, if it is there.

    Returns:
        JSON-ready: ``reference`` (None: no differences), ``n`` and ``groups``, ``image_size``
        (px), ``partition`` (sha256), and ``rows``: for each its ``row``, ``method``, ``runs``,
        ``seeds``, ``dice`` (0..1) and ``hd95`` (px), pooled over images, with ``_ci95`` [low,
        high] and ``_sd``, the standard deviation of the runs' means (None for one run);
        ``client_mean``, the plain mean over clients; ``clients`` with ``n``, ``dice``, ``hd95``
        each; ``difference``, row minus reference of ``dice`` and ``hd95`` with ``_ci95`` and
        ``_p`` (None for the reference itself).

    Raises:
        ConfigError, IdentityError: as :func:`compare`.
    """
    rows = {row: sorted(runs, key=lambda run: (run.seed, run.name)) for row, runs in rows.items()}
    if reference is None:
        reference = DEFAULT_REFERENCE if DEFAULT_REFERENCE in rows else None
    elif reference not in rows:
        raise ConfigError(f"--reference {reference}: no such row; found {', '.join(rows)}")
    _check(rows)
    first = next(iter(rows.values()))[0]
    groups = [group for _, _, group in first.images]
    means = {row: np.mean([run.scores for run in runs], axis=0) for row, runs in rows.items()}
    zero = np.zeros_like(first.scores) if reference is None else means[reference]
    # one call, so that every column sees the same resamples
    both = np.concatenate([np.hstack((mean, mean - zero)) for mean in means.values()], axis=1)
    bounds = np.stack(bootstrap_means(both, groups, seed=_SEED), axis=1).reshape(len(rows), 4, 2)
    table = []
    for (row, runs), interval in zip(rows.items(), bounds, strict=True):
        entry = _row_entry(row, runs, means[row], interval[:2])
        entry["difference"] = None
        if reference not in (None, row):
            entry["difference"] = _difference(means[row] - zero, groups, interval[2:])
        table.append(entry)
    return {
        "reference": reference,
        "n": len(first.images),
        "groups": len(set(groups)),
        "image_size": first.config.data.image_size,
        "partition": first.partition,
        "rows": table,
    }


def _row_entry(
    row: str,
    runs: Sequence[EvaluatedRun],
    mean: NDArray[np.float64],
    interval: NDArray[np.float64],
) -> dict[str, Any]:
    """A row without its difference; ``mean`` (N, 2) over seeds, ``interval`` (2, 2) low, high."""
    of_client = np.array([client for client, _, _ in runs[0].images])
    clients = {
        str(client): {"n": int(np.count_nonzero(of_client == client))}
        | _named(mean[of_client == client].mean(axis=0).tolist())
        for client in np.unique(of_client)
    }
    by_run = np.array([run.scores.mean(axis=0) for run in runs])  # (runs, 2)
    spread = by_run.std(axis=0, ddof=1).tolist() if len(runs) > 1 else [None, None]
    return {
        "row": row,
        "method": runs[0].config.federate.method,
        "runs": [run.name for run in runs],
        "seeds": [run.seed for run in runs],
        **_named(mean.mean(axis=0).tolist()),
        **_named(interval.tolist(), "_ci95"),
        **_named(spread, "_sd"),
        "client_mean": {m: float(np.mean([c[m] for c in clients.values()])) for m in METRICS},
        "clients": clients,
    }


def _difference(
    difference: NDArray[np.float64], groups: Sequence[str], interval: NDArray[np.float64]
) -> dict[str, Any]:
    """Of per-image differences (N, 2): means, intervals and p values."""
    p_values = [sign_flip_test(column, groups, seed=_SEED) for column in difference.T]
    return {
        **_named(difference.mean(axis=0).tolist()),
        **_named(interval.tolist(), "_ci95"),
        **_named(p_values, "_p"),
    }


def _named(values: Sequence[Any], suffix: str = "") -> dict[str, Any]:
    return {f"{name}{suffix}": value for name, value in zip(METRICS, values, strict=True)}


def _settings(config: Config) -> dict[str, Any]:
    """What runs of one row have in common."""
    method = METHODS[config.federate.method]
    unused = {"agreement": not method.uses_agreement, "sam": not method.uses_sam}
    return {
        key: value
        for key, value in deciding_settings(config, "experiment").items()
        if not unused.get(key.split(".")[0], False)
    }


def _check(rows: Mapping[str, Sequence[EvaluatedRun]]) -> None:
    """Refuse what cannot stand side by side; warn where rows have different seeds."""
    for row, runs in rows.items():
        _check_row(row, runs)
    first, *others = [run for runs in rows.values() for run in runs]
    for other in others:
        _check_pair(first, other)
    seeds = {row: [run.seed for run in runs] for row, runs in rows.items()}
    if len({tuple(each) for each in seeds.values()}) > 1:
        text = "; ".join(f"{row} {', '.join(map(str, each))}" for row, each in seeds.items())
        log.warning("rows have different seeds: %s", text)


def _check_row(row: str, runs: Sequence[EvaluatedRun]) -> None:
    """Refuse runs that are not the seeds of one method."""
    by_seed: dict[int, str] = {}
    for run in runs:
        if run.seed in by_seed:
            both = f"{by_seed[run.seed]} and {run.name}"
            raise ConfigError(f"row {row}: {both} have the same seed, {run.seed}; name one of them")
        by_seed[run.seed] = run.name
    first, settings = runs[0], _settings(runs[0].config)
    for run in runs[1:]:
        other = _settings(run.config)
        differ = [
            f"{k} ({v}, {other[k]})"
            for k, v in settings.items()
            if k in other and v != other[k]  # another method may have fewer
        ]
        if differ:
            raise ConfigError(
                f"row {row}: {first.name} and {run.name} differ in {', '.join(differ)}; only runs "
                "that differ in their seed alone can share a row"
            )


def _check_pair(one: EvaluatedRun, two: EvaluatedRun) -> None:
    """Refuse runs whose scores cannot stand side by side."""
    both = f"{one.name} and {two.name}"
    for key in ("image_size", "num_classes"):
        values = getattr(one.config.data, key), getattr(two.config.data, key)
        if values[0] != values[1]:
            raise IdentityError(
                f"{both}: data.{key} is {values[0]} and {values[1]}; their scores cannot be "
                "compared"
            )
    if one.partition != two.partition:
        raise IdentityError(
            f"{both}: made on different partitions, {one.partition[:12]} and "
            f"{two.partition[:12]}; compare runs of one partition"
        )
    if one.images != two.images:
        client, image_id, group = min(set(one.images) ^ set(two.images))
        raise IdentityError(
            f"{both}: scored on different images, e.g. {image_id} (client {client}, group "
            f"{group}) in one of them; run `samfed evaluate` for both again"
        )


# --------------------------------------------------------------------------- showing


def as_markdown(found: Mapping[str, Any]) -> str:
    """The result of :func:`compare_rows` as two Markdown tables, and what their numbers are."""
    reference, rows = found["reference"], found["rows"]
    head = ["method", "seeds", "Dice", "95 % interval", "SD over seeds", "mean over clients"]
    head += ["HD95 px", "95 % interval", "mean over clients"]
    if reference is not None:
        head += [f"Dice points over `{reference}`", "95 % interval", "p"]
    clients = list(rows[0]["clients"])
    by_client = [
        [f"`{row['row']}`", *(f"{row['clients'][name]['dice']:.3f}" for name in clients)]
        for row in rows
    ]
    sizes = [f"{name} ({rows[0]['clients'][name]['n']})" for name in clients]
    note = (
        f"{found['n']} test images in {found['groups']} groups, {found['image_size']} px. Scores "
        "are averaged over seeds by image, then over images; intervals are bootstraps over groups"
    )
    if reference is not None:
        note += ", p a two-sided sign-flip test over groups, not corrected for several methods"
    return "\n".join(
        [
            *_table(head, ([*_cells(row), *_gain(row, reference)] for row in rows)),
            "",
            f"{note}.",
            "",
            "Dice by client (images), mean over seeds:",
            "",
            *_table(["method", *sizes], by_client),
        ]
    )


def _cells(row: Mapping[str, Any]) -> list[str]:
    low, high = row["dice_ci95"]
    near, far = row["hd95_ci95"]
    return [
        f"`{row['row']}`",
        str(len(row["seeds"])),
        f"{row['dice']:.3f}",
        f"{low:.3f} to {high:.3f}",
        _DASH if row["dice_sd"] is None else f"{row['dice_sd']:.3f}",
        f"{row['client_mean']['dice']:.3f}",
        f"{row['hd95']:.1f}",
        f"{near:.1f} to {far:.1f}",
        f"{row['client_mean']['hd95']:.1f}",
    ]


def _gain(row: Mapping[str, Any], reference: str | None) -> list[str]:
    """The cells of the difference to the reference."""
    difference = row["difference"]
    if difference is None:
        return [] if reference is None else [_DASH] * 3
    low, high = difference["dice_ci95"]
    p = difference["dice_p"]
    return [
        _points(difference["dice"]),
        f"{_points(low)} to {_points(high)}",
        "< 0.001" if p < 0.001 else f"{p:.3f}",
    ]


def _points(dice: float) -> str:
    return f"{100 * dice:+z.1f}"  # z: no negative zero


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    lines = ([cell.replace("|", "\\|") for cell in line] for line in (head, *body))
    title, *rest = [f"| {' | '.join(line)} |" for line in lines]
    return [title, "|" + "---|" * len(head), *rest]
