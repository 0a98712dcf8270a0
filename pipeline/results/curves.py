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

SHARES = {"both agree": "#C9D1DA", "from SAM": "#0072B2", "from the client": "#E69F00"}
LOSSES = {"loss": "whole loss", "loss_sup": "labelled images"}
LOSSES |= {"loss_agree": "pseudo-labels", "loss_kd": "distillation"}
MAX_COLOURED_CLIENTS = 12  # beyond it a legend is no longer read
_FAR_APART = 20  # ratio beyond which the smaller values would lie on the axis
SERVER = Key("server", "#000000", "dashed")

History = Sequence[Mapping[str, Any]]  # the lines of history.jsonl


@dataclass(frozen=True)
class Panel:
    """One small figure (a data URI), its legend, and a sentence on how to read it."""

    title: str
    note: str
    png: str
    keys: list[Key]


@dataclass(frozen=True)
class RunCurves:
    """A run's panels, those without data left out, and the legend that they share."""

    panels: list[Panel]
    clients: list[Key]  # empty where no panel has a line for each client


@dataclass(frozen=True)
class _Known:
    """A panel that a history may have data for."""

    title: str
    note: str
    fields: tuple[str, ...]  # of a client; a panel of lines shows the first that was reported
    draw: Callable[[Axes, History, _Known], list[Key]]
    server: str = ""  # the same quantity of the server's model
    lowest: bool = False  # whether a low value is the bad one
    share: bool = False  # whether values are in 0..1
    scale: float = 1.0  # of what is drawn
    log: bool = False  # whether the axis is logarithmic where values lie far apart


def run_curves(history: History) -> RunCurves:
    """The diagnostics of one run: a panel for each quantity that a client reported.

    Args:
        history: entries of ``history.jsonl``; a client may be missing in a round's ``clients``.
    """
    panels = []
    shared: list[Key] = []
    for known in KNOWN:
        if not any(np.isfinite(per_client(history, name)).any() for name in known.fields):
            continue
        figure = Figure(figsize=(3.1, 2.2), layout="constrained")
        keys = known.draw(_round_axes(figure), history, known)
        panels.append(Panel(known.title, known.note, png_uri(figure), keys))
        if known.draw is _draw_clients and len(clients_of(history)) <= MAX_COLOURED_CLIENTS:
            shared = _line_keys(clients_of(history))
    return RunCurves(panels, shared)


def validation_curves(histories: Mapping[str, History]) -> Panel | None:
    """Validation Dice by round, a line for each run by name; None where none was validated."""
    keys = _line_keys(list(histories))
    series = [column(entry["val"].get("dice") for entry in each) for each in histories.values()]
    if all(np.isnan(values).all() for values in series):
        return None
    figure = Figure(figsize=(9.2, 3.2), layout="constrained")
    axes = _round_axes(figure, ylabel="validation Dice")
    for history, key, values in zip(histories.values(), keys, series, strict=True):
        _line(axes, history, values, key)
    return Panel("", "", png_uri(figure), keys)


def clients_of(history: History) -> list[str]:
    """Names, sorted, of all clients that took part in a round."""
    return sorted({name for entry in history for name in entry["clients"]})


def column(values: Iterable[float | None]) -> NDArray[np.float64]:
    """Values as float64, nan (a gap in the curve) where there is none."""
    found = np.array([math.nan if value is None else value for value in values], np.float64)
    return np.where(np.isfinite(found), found, math.nan)


def per_client(history: History, name: str) -> NDArray[np.float64]:
    """(rounds, clients) of one diagnostic, nan where a client did not report it."""
    names = clients_of(history)
    rounds = (entry["clients"] for entry in history)
    rows = [column(clients.get(n, {}).get(name) for n in names) for clients in rounds]
    return np.array(rows).reshape(len(rows), len(names))


def _mean_over_clients(history: History, name: str) -> NDArray[np.float64]:
    """(rounds,) mean weighted by the clients' images, over those that reported ``name``."""
    values = np.ma.masked_invalid(per_client(history, name))
    images = np.nan_to_num(per_client(history, "images"), nan=1.0)
    means = np.ma.average(values, axis=1, weights=images)
    return np.asarray(np.ma.filled(means, math.nan), dtype=np.float64)


def _draw_losses(axes: Axes, history: History, known: _Known) -> list[Key]:
    """Means over clients; a term that the method does not have is 0 throughout, and left out."""
    keys = []
    for index, name in enumerate(known.fields):
        values = _mean_over_clients(history, name)
        if not np.nan_to_num(values).any():
            continue
        key = Key(LOSSES[name], "#000000" if name == "loss" else COLOURS[index - 1])
        _line(axes, history, values, key)
        keys.append(key)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    return keys


