"""Warnings that name a client or its link, and a round in a few words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from statistics import mean, median
from typing import Any

from pipeline.config import Config
from pipeline.doubts import LOOK, Doubt, below
from pipeline.federation.agreement import is_harm
from pipeline.methods import METHODS

LEAST_LINK_SECONDS = 10.0  # a round; a shorter wait is no reason to change anything
FEWEST_TO_COMPARE = 3  # clients: a median of two says nothing of either

Entry = dict[str, Any]


def client_doubts(config: Config, reports: Mapping[str, Entry]) -> list[Doubt]:
    """Doubt labels of clients with poor agreement or few kept pixels, and classes not used."""
    if not METHODS[config.federate.method].uses_agreement:
        return []
    limits, found = config.agreement, list[Doubt]()
    checks = [("agreement", limits.warn_agreement, "foreground Dice of SAM and client", LOOK)]
    if limits.rule != "adaptive":  # which leaves out what the guard does, and says so
        keep = "another agreement.rule keeps more, or a lower agreement.threshold if it has one"
        checks.append(("coverage", limits.warn_coverage, "share of pixels kept", keep))
    for key, limit, meaning, advice in checks:
        poor = {
            name: below(entry[key])
            for name, entry in reports.items()
            if entry.get(key) is not None and entry[key] < limit
        }
        if poor:
            found.append(Doubt(f"{meaning} is below {limit:.2f}", poor, advice))
    if limits.rule == "adaptive":  # the others have no guard
        found += _unused_labels(config, reports)
    return found


def _unused_labels(config: Config, reports: Mapping[str, Entry]) -> Iterator[Doubt]:
    """Name the classes whose labels do harm by the calibration part, and so are not used.

    All clients measure the same where they share a model, so that one warning is for all.
    """
    for number, title in enumerate(config.data.classes, start=1):
        keys = [f"{what}_{number}" for what in ("target_gain", "target_dice", "model_dice")]
        harm = {}
        for name, entry in reports.items():
            gain, target, model = map(entry.get, keys)
            if gain is not None and None not in (target, model) and is_harm(gain):
                harm[name] = target, model
        if not harm:
            continue
        pairs = {
            name: f"Dice {ours:.2f}, the model {alone:.2f}" for name, (ours, alone) in harm.items()
        }
        if not config.heterogeneous:
            pairs = {"all clients": next(iter(pairs.values()))}
        what = (
            f"labels of {title} are not used, as on the calibration part targets made with the "
            f"help of {config.sam.variant} are worse than the model alone"
        )
        yield Doubt(what, pairs, "a better teacher would help, see `samfed evaluate-sam`")


def link_warnings(config: Config, clients: Mapping[str, Entry]) -> list[str]:
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


def drifts(config: Config, reports: Mapping[str, Entry]) -> list[Doubt]:
    """Name the clients that changed their model far more than the median client did."""
    changes = {name: entry.get("drift") for name, entry in reports.items()}
    known = {name: value for name, value in changes.items() if value is not None}
    finite = [value for value in known.values() if math.isfinite(value)]
    if len(finite) < FEWEST_TO_COMPARE:
        return []
    usual, limit = median(finite), config.federate.warn_drift
    found = {name: f"{value:.1%}" for name, value in known.items() if value > limit * usual}
    if not found:
        return []
    what = f"clients changed the model more than {limit:g} times as much as the median client"
    advice = (
        f"the median client changed it by {usual:.1%}; look at their masks and images, or hold "
        "them back with federate.proximal_weight or fewer federate.local_steps"
    )
    return [Doubt(what, found, advice)]


def round_note(entry: Entry) -> str:
    """Return a round in a few words for a progress display: means over its clients."""
    shown = [("Dice", entry["val"]["dice"])]
    for key in ("agreement", "coverage", "pseudo_label_dice"):
        values = [c[key] for c in entry["clients"].values() if c.get(key) is not None]
        shown.append((key.replace("_", " "), mean(values) if values else None))
    return ", ".join(f"{name} {value:.2f}" for name, value in shown if value is not None)
