"""``samfed report``: runs side by side as one self-contained HTML file.

Tables, curves, example images and parameters, all read from the runs' folders.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.figure import Figure

from pipeline.disk import write_bytes
from pipeline.federation.examples import Example
from pipeline.federation.runs import RunFolder
from pipeline.results.curves import column, run_curves, validation_curves
from pipeline.results.finished import FinishedRun, read_run
from pipeline.results.pages import (
    DASH,
    DECIMALS,
    class_keys,
    example_panels,
    format_number,
    png_uri,
    render,
)

REPORT_BYTES = 1_900_000  # what curves, examples and parameters may take up
GALLERY_BYTES = 1_100_000  # of panels before compression, as base64


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


@dataclass(frozen=True)
class Column:
    """A column of the table of clients."""

    title: str
    field: str
    last: bool = False  # of the client's last round; else the mean over its rounds
    scale: float = 1.0  # of what is shown
    bar: bool = True  # whether the value is also shown as a bar

    def value(self, entries: Sequence[Mapping[str, Any]]) -> float:
        """Return the value of a client's rounds; nan where there is none."""
        values = column(entry.get(self.field) for entry in (entries[-1:] if self.last else entries))
        values = values[np.isfinite(values)]
        return self.scale * float(values.mean()) if len(values) else math.nan


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
    runs: Sequence[RunFolder], path: Path | None = None, *, title: str = "samfed report"
) -> Report:
    """Write a report on evaluated runs, with the examples of the last one, to ``path``.

    Without a path it is ``report.html`` of the last run.

    Raises:
        StageError, ConfigError, DataError: as ``read_run`` and ``RunFolder.examples``.
    """
    summaries = [read_run(run) for run in runs]
    page = render_report(summaries, runs[-1].examples(), title=title)
    report = Report(path or runs[-1].path / "report.html")
    write_bytes(report.path, page.encode())
    return report


def render_report(
    runs: Sequence[FinishedRun],
    examples: Sequence[Example],
    *,
    title: str,
    picture: Callable[[Figure], str] = png_uri,
) -> str:
    """Return the report as HTML text; the same input gives the same bytes.

    Args:
        runs: at least one, in the order of the tables.
        examples: images to show; may be empty.
        title: of the page.
        picture: makes a data URI of a figure.
    """
    if not runs:
        raise ValueError("no runs to report on; expected at least one")
    comparable = len({run.config.data.image_size for run in runs}) == 1
    contexts = [_run_context(run, picture) for run in runs]
    validation = validation_curves({run.name: run.history for run in runs}, picture=picture)
    panels = [panel for context in contexts for panel in context["curves"].panels]
    taken = sum(len(panel.png) for panel in panels)
    taken += sum(len(context["params"]) for context in contexts)
    side = _panel_px(len(examples), min(GALLERY_BYTES, REPORT_BYTES - taken))
    by_name = [{"truth": e.truth, "SAM": e.sam, "client": e.prediction} for e in examples]
    return render(
        "report.html.j2",
        title=title,
        runs=contexts,
        best=_best(runs, distances=comparable),
        comparable=comparable,
        validation=validation,
        panel_titles=list(dict.fromkeys(panel.title for panel in panels)),
        examples=[
            {"caption": example.caption}
            | example_panels(example.image, masks, side, weight=example.weight)
            for example, masks in zip(examples, by_name, strict=True)
        ],
        example_keys=class_keys(mask for masks in by_name for mask in masks.values()),
    )


def _run_context(run: FinishedRun, picture: Callable[[Figure], str]) -> dict[str, Any]:
    """Return what the template shows of a run."""
    warnings: dict[str, list[int]] = {}
    for entry in run.history:
        for text in entry.get("warnings") or ():
            warnings.setdefault(text, []).append(entry["round"])
    return {
        **vars(run),
        **run.evaluation.as_json(),
        "params": yaml.safe_dump(run.config.model_dump(mode="json"), sort_keys=False),
        "seconds": sum(entry.get("seconds") or 0 for entry in run.history),
        "warnings": warnings,
        "curves": run_curves(run.history, picture=picture),
        "table": _client_table(run),
        "at_server": any(entry.get("server") for entry in run.history),
    }


def _client_table(run: FinishedRun) -> dict[str, Any]:
    """Return each client's images, rounds, costs and diagnostics; columns without data left out."""
    entries = {
        name: [entry["clients"][name] for entry in run.history if name in entry["clients"]]
        for name in run.clients
    }
    by_column = {each: [each.value(own) for own in entries.values()] for each in CLIENT_COLUMNS}
    shown = {each: values for each, values in by_column.items() if any(map(math.isfinite, values))}
    cells = [_cells(each, values) for each, values in shown.items()]  # of each column
    rows = [
        {
            "name": name,
            "network": run.config.network_of(index) if run.config.heterogeneous else None,
            "images": max((str(entry["images"]) for entry in own), key=int, default=DASH),
            "rounds": len(own),
            "cells": [column[index] for column in cells],
        }
        for index, (name, own) in enumerate(entries.items())
    ]
    return {"columns": list(shown), "of": len(run.history), "rows": rows}


def _cells(each: Column, values: Sequence[float]) -> list[dict[str, Any]]:
    """Return a column's texts, about three digits for its largest value, and bars, % of a cell."""
    highest = float(np.nanmax(np.abs(values)))
    decimals = 2 if each.last else next((d for d in (0, 1, 2) if highest >= 10 ** (2 - d)), 3)
    full = 1.0 if each.last else highest
    return [
        {
            "text": format_number(value, decimals),
            "bar": round(100 * value / full) if each.bar and full and value == value else None,
        }
        for value in values
    ]


def _best(runs: Sequence[FinishedRun], *, distances: bool) -> dict[str, str]:
    """Return per column the best value as it is printed: what looks equal is equally bold."""
    best: dict[str, str] = {}
    for name, decimals in DECIMALS.items():
        higher_is_better = name in ("dice", "iou")
        values = column(run.evaluation.test["pooled"].get(name) for run in runs)
        values = values[~np.isnan(values)]
        if len(runs) > 1 and len(values) and (higher_is_better or distances):
            best[name] = format_number(values.max() if higher_is_better else values.min(), decimals)
    return best


def _panel_px(rows: int, budget: int) -> int:
    """Return the side of an example's panel, px, so that all fit into ``budget`` bytes."""
    bytes_per_pixel = 4 * 4 / 3  # RGB and weight, as base64
    return max(48, min(256, int(math.sqrt(max(budget, 0) / bytes_per_pixel / max(rows, 1)))))
