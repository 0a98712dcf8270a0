"""``samfed compare``: finished runs side by side, with intervals and a paired test.

A *row* is a method with its seeds: the runs ``<row>-seed<k>``, and a run that is named ``<row>``.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.config import Config
from pipeline.deciding import deciding_settings
from pipeline.disk import is_folder_name, write_bytes
from pipeline.errors import ConfigError, IdentityError, StageError
from pipeline.federation.runs import RunFolder
from pipeline.methods import METHODS
from pipeline.results.finished import SCORES, FinishedRun, read_run
from pipeline.results.pages import render
from pipeline.results.scores import as_csv
from pipeline.segmentation.statistics import intervals, mean_of, sign_flip_test

log = logging.getLogger("samfed.comparison")

DEFAULT_REFERENCE = "sam_fed"

Layout = Literal["markdown", "csv", "latex"]

_SEED = 0  # of bootstrap and test: a table does not depend on the settings it is asked with


@dataclass(frozen=True)
class Comparison:
    """Rows of runs side by side.

    A row is JSON-ready: its ``row``, ``method``, ``runs``, ``seeds``; each of ``SCORES``, pooled
    over images, those in mm where every image's size is known, with ``_ci95`` [low, high] (None
    for one group) and ``_sd``, the standard deviation of the runs' means (None for one run);
    ``client_mean``, the plain mean over clients; ``clients`` with ``n`` and the scores of each;
    ``classes``, the means over seeds of each class of ``metrics.json``; ``difference``, row minus
    reference of each score with ``_ci95`` and ``_p`` (None for the reference itself).
    """

    reference: str | None  # row that differences refer to; None: there are none
    n: int  # images
    groups: int
    image_size: int  # px
    partition: str  # sha256
    tolerance: dict[str, float]  # of the surface Dice, in ``px`` and ``mm``
    rows: list[dict[str, Any]]
    external: list[dict[str, Any]]  # of each run: ``run``, ``test``, ``model``, ``pooled`` scores
    layout: Layout = "markdown"  # of its text

    def as_json(self) -> dict[str, Any]:
        """Return all of it but its layout."""
        return {key: value for key, value in asdict(self).items() if key != "layout"}

    def text(self) -> str:
        """Return its tables: Markdown with what their numbers are, LaTeX for booktabs, or CSV.

        CSV has a line for all images of a row, for each client and for each class.
        """
        if self.layout == "csv":
            return as_csv(["row", *_LINE], (_line(row, *part) for row in self.rows
                                            for part in _parts(row))).rstrip("\n")  # fmt: skip
        template = "compare.tex.j2" if self.layout == "latex" else "compare.md.j2"
        return render(template, **vars(self))


def compare(
    runs: Path,
    names: Sequence[str] = (),
    *,
    reference: str | None = None,
    output: Path | None = None,
    layout: Layout = "markdown",
) -> Comparison:
    """Compare evaluated runs, a row for each method.

    Args:
        runs: the folder ``cache/runs``; nothing in it is written.
        names: rows or runs, in the order of the table; all evaluated runs if there is none, by
            method and name.
        reference: the row that differences refer to; ``sam_fed``, if it is there.
        output: a file to which the tables are written. layout: of them.

    Raises:
        ConfigError: the reference is not there, or runs of a row are not seeds of one method.
        StageError: a run is not there, or not evaluated yet. IdentityError: runs of different
        partitions, images or image sizes. DataError: a file is not what samfed writes.
    """
    if output is not None and output.is_dir():
        raise ConfigError(f"--output {output}: is a folder; expected a file to write")
    chosen = _choose(runs, names)
    rows = {row: [_read_seed(runs / name) for name in each] for row, each in chosen.items()}
    if not names:
        places = {method: place for place, method in enumerate(METHODS)}
        methods = {row: places[each[0].config.federate.method] for row, each in rows.items()}
        rows = {row: rows[row] for row in sorted(rows, key=lambda row: (methods[row], row))}
    found = replace(compare_rows(rows, reference=reference), layout=layout)
    if output is not None:
        write_bytes(output, f"{found.text()}\n".encode())
    return found


def choose_layout(*, csv: bool, latex: bool) -> Layout:
    """Return the layout that the options ask for.

    Raises:
        ConfigError: they ask for both.
    """
    if csv and latex:
        raise ConfigError("--csv and --latex: give one of them")
    return "csv" if csv else "latex" if latex else "markdown"


def row_of(name: str) -> str:
    """Return the row that a run belongs to: its name without ``-seed<k>``."""
    return re.sub(r"(?<=.)-seed\d+$", "", name)


def _choose(folder: Path, names: Sequence[str]) -> dict[str, list[str]]:
    """Return evaluated runs by row; warn of the runs that a row still waits for."""
    found = sorted(path.name for path in folder.glob("[!.]*") if path.is_dir())
    ready = {name for name in found if (folder / name / "metrics.json").is_file()}
    if not ready and not names:
        raise StageError(f"{folder}: found no evaluated run; run `samfed evaluate` first")
    chosen: dict[str, list[str]] = {}
    waiting: list[str] = []
    for wanted in names or dict.fromkeys(map(row_of, found)):
        if not is_folder_name(wanted):
            raise ConfigError(f"run {wanted!r}: expected the name of a folder under cache/runs")
        members = [name for name in found if wanted in (name, row_of(name))]
        if not members:
            there = ", ".join(found) or "none"
            raise StageError(f"{wanted}: no such row or run in {folder}; found {there}")
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


def _read_seed(folder: Path) -> FinishedRun:
    """Read a run; refuse one whose seed is not the one in its name."""
    run = read_run(RunFolder(folder))
    named, seed = re.search(r".-seed(\d+)$", folder.name), run.config.seed
    if named and int(named[1]) != seed:
        raise ConfigError(
            f"{folder}: made with seed {seed}, but its name says {int(named[1])}; rename it"
        )
    if not run.images:
        raise StageError(
            f"{folder}: no client has test images, so there is nothing to compare; add masks at "
            "the clients and run `samfed prepare` again"
        )
    return run


def compare_rows(
    rows: Mapping[str, Sequence[FinishedRun]], *, reference: str | None = None
) -> Comparison:
    """Compare rows of at least one run each; the order of a row's runs changes nothing.

    Per image, scores are averaged over a row's seeds. Intervals and tests are over groups: they
    answer for other patients, not for other seeds. Arguments and errors are those of ``compare``.
    """
    rows = {row: sorted(runs, key=lambda run: (run.config.seed, run.name)) for row, runs in
            rows.items()}  # fmt: skip
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
    bounds = iter(intervals(both, groups, seed=_SEED))
    table = []
    for row, runs in rows.items():
        own, difference = ([next(bounds) for _ in SCORES] for _ in range(2))
        entry = {"row": row, **_entry(runs, means[row], own), "difference": None}
        if reference not in (None, row):
            entry["difference"] = _difference(means[row] - zero, groups, difference)
        table.append(entry)
    external = [
        {"run": run.name, "test": each.name, "model": each.model, "pooled": each.test["pooled"]}
        for runs in rows.values()
        for run in runs
        for each in run.external
    ]
    return Comparison(
        reference=reference,
        n=len(groups),
        groups=len(set(groups)),
        image_size=first.config.data.image_size,
        partition=first.partition,
        tolerance=first.evaluation.tolerance,
        rows=table,
        external=external,
    )


def _entry(
    runs: Sequence[FinishedRun], mean: NDArray[np.float64], bounds: Sequence[list[float] | None]
) -> dict[str, Any]:
    """Return a row without its difference; ``mean`` (N, 8) over seeds, ``bounds`` of its means."""
    of_client = np.array([client for client, _, _ in runs[0].images])
    clients = {
        str(client): {"n": int(np.count_nonzero(of_client == client))}
        | _named(mean[of_client == client].mean(axis=0))
        for client in np.unique(of_client)
    }
    by_run = np.array([run.scores.mean(axis=0) for run in runs])  # (runs, 8)
    classes = [run.evaluation.test["pooled"]["classes"] for run in runs]
    return {
        "method": runs[0].evaluation.method,
        "runs": [run.name for run in runs],
        "seeds": [run.config.seed for run in runs],
        **_named(mean.mean(axis=0)),
        **_named(bounds, "_ci95"),
        **_named(by_run.std(axis=0, ddof=1) if len(runs) > 1 else [None] * len(SCORES), "_sd"),
        "client_mean": mean_of(list(clients.values()), SCORES),
        "clients": clients,
        "classes": {
            name: mean_of([each[name] for each in classes], ("n", *SCORES)) for name in classes[0]
        },
    }


#: Columns of a line of CSV beside its row.
_LINE = (
    *("method", "seeds", "part", "name", "n"),
    *(
        f"{score}{suffix}"
        for score in SCORES
        for suffix in ("", "_low", "_high", "_sd", "_difference", "_difference_low",
                       "_difference_high", "_p")
    ),
)  # fmt: skip


def _parts(row: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield kind, name and scores of all images of a row, of each client and of each class."""
    yield "all", "", {"n": sum(each["n"] for each in row["clients"].values()), **row}
    yield "client_mean", "", row["client_mean"]
    for kind in ("clients", "classes"):
        for name, scores in row[kind].items():
            yield kind, name, scores


