"""What a finished label store says of the teacher without any truth, and when to warn of it.

The statistics follow from the store and the teacher alone, so a run that stopped and went on ends
with the same bytes. They are kept among the store's attributes and measured once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import PrecomputeConfig
from pipeline.data.images import load_image
from pipeline.errors import DataError
from pipeline.labelling.backoff import Image, TeacherBackend
from pipeline.labelling.job import Job
from pipeline.segmentation.metrics import dice_score
from pipeline.stores.label_store import LabelStore, RowKey, confidence_to_probability

FLIPPED_IMAGES = 16  # labelled once more, mirrored; all if there are fewer
_SAMPLE_SEED = 0  # whatever the run's seed: the sample is the store's own

Statistics = dict[str, Any]  # see ``measure``


def measure_owner(job: Job, owner: str, teacher: TeacherBackend) -> Statistics | DataError:
    """Measure an owner's finished store; the error where an image of the sample cannot be read."""

    def load(key: RowKey) -> Image:
        file = job.partition.images[key.image_id].image
        return load_image(job.config.data.root, file, sha256=key.sha256)

    size = job.config.precompute.batch_size
    try:
        return measure(LabelStore(job.path(owner)), teacher, load, batch_size=size)
    except DataError as error:
        return error


def measure(
    store: LabelStore, teacher: TeacherBackend, load: Callable[[RowKey], Image], *, batch_size: int
) -> Statistics:
    """Measure a store whose rows are all done, reading it once, chunk by chunk.

    Returns:
        JSON-ready: ``images``; ``confidence``, the mean probability over all pixels, and
        ``foreground_confidence`` over those labelled foreground (None if there are none);
        ``area`` and ``area_std``, mean and standard deviation over the images of the foreground's
        share; ``empty``, the share of images without any; ``predicted_iou``, the mean of the
        teacher's own estimates; ``flips``, the number of images that were mirrored and labelled
        again, and ``flip_dice``, the mean foreground Dice of those labels, mirrored back, with the
        store's.
    """
    levels = np.zeros((2, 256), np.int64)  # pixels by stored confidence: all, foreground
    areas, predicted_iou = [], []
    for chunk in range(store.chunks):
        labels = store.read_chunk(chunk)
        foreground = labels.masks > 0
        levels[0] += np.bincount(labels.confidences.ravel(), minlength=256)
        levels[1] += np.bincount(labels.confidences[foreground], minlength=256)
        areas.append(foreground.mean(axis=(1, 2)))
        predicted_iou.append(labels.predicted_iou)
    area = np.concatenate(areas)
    flips = _flip_dice(store, teacher, load, batch_size)
    return {
        "images": len(store),
        "confidence": _mean_probability(levels[0]),
        "foreground_confidence": _mean_probability(levels[1]),
        "area": float(area.mean()),
        "area_std": float(area.std()),
        "empty": float((area == 0).mean()),
        "predicted_iou": float(np.concatenate(predicted_iou).astype(np.float64).mean()),
        "flips": len(flips),
        "flip_dice": float(np.mean(flips)),
    }


def _mean_probability(levels: NDArray[np.int64]) -> float | None:
    """Return the mean of the probabilities that 256 levels stand for, weighted by their pixels."""
    if not levels.any():
        return None
    values = confidence_to_probability(np.arange(256, dtype=np.uint8)).astype(np.float64)
    return float(levels @ values / levels.sum())


def _flip_dice(
    store: LabelStore, teacher: TeacherBackend, load: Callable[[RowKey], Image], batch_size: int
) -> list[float]:
    """Return the foreground Dice of a sample's stored labels with those of its mirror images."""
    count = min(FLIPPED_IMAGES, len(store))
    sample = np.random.default_rng(_SAMPLE_SEED).choice(len(store), count, replace=False)
    rows = sorted(sample.tolist())
    dice = []
    for start in range(0, count, batch_size):
        batch = rows[start : start + batch_size]
        mirrored = [np.ascontiguousarray(load(store.rows[row])[:, ::-1]) for row in batch]
        found = teacher.label(mirrored, store.identity.label_size).masks[:, :, ::-1]
        for row, mask in zip(batch, found, strict=True):
            stored = store.read(slice(row, row + 1)).masks[0]
            pair = ((mask > 0).astype(np.uint8), (stored > 0).astype(np.uint8))
            dice.append(dice_score(*pair, num_classes=1))
    return dice


def quality_warnings(owner: str, statistics: Statistics, config: PrecomputeConfig) -> list[str]:
    """Return one line for each reason to look at SAM's labels of ``owner`` before using them."""
    lines = []
    if statistics["flip_dice"] < config.warn_consistency:
        lines.append(
            f"{owner}: SAM contradicts itself: the labels of {statistics['flips']} mirrored images "
            f"match its own with Dice {statistics['flip_dice']:.2f}, below "
            f"precompute.warn_consistency {config.warn_consistency:g}; look at them before you "
            "trust them"
        )
    if statistics["empty"] > config.warn_empty:
        lines.append(
            f"{owner}: SAM finds nothing in {statistics['empty']:.0%} of {statistics['images']} "
            f"images, above precompute.warn_empty {config.warn_empty:g}; look at them before you "
            "trust its labels"
        )
    return lines


def statistics_table(statistics: dict[str, Statistics]) -> str:
    """Format each owner's statistics as a line of text, under a heading."""
    lines = [
        f"{'':<12} {'images':>7} {'confidence':>11} {'foreground':>11} {'area':>16} {'empty':>6} "
        f"{'pred. IoU':>10} {'flip Dice':>10}"
    ]
    for owner, row in statistics.items():
        inside = row["foreground_confidence"]
        shown = "-" if inside is None else f"{inside:.3f}"
        area = f"{row['area']:.1%} \N{PLUS-MINUS SIGN} {row['area_std']:.1%}"
        lines.append(
            f"{owner:<12} {row['images']:7d} {row['confidence']:11.3f} {shown:>11} {area:>16} "
            f"{row['empty']:6.0%} {row['predicted_iou']:10.3f} {row['flip_dice']:10.3f}"
        )
    return "\n".join(lines)
