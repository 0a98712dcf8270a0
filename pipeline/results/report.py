"""``samfed report``: one or several runs as one self-contained HTML file.

Warnings, scores with their tests, data, teacher, curves, calibration, test images and parameters,
all read from the runs' folders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from pipeline.disk import write_bytes
from pipeline.errors import IdentityError
from pipeline.federation.examples import Example
from pipeline.federation.runs import RunFolder
from pipeline.results.compare import check_pair
from pipeline.results.curves import (
    line_keys,
    reliability_plot,
    run_curves,
    validation_curves,
)
from pipeline.results.finished import SCORES, FinishedRun, read_run
from pipeline.results.pages import (
    class_keys,
    example_panels,
    finite,
    outline_uri,
    photo_uri,
    prediction_uri,
    render,
)
from pipeline.segmentation.statistics import sign_flip_test

MAX_EXAMPLES = 12
LEVEL = 0.05  # of p below which a best value is bold
HIGHER_IS_BETTER = frozenset({"dice", "iou", "nsd", "nsd_mm"})


@dataclass(frozen=True)
class Report:
    """A report that was written."""

    path: Path

    def as_json(self) -> dict[str, Any]:
        """Return where it is."""
        return {"report": str(self.path)}

    def text(self) -> str:
        """Return where it is."""
        return str(self.path)


class Column(NamedTuple):
    """A column of the table of clients."""

    title: str
    field: str
    last: bool = False  # of the client's last round; else the mean over its rounds
    scale: float = 1.0  # of what is shown
    bar: bool = True  # whether the value is also shown as a bar

    def value(self, entries: Sequence[Mapping[str, Any]]) -> float | None:
        """Return the value of a client's rounds; None where there is none."""
        shown = entries[-1:] if self.last else entries
        values = finite(entry.get(self.field) for entry in shown)
        return self.scale * float(np.mean(values)) if values else None


CLIENT_COLUMNS = (
    Column("Seconds", "seconds"),
    Column("MB up", "bytes_up", scale=1e-6),
    Column("MB down", "bytes_down", scale=1e-6),
    Column("Drift, %", "drift", scale=100.0),
    Column("Agreement", "agreement", last=True),
    Column("Coverage", "coverage", last=True),
    Column("Pseudo-label Dice", "pseudo_label_dice", last=True),
    Column("SAM's bias", "sam_bias", last=True, bar=False),
)


@dataclass(frozen=True)
class Standing:
    """Whether runs differ in a score, by a paired test over patients against its best run."""

    best: int  # place of the best run
    p: tuple[float | None, ...]  # of each run against it; None for itself

    @property
    def holds(self) -> bool:
        """Whether the best run differs from every other."""
        return all(p < LEVEL for p in self.p if p is not None)


def write_report(
    runs: Sequence[RunFolder],
    path: Path | None = None,
    *,
    scores: Path | None = None,
    title: str = "samfed report",
) -> Report:
    """Write a report on evaluated runs, with the examples of the last one, to ``path``.

    Without a path it is ``report.html`` of the last run. ``scores`` is that of ``read_run``.

    Raises:
        StageError, ConfigError, DataError: as ``read_run`` and ``RunFolder.examples``.
    """
    page = render_report(
        [read_run(run, scores=scores) for run in runs], runs[-1].examples(), title=title
    )
    report = Report(path or runs[-1].path / "report.html")
    write_bytes(report.path, page.encode())
    return report


def render_report(runs: Sequence[FinishedRun], examples: Sequence[Example], *, title: str) -> str:
    """Return the report as HTML text; the same input gives the same bytes.

    Args:
        runs: at least one, in the order of the tables.
        examples: images, of which the first twelve are shown; may be empty.
        title: of the page.
    """
    if not runs:
        raise ValueError("no runs to report on; expected at least one")
    why_not = _why_not_comparable(runs)
    standings = {} if why_not or len(runs) < 2 else _standings(runs)
    examples = examples[:MAX_EXAMPLES]
    by_name = [{"truth": e.truth, "SAM": e.sam, "client": e.prediction} for e in examples]
    names = max((run.config.data.classes for run in runs), key=len)
    shown = [*(mask for masks in by_name for mask in masks.values()),
             *(each.truth for run in runs for each in run.gallery)]  # fmt: skip
    return render(
        "report.html.j2",
        title=title,
        runs=[_run_context(run) for run in runs],
        columns=_columns(runs),
        standings=standings,
        why_not=why_not,
        teachers=_teachers(runs),
        calibration=_calibration(runs),
        validation=validation_curves({run.name: run.history for run in runs}),
        examples=[
            {"caption": each.caption} | example_panels(each.image, masks, target=each.target)
            for each, masks in zip(examples, by_name, strict=True)
        ],
        class_keys=class_keys(shown, names),
    )