def _line(row: dict[str, Any], part: str, name: str, scores: dict[str, Any]) -> list[Any]:
    """Return a line of CSV."""
    difference = scores.get("difference") or {}
    values = [row["row"], row["method"], len(row["seeds"]), part, name, scores.get("n")]
    for score in SCORES:
        for found in (scores, difference):
            bounds = found.get(f"{score}_ci95") or (None, None)
            last = found.get(f"{score}_{'sd' if found is scores else 'p'}")
            values += [found.get(score), *bounds, last]
    return values


def _difference(
    difference: NDArray[np.float64], groups: Sequence[str], bounds: Sequence[list[float] | None]
) -> dict[str, Any]:
    """Return the means, intervals and p values of per-image differences (N, 8)."""
    p_values = [
        None if np.isnan(column).any() else sign_flip_test(column, groups, seed=_SEED)
        for column in difference.T
    ]
    return _named(difference.mean(axis=0)) | _named(bounds, "_ci95") | _named(p_values, "_p")


def _named(values: Iterable[Any], suffix: str = "") -> dict[str, Any]:
    """Return values, or pairs of them, by the names of ``SCORES``; None where one is not known."""
    plain = values.tolist() if isinstance(values, np.ndarray) else values
    return {
        f"{name}{suffix}": None if np.isnan(np.asarray(value, np.float64)).any() else value
        for name, value in zip(SCORES, plain, strict=True)
    }


