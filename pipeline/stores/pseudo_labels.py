"""A teacher's labels of some images: the arrays of a label store, in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.stores.arrays import Bytes

LABEL_ARRAYS = ("masks", "confidences", "predicted_iou")
VIEW_AGREEMENT = "view_agreement"  # where labels are means over several views
PROBABILITIES = "probabilities"  # where ``precompute.probabilities`` asks for them

_CONFIDENCE_CLIP = (1 / 512, 511 / 512)


@dataclass(frozen=True)
class PseudoLabels:
    """Teacher labels of n images.

    masks (n, S, S) uint8 class indices; confidences (n, S, S) uint8, the probability of that class
    in 0..255; predicted_iou (n,) float32, the teacher's own estimate of the IoU.

    Of labels that are means over views only: view_agreement (n,) float32, the mean Dice of each
    view's label with this one, and flip_dice (n,) float32, that of the image's label by itself with
    its mirror image's, foreground against background, both 0..1. Where they are asked for:
    probabilities (n, K+1, S, S) uint8, of every class in 0..255, each rounded by itself.
    """

    masks: Bytes
    confidences: Bytes
    predicted_iou: NDArray[np.float32]
    view_agreement: NDArray[np.float32] | None = None
    probabilities: Bytes | None = None
    flip_dice: NDArray[np.float32] | None = None  # no array of a store, but part of its quality


def row_arrays(
    size: int, num_classes: int, *, views: int, probabilities: bool
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return the arrays of labels of ``size`` px, by name the shape of a row and its dtype."""
    square = (size, size)
    arrays: dict[str, tuple[tuple[int, ...], str]] = {
        "masks": (square, "uint8"),
        "confidences": (square, "uint8"),
        "predicted_iou": ((), "float32"),
    }
    if views > 1:
        arrays[VIEW_AGREEMENT] = ((), "float32")
    if probabilities:
        arrays[PROBABILITIES] = ((num_classes + 1, *square), "uint8")
    return arrays


def join(parts: Sequence[PseudoLabels]) -> PseudoLabels:
    """Concatenate labels along their images; the parts have the same arrays."""
    names = [name for name, value in vars(parts[0]).items() if value is not None]
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return PseudoLabels(**arrays)


def confidence_to_probability(confidences: Bytes) -> NDArray[np.float32]:
    """Return stored confidences as probabilities, float32 in [1/512, 511/512]: never certain."""
    return np.clip(confidences.astype(np.float32) / 255, *_CONFIDENCE_CLIP)
