"""What a round says of itself: numbers for each client, and warnings that name a client or link."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import median
from typing import Any

import numpy as np
from torch import nn

from pipeline.config import Config
from pipeline.federation.local_update import LocalResult
from pipeline.federation.views import as_tensor
from pipeline.methods import METHODS
from pipeline.segmentation.metrics import dice_score
from pipeline.segmentation.networks import predict_masks
from pipeline.stores.image_store import ImageSet

_FEWEST_TO_COMPARE = 3  # clients: a median of two says nothing of either

Report = dict[str, Any]


def report(result: LocalResult, *, seconds: float, bytes_up: int, bytes_down: int) -> Report:
    """A client's entry in the round's history.

    Args:
        seconds: of the client's own computing.
        bytes_up, bytes_down: what it sent to the server and received, uncompressed.
    """
    return {
        "images": result.images,
        **result.diagnostics,
        "seconds": round(seconds, 3),
        "bytes_up": bytes_up,
        "bytes_down": bytes_down,
    }


def finite(entry: Report) -> Report:
    """JSON has no NaN: what is not finite becomes null."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in entry.items()
    }


def client_warnings(config: Config, name: str, entry: Report) -> list[str]:
    """Poor agreement, few kept pixels, and a link that takes longer than the computing."""
    found = []
    if METHODS[config.federate.method].uses_agreement:
        for key, floor, meaning in (
            ("agreement", config.agreement.warn_agreement, "foreground Dice of SAM and client"),
            ("coverage", config.agreement.warn_coverage, "share of pixels kept"),
        ):
            if entry[key] < floor:
                found.append(f"{name}: {meaning} is {entry[key]:.2f}, below {floor:.2f}")
    megabytes = (entry["bytes_up"] + entry["bytes_down"]) / 1e6
    link = config.federate.link_mbit
    on_the_link = megabytes * 8 / link
    if on_the_link > entry["seconds"]:
        found.append(
            f"{name}: {megabytes:.1f} MB a round take {on_the_link:.1f} s on a link of {link:g} "
            f"Mbit/s, computing takes {entry['seconds']:.1f} s; raise federate.local_steps"
        )
    return found


def round_warnings(config: Config, clients: dict[str, Report]) -> list[str]:
    """Clients that changed their model far more than the median client of the round did."""
    drifts = {name: entry["drift"] for name, entry in clients.items()}
    known = [value for value in drifts.values() if math.isfinite(value)]
    if len(known) < _FEWEST_TO_COMPARE:
        return []
    usual, limit = median(known), config.federate.warn_drift
    return [
        f"{name}: drifts, it changed the model by {value:.1%}, more than {limit:g} times the "
        f"median client's {usual:.1%}"
        for name, value in drifts.items()
        if value > limit * usual
    ]


def round_note(entry: dict[str, Any]) -> str:
    """A round in a few words for a progress display: means over its clients."""
    shown = [("Dice", entry["val"]["dice"])]
    for key in ("agreement", "coverage", "pseudo_label_dice"):
        values = [c[key] for c in entry["clients"].values() if c.get(key) is not None]
        shown.append((key.replace("_", " "), float(np.mean(values)) if values else None))
    return ", ".join(f"{name} {value:.2f}" for name, value in shown if value is not None)


def mean_dice(parts: Iterable[tuple[str, nn.Module, ImageSet]], config: Config) -> dict[str, Any]:
    """Mean Dice over the images of all parts, and of each by its name.

    A part is done before the next one is asked for, so one model may serve several.
    """
    clients: dict[str, float] = {}
    every: list[float] = []
    for name, model, part in parts:
        assert part.labels is not None
        predicted = predict_masks(model, as_tensor(part)).numpy()
        scores = [
            dice_score(mask, truth, num_classes=config.data.num_classes)
            for mask, truth in zip(predicted, part.labels, strict=True)
        ]
        clients[name] = float(np.mean(scores))
        every += scores
    return {"dice": float(np.mean(every)) if every else None, "clients": clients}
