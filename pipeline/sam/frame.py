"""SAM's input frame, longest side at the teacher's size and padded, and the way back from it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

LOGIT_STRIDE = 4  # input pixels per cell of the low-resolution logits


def fit_longest_side(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Resize (H, W, 3) uint8 bilinearly to a longest side of ``size``; a second time, nothing."""
    scale = size / max(image.shape[:2])
    height, width = (max(1, min(size, int(side * scale + 0.5))) for side in image.shape[:2])
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def to_input_frame(images: Sequence[NDArray[np.uint8]], size: int) -> tuple[Tensor, Tensor]:
    """Resize the longest side of each (H, W, 3) uint8 image to ``size`` and pad bottom and right.

    Returns:
        pixels (B, 3, size, size) uint8 and valid_hw (B, 2) int64, the image's height and width.
    """
    batch = np.zeros((len(images), size, size, 3), np.uint8)
    valid_hw = np.zeros((len(images), 2), np.int64)
    for i, image in enumerate(images):
        resized = fit_longest_side(image, size)
        valid_hw[i] = height, width = resized.shape[:2]
        batch[i, :height, :width] = resized
    return torch.from_numpy(batch).permute(0, 3, 1, 2), torch.from_numpy(valid_hw)


def inside_image(valid_hw: Tensor, size: int) -> Tensor:
    """Tell which pixels of the padded frame belong to the image: (B, size, size) bool."""
    steps = torch.arange(size, device=valid_hw.device)
    rows = steps[None, :, None] < valid_hw[:, 0, None, None]
    return rows & (steps[None, None, :] < valid_hw[:, 1, None, None])


def to_client_frame(logits: Tensor, valid_hw: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Turn logits into class probabilities, cropped to each image and resized to ``size_hw``.

    Args:
        logits: (B, K+1, h, w) low-resolution logits of the padded frame.

    Returns:
        (B, K+1, *size_hw) float32, summing to one over the classes.
    """
    probabilities = logits.float().softmax(dim=1)
    height, width = probabilities.shape[-2:]
    grids = []
    for axis, (cells, out) in enumerate(((height, size_hw[0]), (width, size_hw[1]))):
        valid = valid_hw[:, axis, None].float() / LOGIT_STRIDE  # cells that lie in the image
        centre = (torch.arange(out, device=logits.device) + 0.5) / out
        # never beyond the image's last cell: what lies in the padding is no prediction
        cell = torch.minimum(centre * valid, (valid - 0.5).clamp(min=0.5))
        grids.append(cell * 2 / cells - 1)
    rows = grids[0][:, :, None].expand(-1, -1, size_hw[1])
    cols = grids[1][:, None, :].expand(-1, size_hw[0], -1)
    sampled: Tensor = F.grid_sample(
        probabilities,
        torch.stack([cols, rows], dim=-1),
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )
    return sampled
