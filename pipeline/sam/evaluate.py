"""``samfed evaluate-sam``: how good the adapted teacher is where truth is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import Config
from pipeline.files import write_json
from pipeline.images import resize_mask
from pipeline.labelled import load_labelled
from pipeline.metrics import image_metrics, summarise
from pipeline.partition import load_partition
from pipeline.sam.teacher import load_teacher
from pipeline.stores.labels import confidence_to_probability

ECE_BINS = 15

Progress = Callable[[str, int, int], None]


def evaluate_teacher(config: Config, *, progress: Progress | None = None) -> dict[str, Any]:
    """Label the server's calibration part as stage one would, and compare with the truth.

    Writes ``cache/evaluate-sam.json``: Dice, IoU, HD95 and ASSD in the client's frame, the
    calibration error of the confidences and the share of images with an empty mask.
    """
    cache, size = config.cache.root, config.data.image_size
    partition = load_partition(cache / "partition.json")
    teacher = load_teacher(config, partition)
    ids = partition.server.calibration
    scores, groups, empty = [], [], 0
    confidences, hits = [], []
    for number, item in enumerate(load_labelled(config, partition, ids), start=1):
        labels = teacher.label([item.image], size)
        truth = resize_mask(item.mask, size)
        scores.append(image_metrics(labels.masks[0], truth, num_classes=teacher.card.num_classes))
        groups.append(partition.images[item.image_id].group)
        empty += int(not labels.masks[0].any())
        confidences.append(confidence_to_probability(labels.confidences[0]).ravel())
        hits.append((labels.masks[0] == truth).ravel())
        if progress is not None:
            progress("evaluating the teacher", number, len(ids))
    result = {
        "variant": teacher.card.variant,
        **summarise(scores, groups, seed=config.seed),
        "ece": calibration_error(np.concatenate(confidences), np.concatenate(hits)),
        "empty": empty / len(ids),
    }
    write_json(cache / "evaluate-sam.json", result)
    return result


def calibration_error(confidence: NDArray[np.float32], hit: NDArray[np.bool_]) -> float:
    """Expected calibration error (Naeini et al., 2015) over 15 bins of equal width.

    Mean over bins of |share of hits - mean confidence|, weighted by the bin's share of pixels.

    Args:
        confidence: (n,) float in 0..1. hit: (n,) bool, whether the pixel was right.
    """
    index = np.minimum((confidence * ECE_BINS).astype(int), ECE_BINS - 1)
    count = np.bincount(index, minlength=ECE_BINS)
    gap = np.bincount(index, weights=confidence.astype(float) - hit, minlength=ECE_BINS)
    return float(np.abs(gap[count > 0]).sum() / len(confidence))
