"""Curves over the rounds for the report: small figures of what ``history.jsonl`` says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from pipeline.results.pages import COLOURS, DASHES, GREY, Key, png_uri, style_axes

SOURCES = {"both agree": "#C9D1DA", "from SAM": "#0072B2", "from the client": "#E69F00"}
LOSSES = {"loss": "whole loss", "loss_sup": "labelled images"}
LOSSES |= {"loss_agree": "pseudo-labels", "loss_kd": "distillation"}
MAX_COLOURED_CLIENTS = 12  # beyond it a legend is no longer read
SERVER = Key("server", "#000000", "dashed")

_FAR_APART = 20  # ratio beyond which the smaller values would lie on the axis

History = Sequence[Mapping[str, Any]]  # the lines of history.jsonl
Values = NDArray[np.float64]  # nan where there is none


@dataclass(frozen=True)
class Panel:
    """One small figure (a data URI) and its legend."""

    title: str
    png: str
    keys: list[Key]


@dataclass(frozen=True)
class RunCurves:
    """A run's panels, those without data left out, and the legend that they share."""

    panels: list[Panel]
    clients: list[Key]  # empty where no panel has a line for each client


@dataclass(frozen=True)
class Curve:
    """A panel that a history may have data for."""

    title: str
    fields: tuple[str, ...]  # of a client; a panel of lines shows the first that was reported
    server: str = ""  # the same quantity of the server's model
    draw: Callable[[Axes, History, Curve], list[Key]] | None = None  # None: a line for each client
    lowest: bool = False  # whether a low value is the bad one
    share: bool = False  # whether values are in 0..1
    scale: float = 1.0  # of what is drawn
    log: bool = False  # whether the axis is logarithmic where values lie far apart


def run_curves(history: History, *, picture: Callable[[Figure], str] = png_uri) -> RunCurves:
    """Draw the diagnostics of one run: a panel for each quantity that a client reported.

    Args:
        history: entries of ``history.jsonl``; a client may be missing in a round's ``clients``.
        picture: makes a data URI of a figure.
    """
    panels = []
    shared: list[Key] = []
    names = clients_of(history)
    for curve in CURVES:
        if not any(np.isfinite(per_client(history, name)).any() for name in curve.fields):
            continue
        figure = Figure(figsize=(3.1, 2.2), layout="constrained")
        keys = (curve.draw or _draw_clients)(_round_axes(figure), history, curve)
        panels.append(Panel(curve.title, picture(figure), keys))
        if curve.draw is None and len(names) <= MAX_COLOURED_CLIENTS:
            shared = _line_keys(names)
    return RunCurves(panels, shared)


def validation_curves(
    histories: Mapping[str, History], *, picture: Callable[[Figure], str] = png_uri
) -> Panel | None:
    """Draw validation Dice by round, a line for each run by name; None where none was validated."""
    keys = _line_keys(list(histories))
    series = [column(entry["val"].get("dice") for entry in each) for each in histories.values()]
    if all(np.isnan(values).all() for values in series):
        return None
    figure = Figure(figsize=(9.2, 3.2), layout="constrained")
    axes = _round_axes(figure, ylabel="validation Dice")
    for history, key, values in zip(histories.values(), keys, series, strict=True):
        _line(axes, _rounds(history), values, key)
    return Panel("", picture(figure), keys)


def clients_of(history: History) -> list[str]:
    """Return the names, sorted, of all clients that took part in a round."""
    return sorted({name for entry in history for name in entry["clients"]})


def column(values: Iterable[float | None]) -> Values:
    """Return values as float64, nan (a gap in the curve) where there is none."""
    found = np.array([math.nan if value is None else value for value in values], np.float64)
    return np.where(np.isfinite(found), found, math.nan)


def per_client(history: History, name: str) -> Values:
    """Return (rounds, clients) of one diagnostic, nan where a client did not report it."""
    names = clients_of(history)
    rounds = (entry["clients"] for entry in history)
    rows = [column(clients.get(n, {}).get(name) for n in names) for clients in rounds]
    return np.array(rows).reshape(len(rows), len(names))


def _mean_over_clients(history: History, name: str) -> Values:
    """Return (rounds,): means weighted by the clients' images, over those that have a value."""
    values = np.ma.masked_invalid(per_client(history, name))
    images = np.nan_to_num(per_client(history, "images"), nan=1.0)
    means = np.ma.average(values, axis=1, weights=images)
    return np.asarray(np.ma.filled(means, math.nan), dtype=np.float64)


def _draw_losses(axes: Axes, history: History, curve: Curve) -> list[Key]:
    """Draw means over clients; a term that the method does not have is 0 throughout: left out."""
    keys = []
    for index, name in enumerate(curve.fields):
        values = _mean_over_clients(history, name)
        if np.nan_to_num(values).any():
            keys.append(Key(LOSSES[name], "#000000" if name == "loss" else COLOURS[index - 1]))
            _line(axes, _rounds(history), values, keys[-1])
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    return keys


