"""Curves over the rounds for the report: small figures of what ``history.jsonl`` says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.results.colours import COLOURS, DASHES, GREY, SOURCES
from pipeline.results.pages import Key, finite, style_axes

LOSSES = {
    "loss": Key("whole loss", "#000000"),
    "loss_sup": Key("labelled images", COLOURS[0]),
    "loss_agree": Key("pseudo-labels", COLOURS[1]),
}
SERVER = Key("server", "#000000", "dashed")
MAX_COLOURED_CLIENTS = 12  # beyond it a legend is no longer read; the table of clients names them

History = Sequence[Mapping[str, Any]]  # the lines of history.jsonl


class Panel(NamedTuple):
    """One small figure and its legend."""

    title: str
    figure: Figure
    keys: list[Key]


def client_lines(axes: Axes, history: History, curve: Curve) -> list[Key]:
    """Draw a line for each client and the server's; return the keys that panels do not share."""
    for name, key in _client_keys(history).items():
        own = (entry["clients"].get(name, {}).get(curve.field) for entry in history)
        _line(axes, history, own, key, scale=curve.scale)
    server = ((entry.get("server") or {}).get(curve.server) for entry in history)
    keys = _line(axes, history, server, SERVER, scale=curve.scale)
    if curve.share:
        axes.set_ylim(-0.02, 1.02)
    else:
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    return keys


def _loss_lines(axes: Axes, history: History, _: Curve) -> list[Key]:
    """Draw means over clients; a term that the method does not have is 0 throughout: left out."""
    means = {key: _mean_over_clients(history, name) for name, key in LOSSES.items()}
    keys = [
        k for k, mean in means.items() if any(finite(mean)) for k in _line(axes, history, mean, k)
    ]
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    return keys


def _source_bars(axes: Axes, history: History, _: Curve) -> list[Key]:
    """Draw stacked bars of means over clients: coverage = agreed + from SAM + from the client."""
    coverage, from_sam, from_client = (
        np.nan_to_num(_mean_over_clients(history, name))
        for name in ("coverage", "from_sam", "from_client")
    )
    agreed = np.clip(coverage - from_sam - from_client, 0, None)
    rounds, base = [entry["round"] for entry in history], np.zeros(len(history))
    width = 0.8 if len(rounds) <= 40 else 1.0  # gaps between many thin bars would only flicker
    for colour, part in zip(SOURCES.values(), (agreed, from_sam, from_client), strict=True):
        axes.bar(rounds, part, width, bottom=base, color=colour, linewidth=0)
        base = base + part
    axes.set_ylim(0, 1.02)
    return [Key(label, colour, area=True) for label, colour in SOURCES.items()]


class Curve(NamedTuple):
    """A panel that a history may have data for."""

    title: str
    field: str  # of a client; without any value there is no panel
    server: str = ""  # the same quantity of the server's model
    scale: float = 1.0  # of what is drawn
    share: bool = False  # whether values are in 0..1
    draw: Callable[[Axes, History, Curve], list[Key]] = client_lines  # returns the legend


#: What each says is in ``templates/report.html.j2``, by its title.
CURVES = (
    Curve("Loss", "loss", draw=_loss_lines),
    Curve("Foreground agreement (Dice of SAM and client)", "agreement", share=True),
    Curve("Coverage by source", "coverage", draw=_source_bars),
    Curve("Pseudo-label Dice (audit)", "pseudo_label_dice", share=True),
    Curve("Gradient norm", "gradient_norm"),
    Curve("Drift, % of the weights", "drift", scale=100.0),
    Curve("Fusion: loss on the public set", "fusion_loss", "loss"),
    Curve("Fusion: distance to the teacher (KL)", "fusion_loss_kl", "loss_kl"),
    Curve("Fusion: share of public images taught", "fusion_counted", "counted", share=True),
)


