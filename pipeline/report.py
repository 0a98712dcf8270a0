"""Runs side by side as one self-contained HTML file: tables, curves, examples, parameters."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import DataError, StageError
from pipeline.files import read_json
from pipeline.pages import (
    COLOURS,
    DASH,
    DASHES,
    DECIMALS,
    GREY,
    Key,
    class_keys,
    format_number,
    overlay,
    png_uri,
    render_page,
    style_axes,
    thumbnail,
)

SHARES = {"both agree": "#C9D1DA", "from SAM": "#0072B2", "from the client": "#E69F00"}
LOSSES = {"loss": "whole loss", "loss_sup": "labelled images"}
LOSSES |= {"loss_agree": "pseudo-labels", "loss_kd": "distillation"}
MAX_COLOURED_CLIENTS = 12  # beyond it a legend is no longer read
GALLERY_BYTES = 1_100_000  # of panels before compression, as base64; keeps a report under 2 MB


@dataclass(frozen=True)
class RunSummary:
    """One folder of ``cache/runs`` as read by :func:`load_run`."""

    name: str
    method: str
    params: str  # params.yaml as used
    history: list[dict[str, Any]]  # one entry a round
    metrics: dict[str, Any]  # metrics.json


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
class Curves:
    """A figure (a data URI) and, for each of its panels, the title and the legend."""

    png: str
    panels: list[tuple[str, list[Key]]]


def load_run(folder: Path) -> RunSummary:
    """Read ``params.yaml``, ``history.jsonl`` and ``metrics.json`` of one run.

    Raises:
        StageError: the run was not trained, or not evaluated, yet.
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
    params = (folder / "params.yaml").read_text(encoding="utf-8")
    return RunSummary(folder.name, method, params, history, metrics)


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
    comparable = len({_image_size(run) for run in runs}) == 1
    return render_page(
        "report.html.j2",
        title=title,
        gallery=[_gallery_context(row, _panel_px(len(gallery))) for row in gallery],
        runs=[_run_context(run) for run in runs],
        best=_best(runs, distances=comparable),
        comparable=comparable,
        validation=_validation_curves(runs),
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
    return {
        **vars(run),
        **run.metrics["test"],
        "seed": run.metrics.get("seed", DASH),
        "rounds": run.metrics.get("rounds", len(run.history)),
        "seconds": sum(entry.get("seconds") or 0 for entry in run.history),
        "image_size": _image_size(run),
        "warnings": warnings,
        "curves": _run_curves(run),
    }


def _image_size(run: RunSummary) -> int | None:
    """``data.image_size`` in px: the unit of the run's distances. None where it is not given."""
    found = re.search(r"^[^#\n]*\bimage_size: *(\d+)", run.params, re.MULTILINE)
    return int(found[1]) if found else None


def _best(runs: Sequence[RunSummary], *, distances: bool) -> dict[str, str]:
    """Per column the best value as it is printed, so that what looks equal is equally bold."""
    best: dict[str, str] = {}
    for name, decimals in DECIMALS.items():
        higher_is_better = name in ("dice", "iou")
        values = _column(run.metrics["test"]["pooled"].get(name) for run in runs)
        values = values[~np.isnan(values)]
        if len(runs) > 1 and len(values) and (higher_is_better or distances):
            best[name] = format_number(values.max() if higher_is_better else values.min(), decimals)
    return best


def _validation_curves(runs: Sequence[RunSummary]) -> Curves | None:
    keys = _line_keys([run.name for run in runs])
    series = [_column(entry["val"].get("dice") for entry in run.history) for run in runs]
    if all(np.isnan(values).all() for values in series):
        return None
    figure = Figure(figsize=(9.2, 3.2), layout="constrained")
    axes = _round_axes(figure, columns=1, index=1, ylabel="validation Dice")
    for run, key, values in zip(runs, keys, series, strict=True):
        _line(axes, run, values, key)
    return Curves(png_uri(figure), [("", keys)])


def _run_curves(run: RunSummary) -> Curves | None:
    """Small multiples of one run's diagnostics; panels without data are left out."""
    known: list[tuple[str, tuple[str, ...], Callable[[Axes, RunSummary], list[Key]]]] = [
        ("Loss", tuple(LOSSES), _draw_losses),
        ("Foreground agreement (Dice of SAM and client)", ("agreement",), _draw_agreement),
        ("Share of pixels kept, by source", ("kept",), _draw_shares),
    ]
    panels = [p for p in known if any(np.isfinite(_per_client(run, f)).any() for f in p[1])]
    if not panels:
        return None
    figure, legends = Figure(figsize=(9.2, 2.5), layout="constrained"), []
    for index, (title, _, draw) in enumerate(panels, start=1):
        legends.append((title, draw(_round_axes(figure, columns=3, index=index), run)))
    return Curves(png_uri(figure), legends)


def _draw_losses(axes: Axes, run: RunSummary) -> list[Key]:
    keys = []
    for index, (field, label) in enumerate(LOSSES.items()):
        values = _mean_over_clients(run, field)
        if np.isnan(values).all():
            continue
        key = Key(label, "#000000" if field == "loss" else COLOURS[index - 1])
        _line(axes, run, values, key)
        keys.append(key)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    return keys


def _draw_agreement(axes: Axes, run: RunSummary) -> list[Key]:
    """A line per client; with many clients only the one that ends lowest has a colour."""
    names, values = _clients(run), _per_client(run, "agreement")
    keys = shown = _line_keys(names)
    if len(names) > MAX_COLOURED_CLIENTS:
        ends = [next((v for v in column[::-1] if v == v), math.inf) for column in values.T]
        lowest = int(np.argmin(ends))
        shown = [Key(f"{names[lowest]} (lowest at the end)", COLOURS[1]), Key("others", GREY)]
        keys = [shown[int(index != lowest)] for index in range(len(names))]
    for index in sorted(range(len(names)), key=lambda i: keys[i].colour != GREY):  # grey below
        _line(axes, run, values[:, index], keys[index])
    axes.set_ylim(0, 1.02)
    return shown


def _draw_shares(axes: Axes, run: RunSummary) -> list[Key]:
    """Stacked bars of the mean over clients: kept = agreed + from SAM + from the client."""
    kept, from_sam, from_client = (
        np.nan_to_num(_mean_over_clients(run, name)) for name in ("kept", "from_sam", "from_client")
    )
    agreed = np.clip(kept - from_sam - from_client, 0, None)
    rounds, base = [entry["round"] for entry in run.history], np.zeros(len(kept))
    width = 0.8 if len(rounds) <= 40 else 1.0  # gaps between many thin bars would only flicker
    for colour, part in zip(SHARES.values(), (agreed, from_sam, from_client), strict=True):
        axes.bar(rounds, part, width, bottom=base, color=colour, linewidth=0)
        base = base + part
    axes.set_ylim(0, 1.02)
    return [Key(label, colour, area=True) for label, colour in SHARES.items()]


def _round_axes(figure: Figure, *, columns: int, index: int, ylabel: str = "") -> Axes:
    axes = figure.add_subplot(1, columns, index)
    style_axes(axes, xlabel="round", ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    return axes


def _line(axes: Axes, run: RunSummary, values: NDArray[np.float64], key: Key) -> None:
    rounds = [entry["round"] for entry in run.history]
    marker = "o" if len(rounds) <= 15 else "none"  # one round has no line, only a point
    axes.plot(rounds, values, color=key.colour, ls=key.dash, lw=1.6, marker=marker, ms=3)


def _line_keys(names: Sequence[str]) -> list[Key]:
    """Pairs of colour and dash that all differ up to 21 names."""
    n = len(COLOURS)
    return [Key(name, COLOURS[i % n], DASHES[i // n % 3]) for i, name in enumerate(names)]


def _clients(run: RunSummary) -> list[str]:
    return sorted({name for entry in run.history for name in entry["clients"]})


def _column(values: Iterable[float | None]) -> NDArray[np.float64]:
    """Values as float64, nan (a gap in the curve) where there is none."""
    column = np.array([math.nan if value is None else value for value in values], np.float64)
    return np.where(np.isfinite(column), column, math.nan)


def _per_client(run: RunSummary, field: str) -> NDArray[np.float64]:
    """(rounds, clients) of one diagnostic, nan where a client did not report it."""
    names = _clients(run)
    rounds = (entry["clients"] for entry in run.history)
    rows = [_column(clients.get(n, {}).get(field) for n in names) for clients in rounds]
    return np.array(rows).reshape(len(rows), len(names))


def _mean_over_clients(run: RunSummary, field: str) -> NDArray[np.float64]:
    """(rounds,) mean weighted by the clients' images, over those that reported ``field``."""
    values = np.ma.masked_invalid(_per_client(run, field))
    images = np.nan_to_num(_per_client(run, "images"), nan=1.0)
    means = np.ma.average(values, axis=1, weights=images)
    return np.asarray(np.ma.filled(means, math.nan), dtype=np.float64)


def _panel_px(rows: int) -> int:
    """Side of a gallery panel, px, so that all of them fit the report's size."""
    bytes_per_pixel = 4 * 4 / 3  # RGB and weight, as base64
    return max(48, min(256, int(math.sqrt(GALLERY_BYTES / bytes_per_pixel / max(rows, 1)))))


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
