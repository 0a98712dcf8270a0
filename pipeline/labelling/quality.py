"""What labels say of the teacher without any truth, and when to warn of it.

Each row is measured in its chunk's task, while its image and labels are in memory, and the chunk's
JSON keeps that; the statistics of a finished store follow from these files alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.config import Config
from pipeline.doubts import LOOK, Doubt, contradictions
from pipeline.segmentation.metrics import dice_score
from pipeline.stores.arrays import Bytes
from pipeline.stores.label_store import RowKey, RowQuality
from pipeline.stores.pseudo_labels import PseudoLabels, confidence_to_probability

FLIPPED_IMAGES = 16  # of a store, labelled once more, mirrored; all if there are fewer

Statistics = dict[str, Any]  # see ``statistics``


def flip_sample(rows: Sequence[RowKey]) -> set[int]:
    """Return the rows to mirror: those with the lowest sha256, which says nothing of an image."""
    return set(sorted(range(len(rows)), key=lambda row: rows[row].sha256)[:FLIPPED_IMAGES])


def measure(labels: PseudoLabels, mirrored: Mapping[int, Bytes]) -> list[RowQuality]:
    """Return what n images' labels say of the teacher.

    Args:
        mirrored: for some of 0..n-1 the (S, S) masks of their mirror images, uint8; of labels that
            are means over views it is not needed.
    """
    found = []
    for row, (mask, stored) in enumerate(zip(labels.masks, labels.confidences, strict=True)):
        foreground, sure = mask > 0, confidence_to_probability(stored)
        flip = None
        if labels.flip_dice is not None:
            flip = float(labels.flip_dice[row])
        elif row in mirrored:
            pair = (mirrored[row][:, ::-1] > 0).astype(np.uint8), foreground.astype(np.uint8)
            flip = dice_score(*pair, num_classes=1)
        found.append(
            RowQuality(
                confidence=float(sure.mean(dtype=np.float64)),
                foreground_confidence=_mean(sure[foreground]),
                area=float(foreground.mean()),
                predicted_iou=float(labels.predicted_iou[row]),
                flip_dice=flip,
            )
        )
    return found


def statistics(quality: Sequence[RowQuality | None]) -> Statistics | None:
    """Return what a store's rows say together; None if one of them was never measured.

    Returns:
        JSON-ready: ``images``; ``confidence``, the mean probability over all pixels, and
        ``foreground_confidence`` over those labelled foreground (None if there are none);
        ``area`` and ``area_std``, mean and standard deviation over the images of the foreground's
        share; ``empty``, the share of images without any; ``predicted_iou``, the mean of the
        teacher's own estimates; ``flips``, the number of images that were mirrored and labelled
        again, and ``flip_dice``, the mean foreground Dice of those labels, mirrored back, with the
        store's (None if there are none).
    """
    rows = [row for row in quality if row is not None]
    if len(rows) < len(quality):
        return None
    inside = [row.foreground_confidence or 0.0 for row in rows]
    area = np.array([row.area for row in rows])
    flips = [row.flip_dice for row in rows if row.flip_dice is not None]
    return {
        "images": len(rows),
        "confidence": _mean([row.confidence for row in rows]),
        "foreground_confidence": float(np.average(inside, weights=area)) if area.any() else None,
        "area": float(area.mean()),
        "area_std": float(area.std()),
        "empty": float((area == 0).mean()),
        "predicted_iou": _mean([row.predicted_iou for row in rows]),
        "flips": len(flips),
        "flip_dice": _mean(flips),
    }


def _mean(values: Any) -> float | None:
    return float(np.mean(values, dtype=np.float64)) if len(values) else None


def label_doubts(statistics: Mapping[str, Statistics], config: Config) -> list[Doubt]:
    """Return the reasons to look at SAM's labels before using them, with the owners they name."""
    limit = config.precompute.warn_empty
    empty = {
        owner: f"{own['empty']:.0%} of {own['images']}"
        for owner, own in statistics.items()
        if own["empty"] > limit
    }
    nothing = f"SAM finds nothing in more images than precompute.warn_empty {limit:g}"
    found = contradictions({owner: own["flip_dice"] for owner, own in statistics.items()}, config)
    return found + [Doubt(nothing, empty, LOOK)] * bool(empty)


def statistics_table(statistics: dict[str, Statistics]) -> str:
    """Format each owner's statistics as a line of text, under a heading."""
    lines = [
        f"{'':<12} {'images':>7} {'confidence':>11} {'foreground':>11} {'area':>16} {'empty':>6} "
        f"{'pred. IoU':>10} {'flip Dice':>10}"
    ]
    for owner, row in statistics.items():
        inside, dice = (
            "-" if row[name] is None else f"{row[name]:.3f}"
            for name in ("foreground_confidence", "flip_dice")
        )
        area = f"{row['area']:.1%} \N{PLUS-MINUS SIGN} {row['area_std']:.1%}"
        lines.append(
            f"{owner:<12} {row['images']:7d} {row['confidence']:11.3f} {inside:>11} {area:>16} "
            f"{row['empty']:6.0%} {row['predicted_iou']:10.3f} {dice:>10}"
        )
    return "\n".join(lines)