def run_curves(history: History) -> tuple[list[Panel], list[Key]]:
    """Draw the diagnostics of one run: a panel for each quantity that a client reported.

    Args:
        history: entries of ``history.jsonl``; a client may be missing in a round's ``clients``.

    Returns:
        The panels, and the legend that those with a line for each client share.
    """
    panels, shared = [], list[Key]()
    clients = [client for entry in history for client in entry["clients"].values()]
    for curve in CURVES:
        if finite(client.get(curve.field) for client in clients):
            figure = Figure(figsize=(3.1, 2.2), layout="constrained")
            panels.append(Panel(curve.title, figure, curve.draw(_axes(figure), history, curve)))
            if curve.draw is client_lines:
                shared = list(dict.fromkeys(_client_keys(history).values()))
    return panels, shared


def validation_curves(histories: Mapping[str, History]) -> Panel | None:
    """Draw validation Dice by round, a line for each run by name; None where none was validated."""
    figure = Figure(figsize=(9.2, 3.2), layout="constrained")
    axes = _axes(figure, ylabel="validation Dice")
    keys = []
    for key, history in zip(line_keys(histories), histories.values(), strict=True):
        keys += _line(axes, history, (entry["val"].get("dice") for entry in history), key)
    return Panel("", figure, keys) if keys else None


def _axes(figure: Figure, *, ylabel: str = "") -> Axes:
    axes = figure.add_subplot()
    style_axes(axes, xlabel="round", ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    return axes


def _line(
    axes: Axes, history: History, values: Iterable[float | None], key: Key, *, scale: float = 1.0
) -> list[Key]:
    """Draw a value for each round; pass over rounds without one. Return the key if there is any."""
    points = [(e["round"], v) for e, v in zip(history, values, strict=True) if finite([v])]
    if points:
        rounds, drawn = np.array(points, np.float64).T
        marker = "o" if len(points) <= 15 else "none"  # one round has no line, only a point
        axes.plot(rounds, scale * drawn, color=key.colour, ls=key.dash, lw=1.6, marker=marker, ms=3)
    return [key] if points else []


def line_keys(names: Iterable[str]) -> list[Key]:
    """Return pairs of colour and dash that all differ up to 21 names."""
    n = len(COLOURS)
    return [Key(name, COLOURS[i % n], DASHES[i // n % 3]) for i, name in enumerate(names)]


def _client_keys(history: History) -> dict[str, Key]:
    """Return the key of each client that took part in a round, by name; all grey if many."""
    names = sorted({name for entry in history for name in entry["clients"]})
    if len(names) > MAX_COLOURED_CLIENTS:
        return dict.fromkeys(names, Key("each client", GREY))
    return dict(zip(names, line_keys(names), strict=True))


def _mean_over_clients(history: History, name: str) -> list[float]:
    """Return means by round, weighted by the clients' images; nan where no client has a value."""
    means = []
    for entry in history:
        told = [client for client in entry["clients"].values() if finite([client.get(name)])]
        images = [client["images"] for client in told]
        mean = np.average([client[name] for client in told], weights=images) if told else math.nan
        means.append(float(mean))
    return means


def reliability_plot(bins: Mapping[Key, Mapping[str, list[Any]]]) -> Figure:
    """Draw accuracy over confidence on the left, each bin's share of the pixels on the right."""
    figure = Figure(figsize=(9.2, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    style_axes(left, xlabel="confidence", ylabel="share of pixels that are right")
    style_axes(right, xlabel="confidence", ylabel="share of pixels (log scale)")
    right.set_yscale("log")
    left.plot([0, 1], [0, 1], color=GREY, lw=1.2)
    for key, of in bins.items():
        pixels = np.array(of["pixels"])
        filled = pixels > 0
        confidence, accuracy = (
            np.array(of[name], np.float64)[filled] for name in ("confidence", "accuracy")
        )
        style = {"color": key.colour, "ls": key.dash, "lw": 1.6, "marker": "o", "ms": 3.5}
        left.plot(confidence, accuracy, **style)
        right.plot(confidence, (pixels / pixels.sum())[filled], **style)
    left.set(xlim=(0, 1.02), ylim=(0, 1.02))
    right.set_xlim(0, 1.02)
    return figure