def _draw_clients(axes: Axes, history: History, known: _Known) -> list[Key]:
    """A line per client, and the server's; with many clients only the worst has a colour.

    Returns:
        the keys beyond those that all panels of a run share.
    """
    names = clients_of(history)
    values = next(
        found
        for found in (known.scale * per_client(history, name) for name in known.fields)
        if np.isfinite(found).any()
    )
    present = np.array([[name in entry["clients"] for name in names] for entry in history])
    keys, shown = _line_keys(names), []
    if len(names) > MAX_COLOURED_CLIENTS:
        worst, end = _worst(values, known), "lowest" if known.lowest else "highest"
        shown = [Key(f"{names[worst]} ({end} at the end)", COLOURS[1]), Key("others", GREY)]
        keys = [shown[int(index != worst)] for index in range(len(names))]
    for index in sorted(range(len(names)), key=lambda i: keys[i].colour != GREY):  # grey below
        _line(axes, history, values[:, index], keys[index], present=present[:, index])
    server = column((entry.get("server") or {}).get(known.server) for entry in history)
    if np.isfinite(server).any():
        _line(axes, history, known.scale * server, SERVER)
        shown = [*shown, SERVER]
    if known.share:
        axes.set_ylim(-0.02, 1.02)
    elif known.log and 0 < np.nanmin(values) < np.nanmax(values) / _FAR_APART:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    return shown


def _worst(values: NDArray[np.float64], known: _Known) -> int:
    """The client (column) whose last value is the worst."""
    sign = 1 if known.lowest else -1
    ends = [next((sign * v for v in one[::-1] if v == v), math.inf) for one in values.T]
    return int(np.argmin(ends))


def _draw_shares(axes: Axes, history: History, _: _Known) -> list[Key]:
    """Stacked bars of the mean over clients: kept = agreed + from SAM + from the client."""
    kept, from_sam, from_client = (
        np.nan_to_num(_mean_over_clients(history, name))
        for name in ("coverage", "from_sam", "from_client")
    )
    agreed = np.clip(kept - from_sam - from_client, 0, None)
    rounds, base = [entry["round"] for entry in history], np.zeros(len(kept))
    width = 0.8 if len(rounds) <= 40 else 1.0  # gaps between many thin bars would only flicker
    for colour, part in zip(SHARES.values(), (agreed, from_sam, from_client), strict=True):
        axes.bar(rounds, part, width, bottom=base, color=colour, linewidth=0)
        base = base + part
    axes.set_ylim(0, 1.02)
    return [Key(label, colour, area=True) for label, colour in SHARES.items()]


def _round_axes(figure: Figure, *, ylabel: str = "") -> Axes:
    axes = figure.add_subplot()
    style_axes(axes, xlabel="round", ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    return axes


def _line(
    axes: Axes,
    history: History,
    values: NDArray[np.float64],
    key: Key,
    *,
    present: NDArray[np.bool_] | None = None,
) -> None:
    """One value a round; a line passes over rounds not ``present``, and breaks at nan."""
    rounds = np.array([entry["round"] for entry in history])
    if present is not None:
        rounds, values = rounds[present], values[present]
    marker = "o" if len(rounds) <= 15 else "none"  # one round has no line, only a point
    axes.plot(rounds, values, color=key.colour, ls=key.dash, lw=1.6, marker=marker, ms=3)


def _line_keys(names: Sequence[str]) -> list[Key]:
    """Pairs of colour and dash that all differ up to 21 names."""
    n = len(COLOURS)
    return [Key(name, COLOURS[i % n], DASHES[i // n % 3]) for i, name in enumerate(names)]


KNOWN = (
    _Known(
        "Loss",
        "What training makes small, as the mean over clients, and its parts before they are "
        "weighted.",
        tuple(LOSSES),
        _draw_losses,
    ),
    _Known(
        "Foreground agreement (Dice of SAM and client)",
        "How well SAM's mask and the client's own prediction overlap, from 0 to 1; near 0, one of "
        "the two finds little or something else, and the method has little to go by.",
        ("agreement",),
        _draw_clients,
        lowest=True,
        share=True,
    ),
    _Known(
        "Share of pixels kept, by source",
        "How much of the clients' images gets a training label, as the mean over clients. Where "
        "both agree, that is the label; where they do not, it comes from the source that is "
        "believed, and what is missing up to 1 is left out as too doubtful. Most pixels are "
        "background, on which both agree easily.",
        ("coverage",),
        _draw_shares,
    ),
    _Known(
        "Pseudo-label Dice (audit)",
        "The kept pseudo-labels against the true masks, which training never sees. A client whose "
        "line is low learns from wrong labels.",
        ("pseudo_label_dice",),
        _draw_clients,
        lowest=True,
        share=True,
    ),
    _Known(
        "Gradient norm",
        "Mean over a round's steps, before clipping. One client far above the others, or a norm "
        "that grows, speaks for a lower learning rate.",
        ("gradient_norm",),
        _draw_clients,
        log=True,
    ),
    _Known(
        "Drift, % of the weights",
        "How far a client's update moves the weights that it started from. A client that drifts "
        "pulls the shared model its own way.",
        ("drift",),
        _draw_clients,
        scale=100.0,
    ),
    _Known(
        "Fusion: loss on the public set",
        "What the server's model (condensation) and then each client's (fusion) is trained on; "
        "under fedmd the distance to the mean of the clients' predictions.",
        ("fusion_loss_seg", "fusion_loss"),
        _draw_clients,
        server="loss_seg",
    ),
    _Known(
        "Fusion: distance to the teacher (KL)",
        "How far the server's model is from the best client of each public image, and each client "
        "from the server.",
        ("fusion_loss_kl",),
        _draw_clients,
        server="loss_kl",
    ),
    _Known(
        "Fusion: share of public images taught",
        "Images on which the best client surpasses the server, or the server the client; only on "
        "these one learns from the other.",
        ("fusion_counted",),
        _draw_clients,
        server="counted",
        share=True,
    ),
)
