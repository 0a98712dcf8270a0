"""Runs side by side as one self-contained HTML file: tables, curves, examples, parameters."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image

from pipeline.config import Config, NetworkConfig, load_config
from pipeline.disk import read_json
from pipeline.errors import DataError, StageError
from pipeline.results.curves import clients_of, column, per_client, run_curves, validation_curves
from pipeline.results.pages import (
    DASH,
    DECIMALS,
    class_keys,
    format_number,
    overlay,
    png_uri,
    render_page,
    thumbnail,
)

REPORT_BYTES = 1_900_000  # what curves, examples and parameters may take up
GALLERY_BYTES = 1_100_000  # of panels before compression, as base64


@dataclass(frozen=True)
class RunSummary:
    """One folder of ``cache/runs`` as read by :func:`load_run`."""

    name: str
    method: str
    params: str  # params.yaml as used
    config: Config  # the same, validated
    history: list[dict[str, Any]]  # one entry a round
    metrics: dict[str, Any]  # metrics.json
    models: tuple[str, ...] = ()  # clients, sorted, that have a model of their own


@dataclass(frozen=True)
class GalleryRow:
    """One example image; what is None is shown as a dash."""

    caption: str
    image: NDArray[np.uint8]  # (S, S, 3) RGB
    truth: NDArray[np.uint8] | None  # (S, S) class index, 0 = background
    sam: NDArray[np.uint8] | None  # (S, S) likewise
    client: NDArray[np.uint8]  # (S, S) likewise
    weight: NDArray[np.float32] | None  # (S, S) 0..1, how much a pixel's pseudo-label counts


@dataclass(frozen=True)
class _Column:
    """A column of the table of clients."""

    title: str
    field: str
    last: bool = False  # of the client's last round; else the mean over its rounds
    scale: float = 1.0  # of what is shown
    bar: bool = True  # whether the value is also shown as a bar


CLIENT_COLUMNS = (
    _Column("Seconds", "seconds"),
    _Column("MB up", "bytes_up", scale=1e-6),
    _Column("MB down", "bytes_down", scale=1e-6),
    _Column("Drift, %", "drift", scale=100.0),
    _Column("Agreement", "agreement", last=True),
    _Column("Kept", "coverage", last=True),
    _Column("Pseudo-label Dice", "pseudo_label_dice", last=True),
    _Column("Trust in SAM", "conflict_log_odds", last=True, bar=False),
)


def load_run(folder: Path) -> RunSummary:
    """Read ``params.yaml``, ``history.jsonl`` and ``metrics.json`` of one run.

    Raises:
        StageError: the run was not trained, or not evaluated, yet. ConfigError: its parameters are
        not what this version knows.
        DataError: a file is not what samfed writes.
    """
    for path in (folder / "history.jsonl", folder / "params.yaml"):
        if not path.is_file():
            raise StageError(f"{path}: not found; run `samfed federate` first")
    history = _read_history(folder / "history.jsonl")
    path = folder / "metrics.json"
    metrics = read_json(path, stage="evaluate")
    try:
        test, method = metrics["test"], str(metrics["method"])
        test["pooled"], test["clients"], test["client_mean"]
    except (KeyError, TypeError) as error:
        fault = f"no method and test metrics in it ({error})"
        raise DataError(f"{path}: {fault}; run `samfed evaluate` again") from error
    config = load_config(folder / "params.yaml")
    params = (folder / "params.yaml").read_text(encoding="utf-8")
    own = sorted(path.stem for path in (folder / "models").glob("*.safetensors"))
    models = tuple(own) if config.heterogeneous else ()
    return RunSummary(folder.name, method, params, config, history, metrics, models)


def render_report(runs: Sequence[RunSummary], gallery: Sequence[GalleryRow], *, title: str) -> str:
    """The report as HTML text.

    Args:
        runs: at least one, in the order of the tables.
        gallery: example images; may be empty.
        title: of the page.

    Raises:
        ValueError: there is no run, or a gallery row's arrays do not match.
    """
    if not runs:
        raise ValueError("no runs to report on; expected at least one")
    comparable = len({run.config.data.image_size for run in runs}) == 1
    contexts = [_run_context(run) for run in runs]
    validation = validation_curves({run.name: run.history for run in runs})
    panels = [panel for context in contexts for panel in context["curves"].panels]
    taken = sum(len(panel.png) for panel in panels) + sum(len(run.params) for run in runs)
    side = _panel_px(len(gallery), min(GALLERY_BYTES, REPORT_BYTES - taken))
    return render_page(
        "report.html.j2",
        title=title,
        gallery=[_gallery_context(row, side) for row in gallery],
        runs=contexts,
        best=_best(runs, distances=comparable),
        comparable=comparable,
        validation=validation,
        notes={panel.title: panel.note for panel in panels},
        gallery_keys=class_keys(
            mask for row in gallery for mask in (row.truth, row.sam, row.client)
        ),
    )


def _read_history(path: Path) -> list[dict[str, Any]]:
    history = []
    # Not splitlines: it also cuts at U+2028 and the like, which JSON allows within a string.
    for number, line in enumerate(path.read_bytes().rstrip().split(b"\n"), start=1):
        if not line:
            raise StageError(f"{path}: holds no round yet; run `samfed federate` first")
        try:
            entry = json.loads(line)
            entry["round"], entry["clients"], entry["val"]
        except (ValueError, KeyError, TypeError) as error:
            fault = f"line {number} is no round of a history ({error})"
            raise DataError(f"{path}: {fault}; run `samfed federate --restart`") from error
        history.append(entry)
    return history


def _run_context(run: RunSummary) -> dict[str, Any]:
    warnings: dict[str, list[int]] = {}
    for entry in run.history:
        for text in entry.get("warnings") or ():
            warnings.setdefault(text, []).append(entry["round"])
    curves = run_curves(run.history)
    return {
        **vars(run),
        **run.metrics["test"],
        "seed": run.metrics.get("seed", DASH),
        "rounds": run.metrics.get("rounds", len(run.history)),
        "seconds": sum(entry.get("seconds") or 0 for entry in run.history),
        "image_size": run.config.data.image_size,
        "setup": _setup(run),
        "warnings": warnings,
        "curves": curves,
        "table": _client_table(run) if run.history else None,
        "server_network": _describe(run.config.model) if _has_server_model(run) else None,
    }


def _setup(run: RunSummary) -> list[str]:
    """What sets the run apart from all clients' weights averaged in every round."""
    settings, found = run.config.federate, []
    if settings.clients_per_round is not None:
        count = len(_clients(run))
        found.append(f"{min(settings.clients_per_round, count)} of {count} clients a round")
    if settings.aggregation == "median":
        found.append("coordinate median")
    if run.config.heterogeneous:
        found.append("clients\N{RIGHT SINGLE QUOTATION MARK} own networks")
    return found


