"""Warnings that name a client or its link, and a round in a few words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, median
from typing import Any

from pipeline.config import Config
from pipeline.federation.agreement import is_harm
from pipeline.federation.messages import ClientEntry
from pipeline.methods import METHODS

LEAST_LINK_SECONDS = 10.0  # a round; a shorter wait is no reason to change anything
FEWEST_TO_COMPARE = 3  # clients: a median of two says nothing of either

Entry = dict[str, Any]


def quality_warnings(config: Config, entries: Sequence[ClientEntry]) -> list[str]:
    """Name the clients on whose mirrored images SAM contradicted itself in stage one.

    Nobody is named where SAM was trained without mirrored images.
    """
    if config.augment.flips == "none":
        return []
    limit = config.precompute.warn_consistency
    return [
        f"{entry.name}: SAM is inconsistent, its labels of mirrored images have Dice "
        f"{entry.flip_dice:.2f}, below {limit:.2f}"
        for entry in entries
        if entry.flip_dice is not None and entry.flip_dice < limit
    ]


def first_told(found: dict[str, str], history: Sequence[Entry]) -> list[str]:
    """Return the warnings that no earlier round gave: each once a run, client and kind.

    Args:
        found: warnings by how they begin, which names client and kind.
    """
    told = [text for entry in history for text in entry["warnings"]]
    return [text for start, text in found.items() if not any(t.startswith(start) for t in told)]


def client_warnings(config: Config, name: str, entry: Entry) -> dict[str, str]:
    """Warn of poor agreement, few kept pixels and unused labels; by how the warnings begin."""
    found = {}
    if METHODS[config.federate.method].uses_agreement:
        for key, limit, meaning in (
            ("agreement", config.agreement.warn_agreement, "foreground Dice of SAM and client"),
            ("coverage", config.agreement.warn_coverage, "share of pixels kept"),
        ):
            value = entry.get(key)
            if value is not None and value < limit:
                start = f"{name}: {meaning} is"
                found[start] = f"{start} {value:.2f}, below {limit:.2f}"
        if config.agreement.rule == "adaptive":  # the others have no guard
            found |= _unused_labels(config, name, entry)
    return found


def _unused_labels(config: Config, name: str, entry: Entry) -> dict[str, str]:
    """Name the classes whose labels do harm by the calibration part, and so are not used.

    All clients measure the same where they share a model, so that one warning is for all.
    """
    found, whose = {}, f"{name}: " if config.heterogeneous else ""
    for number, title in enumerate(config.data.classes, start=1):
        keys = (f"{what}_{number}" for what in ("target_gain", "target_dice", "model_dice"))
        gain, target, model = map(entry.get, keys)
        if gain is None or target is None or model is None:
            continue
        if is_harm(gain):
            start = f"{whose}labels of {title} with the help of {config.sam.variant} are not used"
            found[start] = (
                f"{start}: their Dice is {target:.2f} on the calibration part, and "
                f"{model:.2f} that of the model alone"
            )
    return found


def link_warnings(config: Config, clients: dict[str, Entry]) -> list[str]:
    """Say, once a run, that a link would keep clients waiting longer than computing does.

    It says nothing of seconds for which nobody would change a setting.
    """
    link, slow = config.federate.link_mbit, dict[str, float]()
    for name, entry in clients.items():
        seconds = (entry["bytes_up"] + entry["bytes_down"]) * 8e-6 / link
        if seconds > max(entry["seconds"], LEAST_LINK_SECONDS):
            slow[name] = seconds
    if not slow:
        return []
    name = max(slow, key=slow.__getitem__)
    packs = config.heterogeneous or config.federate.compression != "none"
    advice = "raise federate.local_steps" + ("" if packs else ", or set federate.compression")
    return [
        f"on a link of {link:g} Mbit/s (federate.link_mbit) {len(slow)} of {len(clients)} clients "
        f"would wait longer than they compute, e.g. {name} {slow[name]:.0f} s a round, computing "
        f"{clients[name]['seconds']:.0f} s; {advice}"
    ]


def round_warnings(config: Config, clients: dict[str, Entry]) -> dict[str, str]:
    """Name the clients that changed their model far more than the median client did.

    The warnings go by how they begin.
    """
    found = {name: entry.get("drift") for name, entry in clients.items()}
    drifts = {name: value for name, value in found.items() if value is not None}
    known = [value for value in drifts.values() if math.isfinite(value)]
    if len(known) < FEWEST_TO_COMPARE:
        return {}
    usual, limit = median(known), config.federate.warn_drift
    return {
        f"{name}: drifts": f"{name}: drifts, it changed the model by {value:.1%}, more than "
        f"{limit:g} times the median client's {usual:.1%}"
        for name, value in drifts.items()
        if value > limit * usual
    }


def round_note(entry: Entry) -> str:
    """Return a round in a few words for a progress display: means over its clients."""
    shown = [("Dice", entry["val"]["dice"])]
    for key in ("agreement", "coverage", "pseudo_label_dice"):
        values = [c[key] for c in entry["clients"].values() if c.get(key) is not None]
        shown.append((key.replace("_", " "), mean(values) if values else None))
    return ", ".join(f"{name} {value:.2f}" for name, value in shown if value is not None)
