"""Scores of images, and what tables and ``metrics.json`` say of them."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.config import Config
from pipeline.segmentation.metrics import (
    CLASS_SCORES,
    IMAGE_SCORES,
    ImageMetrics,
    Scale,
    over_classes,
)
from pipeline.segmentation.statistics import group_tables, mean_of, summarise

MEANS = CLASS_SCORES  # of clients too


class Score(NamedTuple):
    """One test image and its scores: a line of ``per_image.csv``."""

    client: str
    image_id: str
    group: str
    metrics: ImageMetrics


def scales(config: Config, size_mm: tuple[float, float] | None) -> tuple[Scale, Scale | None]:
    """Return the units of an image's distances in the client's frame: pixels, and mm if known.

    An image is squashed to S x S pixels, so these are as high and as wide as its ``size_mm`` says.
    """
    side, settings = config.data.image_size, config.evaluate
    px = Scale(tolerance=settings.tolerance_px)
    if size_mm is None:
        return px, None
    height, width = size_mm
    return px, Scale(height / side, width / side, settings.tolerance_mm)


def check_summary(test: dict[str, Any]) -> None:
    """Check that ``test`` has the shape of ``summarise_scores``, as read from a file.

    Raises:
        KeyError, TypeError, AttributeError: it has not.
    """
    test["pooled"]["n"], test["pooled"]["dice"]
    for row in test["clients"].values():
        row["n"], row["dice"], row["dice_ci95"]
    for row in (test["pooled"], test["client_mean"], *test["clients"].values()):
        if not _are_scores(row):
            raise TypeError("a score is no number")


def _are_scores(value: Any) -> bool:
    """Tell whether ``value`` is a number or None, a pair of these, or a table of all that."""
    if isinstance(value, dict):
        return all(map(_are_scores, value.values()))
    if isinstance(value, list):
        return len(value) == 2 and all(map(_are_scores, value))
    return value is None or isinstance(value, int | float)


def summarise_scores(scores: Sequence[Score], *, seed: int, names: Sequence[str]) -> dict[str, Any]:
    """Summarise all images, those of each client, and the clients, each counting the same.

    Args:
        seed: of the bootstrap draws. names: of the classes 1..K.

    Returns:
        JSON-ready: ``pooled`` and each of ``clients`` as ``statistics.summarise`` describes, and
        their ``client_mean``; without scores ``n`` is 0 and no mean is there (None).
    """
    none = dict.fromkeys(MEANS)
    if not scores:
        return {"pooled": {"n": 0} | none, "clients": {}, "client_mean": none}

    def summary(chosen: Sequence[Score]) -> dict[str, Any]:
        groups = [score.group for score in chosen]
        return summarise([score.metrics for score in chosen], groups, seed=seed, names=names)

    clients = {
        name: summary([score for score in scores if score.client == name])
        for name in dict.fromkeys(score.client for score in scores)
    }
    means = mean_of(list(clients.values()), MEANS)
    return {"pooled": summary(scores), "clients": clients, "client_mean": means}


def image_table(scores: Iterable[Score], names: Sequence[str]) -> str:
    """Return ``per_image.csv``: a line for each image, with several classes a column for each."""
    head = ["client", "image_id", "group", *IMAGE_SCORES, *_class_columns(names)]
    return as_csv(
        head,
        ([*score[:3], *score.metrics.values(), *_class_values(score.metrics)] for score in scores),
    )


def group_table(scores: Sequence[Score], names: Sequence[str]) -> str:
    """Return ``per_group.csv``: a line for each client's patient or video, as for an image."""
    head = ["client", "group", "images", *CLASS_SCORES, *_class_columns(names)]
    lines = []
    for client in dict.fromkeys(score.client for score in scores):
        own = [score for score in scores if score.client == client]
        groups = [score.group for score in own]
        in_mm = not any(np.isnan(score.metrics.hd95_mm) for score in own)
        for group, table in group_tables([score.metrics for score in own], groups).items():
            means = over_classes(table, in_mm=in_mm).tolist()
            classes = table.ravel().tolist() if len(names) > 1 else []
            lines.append([client, group, groups.count(group), *means, *classes])
    return as_csv(head, lines)


def _class_columns(names: Sequence[str]) -> list[str]:
    shown = names if len(names) > 1 else ()
    return [f"{name}: {column}" for name in shown for column in CLASS_SCORES]


def _class_values(metrics: ImageMetrics) -> list[float]:
    shown = metrics.classes if len(metrics.classes) > 1 else ()
    return [value for each in shown for value in each.values().values()]


def as_csv(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """Return a table with six digits of each float, and nothing for None."""
    out = io.StringIO()
    short = ([f"{v:.6g}" if isinstance(v, float) else v for v in line] for line in lines)
    csv.writer(out, lineterminator="\n").writerows([head, *short])
    return out.getvalue()


def described(row: dict[str, Any], unit: str) -> str:
    """Return a summary's means in words; distances are in ``unit``."""
    suffix = "" if unit == "px" else "_mm"
    between = "{:.3f} to {:.3f}".format(*row["dice_ci95"]) if row["dice_ci95"] else "one group"
    hd95, assd, nsd = (row[f"{name}{suffix}"] for name in ("hd95", "assd", "nsd"))
    return (
        f"Dice {row['dice']:.3f} ({between}), IoU {row['iou']:.3f}, HD95 {hd95:.1f} {unit}, "
        f"ASSD {assd:.1f} {unit}, NSD {nsd:.3f}"
    )