def _draw_clients(axes: Axes, history: History, curve: Curve) -> list[Key]:
    """Draw a line per client, and the server's; with many clients only the worst has a colour.

    Returns:
        the keys beyond those that all panels of a run share.
    """
    names, rounds = clients_of(history), _rounds(history)
    every = (curve.scale * per_client(history, name) for name in curve.fields)
    values = next(found for found in every if np.isfinite(found).any())
    present = np.array([[name in entry["clients"] for name in names] for entry in history])
    keys, shown = _line_keys(names), []
    if len(names) > MAX_COLOURED_CLIENTS:
        worst, end = _worst(values, curve), "lowest" if curve.lowest else "highest"
        shown = [Key(f"{names[worst]} ({end} at the end)", COLOURS[1]), Key("others", GREY)]
        keys = [shown[int(index != worst)] for index in range(len(names))]
    for index in sorted(range(len(names)), key=lambda i: keys[i].colour != GREY):  # grey below
        there = present[:, index]  # a line passes over rounds that a client sat out
        _line(axes, rounds[there], values[there, index], keys[index])
    server = column((entry.get("server") or {}).get(curve.server) for entry in history)
    if np.isfinite(server).any():
        _line(axes, rounds, curve.scale * server, SERVER)
        shown = [*shown, SERVER]
    if curve.share:
        axes.set_ylim(-0.02, 1.02)
    elif curve.log and 0 < np.nanmin(values) < np.nanmax(values) / _FAR_APART:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    return shown


def _worst(values: Values, curve: Curve) -> int:
    """Return the client (column) whose last value is the worst."""
    sign = 1 if curve.lowest else -1
    ends = [next((sign * v for v in one[::-1] if v == v), math.inf) for one in values.T]
    return int(np.argmin(ends))


def _draw_sources(axes: Axes, history: History, _: Curve) -> list[Key]:
    """Draw stacked bars of means over clients: coverage = agreed + from SAM + from the client."""
    coverage, from_sam, from_client = (
        np.nan_to_num(_mean_over_clients(history, name))
        for name in ("coverage", "from_sam", "from_client")
    )
    agreed = np.clip(coverage - from_sam - from_client, 0, None)
    rounds, base = _rounds(history), np.zeros(len(coverage))
    width = 0.8 if len(rounds) <= 40 else 1.0  # gaps between many thin bars would only flicker
    for colour, part in zip(SOURCES.values(), (agreed, from_sam, from_client), strict=True):
        axes.bar(rounds, part, width, bottom=base, color=colour, linewidth=0)
        base = base + part
    axes.set_ylim(0, 1.02)
    return [Key(label, colour, area=True) for label, colour in SOURCES.items()]


def _rounds(history: History) -> NDArray[np.int64]:
    return np.array([entry["round"] for entry in history])


def _round_axes(figure: Figure, *, ylabel: str = "") -> Axes:
    axes = figure.add_subplot()
    style_axes(axes, xlabel="round", ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    return axes


def _line(axes: Axes, rounds: NDArray[np.int64], values: Values, key: Key) -> None:
    """Draw one value a round; the line breaks at nan."""
    marker = "o" if len(rounds) <= 15 else "none"  # one round has no line, only a point
    axes.plot(rounds, values, color=key.colour, ls=key.dash, lw=1.6, marker=marker, ms=3)


def _line_keys(names: Sequence[str]) -> list[Key]:
    """Return pairs of colour and dash that all differ up to 21 names."""
    n = len(COLOURS)
    return [Key(name, COLOURS[i % n], DASHES[i // n % 3]) for i, name in enumerate(names)]


#: What each says is in ``templates/report.html.j2``, by its title.
CURVES = (
    Curve("Loss", tuple(LOSSES), draw=_draw_losses),
    Curve("Foreground agreement (Dice of SAM and client)", ("agreement",), lowest=True, share=True),
    Curve("Coverage by source", ("coverage",), draw=_draw_sources),
    Curve("Pseudo-label Dice (audit)", ("pseudo_label_dice",), lowest=True, share=True),
    Curve("Gradient norm", ("gradient_norm",), log=True),
    Curve("Drift, % of the weights", ("drift",), scale=100.0),
    Curve("Fusion: loss on the public set", ("fusion_loss_seg", "fusion_loss"), "loss_seg"),
    Curve("Fusion: distance to the teacher (KL)", ("fusion_loss_kl",), "loss_kl"),
    Curve("Fusion: share of public images taught", ("fusion_counted",), "counted", share=True),
)