def _clients(run: RunSummary) -> list[str]:
    """Sorted, as a partition holds them; those that never took part too, where they are known."""
    return sorted({*run.models, *clients_of(run.history), *run.metrics["test"]["clients"]})


def _has_server_model(run: RunSummary) -> bool:
    return any(entry.get("server") for entry in run.history)


def _describe(network: NetworkConfig) -> str:
    return f"{network.architecture}, {network.encoder}, depth {network.encoder_depth}"


def _client_table(run: RunSummary) -> dict[str, Any]:
    """Each client's images, rounds, costs and last diagnostics; columns without data left out."""
    names, took_part = _clients(run), clients_of(run.history)
    present = np.isfinite(per_client(run.history, "images"))
    columns, cells = [], []
    for each in CLIENT_COLUMNS:
        values = each.scale * per_client(run.history, each.field)
        if np.isfinite(values).any():
            shown = _summarise(values, present, last=each.last)
            columns.append(each)
            cells.append(dict(zip(took_part, _cells(shown, each), strict=True)))
    images = dict(zip(took_part, per_client(run.history, "images").T, strict=True))
    counts = dict(zip(took_part, present.sum(axis=0), strict=True))
    missing = {"text": DASH, "bar": None}
    rows = [
        {
            "name": name,
            "network": _describe(run.config.network_of(i)) if run.config.heterogeneous else None,
            "images": format_number(np.nanmax(images[name]), 0) if name in images else DASH,
            "rounds": int(counts.get(name, 0)),
            "cells": [known.get(name, missing) for known in cells],
        }
        for i, name in enumerate(names)
    ]
    means = sum(not each.last for each in columns)
    return {
        "columns": [each.title for each in columns],
        "means": means,
        "lasts": len(columns) - means,
        "of": len(run.history),
        "rows": rows,
    }