def _why_not_comparable(runs: Sequence[FinishedRun]) -> str | None:
    """Return why the runs' scores cannot be tested against each other; None if they can."""
    try:
        for other in runs[1:]:
            check_pair(runs[0], other)
    except IdentityError as error:
        return str(error)
    return None if runs[0].images else "no client has test images"


def _standings(runs: Sequence[FinishedRun]) -> dict[str, Standing]:
    """Test every score's best run against each of the others, paired by image."""
    groups, found = [group for _, _, group in runs[0].images], {}
    for column, name in enumerate(SCORES):
        values = [run.scores[:, column] for run in runs]
        means = [each.mean() for each in values]
        if np.isnan(means).any():
            continue
        best = int(np.argmax(means) if name in HIGHER_IS_BETTER else np.argmin(means))
        p_values = [
            None if place == best else sign_flip_test(values[best] - own, groups, seed=0)
            for place, own in enumerate(values)
        ]
        found[name] = Standing(best, tuple(p_values))
    return found


def _columns(runs: Sequence[FinishedRun]) -> dict[str, str]:
    """Return the scores that the tables have and their headings; in mm where all runs know it."""
    in_mm = all(run.evaluation.test["pooled"].get("hd95_mm") is not None for run in runs)
    unit, suffix = ("mm", "_mm") if in_mm else ("px", "")
    tolerances = {run.evaluation.tolerance[unit] for run in runs}
    within = f", {tolerances.pop():g} {unit}" if len(tolerances) == 1 else ""
    return {
        "dice": "Dice",
        "iou": "IoU",
        f"hd95{suffix}": f"HD95, {unit}",
        f"assd{suffix}": f"ASSD, {unit}",
        f"nsd{suffix}": f"NSD{within}",
    }


def _teachers(runs: Sequence[FinishedRun]) -> list[dict[str, Any]]:
    """Return what is known of each teacher that a run learnt from, once, with the runs' names."""
    found: list[dict[str, Any]] = []
    for run in runs:
        teacher = run.evaluation.teacher
        same = [each for each in found if each["teacher"] == teacher]
        if same:
            same[0]["runs"].append(run.name)
        elif teacher is not None:
            found.append({"teacher": teacher, "runs": [run.name]})
    return found


def _calibration(runs: Sequence[FinishedRun]) -> dict[str, Any] | None:
    """Return every model's temperature and errors, and the plot of those that were measured."""
    models = {
        run.name if name == "global" else f"{run.name}, {name}": spec
        for run in runs
        for name, spec in run.models.items()
    }
    measured = {name: spec for name, spec in models.items() if spec.calibration.ece is not None}
    keys = line_keys(measured)
    if not models:
        return None
    bins = {
        k: spec.calibration.reliability for k, spec in zip(keys, measured.values(), strict=True)
    }
    plot = reliability_plot(bins) if bins else None
    return {"models": models, "plot": plot, "lines": keys}


def _run_context(run: FinishedRun) -> dict[str, Any]:
    """Return what the template shows of a run."""
    warnings: dict[str, list[int]] = {text: [] for text in run.evaluation.warnings(run.history)}
    for entry in run.history:
        for text in entry.get("warnings") or ():
            warnings.setdefault(text, []).append(entry["round"])
    panels, client_keys = run_curves(run.history)
    rounds = {
        name: [entry["clients"][name] for entry in run.history if name in entry["clients"]]
        for name in run.clients
    }
    columns = [(each, [each.value(own) for own in rounds.values()]) for each in CLIENT_COLUMNS]
    pooled, data = run.evaluation.test["pooled"], run.evaluation.data
    return {
        **vars(run),
        **run.evaluation.as_json(),
        "data": sorted(data.items(), key=lambda each: (each[0] != "server", each[0])),
        "has_groups": pooled["n"] > 0 and pooled["groups"]["n"] < pooled["n"],
        "params": yaml.safe_dump(run.config.model_dump(mode="json"), sort_keys=False),
        "seconds": sum(entry.get("seconds") or 0 for entry in run.history),
        "warnings": warnings,
        "panels": panels,
        "client_keys": client_keys,
        "client_rounds": rounds,
        "client_columns": [(each, values) for each, values in columns if finite(values)],
        "at_server": any(entry.get("server") for entry in run.history),
        "gallery": _gallery(run),
    }


def _gallery(run: FinishedRun) -> dict[str, list[dict[str, Any]]]:
    """Return the pictures of each client's test images, from the worst to the best."""
    found: dict[str, list[dict[str, Any]]] = {}
    for each in run.gallery:
        found.setdefault(each.client, []).append(
            vars(each)
            | {
                "photo": photo_uri(each.image),
                "truth": outline_uri(each.truth),
                "prediction": prediction_uri(each.prediction),
            }
        )
    return found