def _check(rows: Mapping[str, Sequence[FinishedRun]]) -> None:
    """Refuse what cannot stand side by side; warn where rows have different seeds."""
    for row, runs in rows.items():
        _check_row(row, runs)
    first, *others = [run for runs in rows.values() for run in runs]
    for other in others:
        check_pair(first, other)
    seeds = {row: [run.config.seed for run in runs] for row, runs in rows.items()}
    if len({tuple(each) for each in seeds.values()}) > 1:
        text = "; ".join(f"{row} {', '.join(map(str, each))}" for row, each in seeds.items())
        log.warning("rows have different seeds: %s", text)


def _check_row(row: str, runs: Sequence[FinishedRun]) -> None:
    """Refuse runs that are not the seeds of one method; they come in the order of their seeds."""
    for one, two in itertools.pairwise(runs):
        if one.config.seed == two.config.seed:
            both = f"{one.name} and {two.name} have the same seed, {one.config.seed}"
            raise ConfigError(f"row {row}: {both}; name one of them")
    settings = _settings(runs[0].config)
    for run in runs[1:]:
        other = _settings(run.config)
        differ = [
            f"{k} ({v}, {other[k]})"
            for k, v in settings.items()
            if k in other and v != other[k]  # another method may have fewer
        ]
        if differ:
            raise ConfigError(
                f"row {row}: {runs[0].name} and {run.name} differ in {', '.join(differ)}; only "
                "runs that differ in their seed alone can share a row"
            )


def _settings(config: Config) -> dict[str, Any]:
    """Return what runs of one row have in common."""
    method = METHODS[config.federate.method]
    used = {"agreement": method.uses_agreement, "sam": method.uses_sam}
    deciding = deciding_settings(config, "experiment")
    return {key: value for key, value in deciding.items() if used.get(key.split(".")[0], True)}


def check_pair(one: FinishedRun, two: FinishedRun) -> None:
    """Refuse runs whose scores cannot stand side by side.

    Raises:
        IdentityError: they differ in size, classes, tolerance, partition or images.
    """
    both = f"{one.name} and {two.name}"
    for key in ("image_size", "num_classes"):
        values = getattr(one.config.data, key), getattr(two.config.data, key)
        if values[0] != values[1]:
            fault = f"data.{key} is {values[0]} and {values[1]}"
            raise IdentityError(f"{both}: {fault}; their scores cannot be compared")
    if one.evaluation.tolerance != two.evaluation.tolerance:
        raise IdentityError(
            f"{both}: scored with different tolerances of the surface Dice "
            "(evaluate.tolerance_px, evaluate.tolerance_mm); run `samfed evaluate` for both again"
        )
    classes = [list(run.evaluation.test["pooled"]["classes"]) for run in (one, two)]
    if classes[0] != classes[1]:
        names = " and ".join(", ".join(each) for each in classes)
        raise IdentityError(
            f"{both}: data.class_names differ, {names}; run `samfed evaluate` for both again"
        )
    if one.partition != two.partition:
        partitions = f"{one.partition[:12]} and {two.partition[:12]}"
        raise IdentityError(
            f"{both}: made on different partitions, {partitions}; compare runs of one partition"
        )
    if one.images != two.images:
        client, image_id, group = min(set(one.images) ^ set(two.images))
        raise IdentityError(
            f"{both}: scored on different images, e.g. {image_id} (client {client}, group "
            f"{group}) in one of them; run `samfed evaluate` for both again"
        )