def _summarise(
    values: NDArray[np.float64], present: NDArray[np.bool_], *, last: bool
) -> NDArray[np.float64]:
    """(clients,) of (rounds, clients): the value of the last round ``present``, or the mean."""
    if last:
        rounds = len(present) - 1 - np.argmax(present[::-1], axis=0)
        return np.asarray(np.take_along_axis(values, rounds[None], axis=0)[0])
    means = np.ma.masked_invalid(values).mean(axis=0)
    return np.asarray(np.ma.filled(means, math.nan), dtype=np.float64)


def _cells(values: NDArray[np.float64], each: _Column) -> list[dict[str, Any]]:
    """Text and bar (% of the cell) of one column, with about three digits for its largest value."""
    highest = float(np.nanmax(np.abs(values), initial=0.0))
    share = each.last and each.bar
    decimals = 2 if each.last else next((d for d in (0, 1, 2) if highest >= 10 ** (2 - d)), 3)
    full = 1.0 if share else highest
    return [
        {
            "text": format_number(value, decimals),
            "bar": round(100 * value / full) if each.bar and full and value == value else None,
        }
        for value in values.tolist()
    ]


def _best(runs: Sequence[RunSummary], *, distances: bool) -> dict[str, str]:
    """Per column the best value as it is printed, so that what looks equal is equally bold."""
    best: dict[str, str] = {}
    for name, decimals in DECIMALS.items():
        higher_is_better = name in ("dice", "iou")
        values = column(run.metrics["test"]["pooled"].get(name) for run in runs)
        values = values[~np.isnan(values)]
        if len(runs) > 1 and len(values) and (higher_is_better or distances):
            best[name] = format_number(values.max() if higher_is_better else values.min(), decimals)
    return best


def _panel_px(rows: int, budget: int) -> int:
    """Side of a gallery panel, px, so that all of them fit into ``budget`` bytes."""
    bytes_per_pixel = 4 * 4 / 3  # RGB and weight, as base64
    return max(48, min(256, int(math.sqrt(max(budget, 0) / bytes_per_pixel / max(rows, 1)))))


def _gallery_context(row: GalleryRow, side: int) -> dict[str, str | None]:
    """The row's panels as data URIs; masks are transparent overlays, so the image goes in once."""
    _check_row(row)
    side = min(side, len(row.image))
    overlays = {
        name: None if mask is None else overlay(mask, row.truth, side)
        for name, mask in (("truth", row.truth), ("sam", row.sam), ("client", row.client))
    }
    weight = None
    if row.weight is not None:
        levels = Image.fromarray(np.rint(row.weight * 255).astype(np.uint8))
        levels = levels.resize((side, side), Image.Resampling.BOX)
        levels.putpalette(colormaps["viridis"](np.arange(256), bytes=True)[:, :3].tobytes())
        weight = png_uri(levels)
    return {
        "caption": row.caption,
        "image": thumbnail(row.image, side),
        "weight": weight,
        **overlays,
    }


def _check_row(row: GalleryRow) -> None:
    side = len(row.image)
    expected: dict[str, tuple[Any, tuple[int, ...]]] = {
        "image": (np.uint8, (side, side, 3)),
        **dict.fromkeys(("truth", "sam", "client"), (np.uint8, (side, side))),
        "weight": (np.float32, (side, side)),
    }
    for name, (dtype, shape) in expected.items():
        panel = getattr(row, name)
        if panel is not None and (panel.dtype != dtype or panel.shape != shape):
            found, wanted = f"{panel.dtype} {panel.shape}", f"{dtype.__name__} {shape}"
            raise ValueError(f"gallery {name} is {found}; expected {wanted}")
    if row.weight is not None and not ((row.weight >= 0) & (row.weight <= 1)).all():
        raise ValueError("gallery weight holds values outside 0..1")
