"""SAM's input frame: the longest side at the teacher's size, padded bottom and right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor


def fit_longest_side(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Resize (H, W, 3) uint8 bilinearly to a longest side of ``size``; a second time, nothing."""
    scale = size / max(image.shape[:2])
    height = max(1, min(size, int(image.shape[0] * scale + 0.5)))
    width = max(1, min(size, int(image.shape[1] * scale + 0.5)))
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def to_input_frame(images: Sequence[NDArray[np.uint8]], size: int) -> tuple[Tensor, Tensor]:
    """Resize the longest side of each (H, W, 3) uint8 image to ``size`` and pad bottom and right.

    Returns:
        pixels (B, 3, size, size) uint8 and the valid valid_hw (B, 2) int64 as (height, width).
    """
    batch = np.zeros((len(images), size, size, 3), np.uint8)
    valid_hw = np.zeros((len(images), 2), np.int64)
    for i, image in enumerate(images):
        resized = fit_longest_side(image, size)
        height, width = resized.shape[:2]
        batch[i, :height, :width] = resized
        valid_hw[i] = height, width
    return torch.from_numpy(batch).permute(0, 3, 1, 2), torch.from_numpy(valid_hw)
