"""``samfed report``: runs side by side as one self-contained HTML file.

Tables, curves, example images and parameters, all read from the runs' folders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from pipeline.disk import write_bytes
from pipeline.federation.examples import Example
from pipeline.federation.runs import RunFolder
from pipeline.results.curves import run_curves, validation_curves
from pipeline.results.finished import FinishedRun, read_run
from pipeline.results.pages import (
    DECIMALS,
    class_keys,
    example_panels,
    finite,
    format_number,
    render,
)

MAX_EXAMPLES = 12


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
    Column("Conflict log-odds", "conflict_log_odds", last=True, bar=False),
)


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
    comparable = len({run.config.data.image_size for run in runs}) == 1
    examples = examples[:MAX_EXAMPLES]
    by_name = [{"truth": e.truth, "SAM": e.sam, "client": e.prediction} for e in examples]
    return render(
        "report.html.j2",
        title=title,
        runs=[_run_context(run) for run in runs],
        best=_best(runs, distances=comparable),
        comparable=comparable,
        validation=validation_curves({run.name: run.history for run in runs}),
        examples=[
            {"caption": each.caption} | example_panels(each.image, masks, weight=each.weight)
            for each, masks in zip(examples, by_name, strict=True)
        ],
        example_keys=class_keys(mask for masks in by_name for mask in masks.values()),
    )


def _run_context(run: FinishedRun) -> dict[str, Any]:
    """Return what the template shows of a run."""
    warnings: dict[str, list[int]] = {}
    for entry in run.history:
        for text in entry.get("warnings") or ():
            warnings.setdefault(text, []).append(entry["round"])
    panels, client_keys = run_curves(run.history)
    rounds = {
        name: [entry["clients"][name] for entry in run.history if name in entry["clients"]]
        for name in run.clients
    }
    columns = [(each, [each.value(own) for own in rounds.values()]) for each in CLIENT_COLUMNS]
    return {
        **vars(run),
        **run.evaluation.as_json(),
        "params": yaml.safe_dump(run.config.model_dump(mode="json"), sort_keys=False),
        "seconds": sum(entry.get("seconds") or 0 for entry in run.history),
        "warnings": warnings,
        "panels": panels,
        "client_keys": client_keys,
        "client_rounds": rounds,
        "columns": [(each, values) for each, values in columns if finite(values)],
        "at_server": any(entry.get("server") for entry in run.history),
    }


def _best(runs: Sequence[FinishedRun], *, distances: bool) -> dict[str, str]:
    """Return per column the best value as it is printed: what looks equal is equally bold."""
    best: dict[str, str] = {}
    for name, decimals in DECIMALS.items():
        higher_is_better = name in ("dice", "iou")
        values = finite(run.evaluation.test["pooled"].get(name) for run in runs)
        if len(runs) > 1 and values and (higher_is_better or distances):
            best[name] = format_number((max if higher_is_better else min)(values), decimals)
    return best
