"""SAM's input frame and the way back from it.

An image's longest side becomes the teacher's input size. ``sam.frame: pad`` then pads it to a
square, as SAM does. ``content`` pads it to whole patches alone, so that a 4:3 image at 1024 px runs
as 48 x 64 tokens instead of 64 x 64 (``pipeline.sam.attention`` says what that equals).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline.config import SamConfig
from pipeline.stores.label_store import Identity
from pipeline.stores.teacher_card import TeacherCard

LOGIT_STRIDE = 4  # input pixels per cell of the low-resolution logits


def fitted_hw(image: NDArray[np.uint8], size: int) -> tuple[int, int]:
    """Return height and width of (H, W, 3) ``image`` at a longest side of ``size``."""
    scale = size / max(image.shape[:2])
    height, width = (max(1, min(size, int(side * scale + 0.5))) for side in image.shape[:2])
    return (height, width)


def fit_longest_side(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Resize (H, W, 3) uint8 bilinearly to a longest side of ``size``; a second time, nothing."""
    height, width = fitted_hw(image, size)
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def frame_patch(teacher: SamConfig | TeacherCard | Identity) -> int | None:
    """Return the side of the patches of a content frame, px; None where every frame is square.

    It is the coarsest stride of the encoder: 16 px, or 32 px for a ``timm:`` pyramid.
    """
    if teacher.frame == "pad":
        return None
    return 32 if teacher.variant.startswith("timm:") else 16


def frame_hw(image_hw: tuple[int, int], size: int, patch: int | None = None) -> tuple[int, int]:
    """Return height and width of the frame of an image whose longest side is ``size``.

    Args:
        patch: side of a patch, to whose multiples each side of a content frame is rounded up; None
            for the padded square.
    """
    if patch is None:
        return (size, size)
    height, width = (min(size, -(-side // patch) * patch) for side in image_hw)
    return (height, width)


def groups_of_frames(
    images: Sequence[NDArray[np.uint8]], size: int, patch: int | None
) -> list[list[int]]:
    """Return the places of the images that share a frame, in the order of their first ones."""
    groups: dict[tuple[int, int], list[int]] = {}
    for place, image in enumerate(images):
        resized_hw = fitted_hw(image, size)
        groups.setdefault(frame_hw(resized_hw, size, patch), []).append(place)
    return [*groups.values()]


def to_input_frame(
    images: Sequence[NDArray[np.uint8]], size: int, patch: int | None = None
) -> tuple[Tensor, Tensor]:
    """Resize the longest side of each (H, W, 3) uint8 image to ``size`` and pad bottom and right.

    Args:
        patch: as ``frame_hw``'s; with one, all images must have the frame of the first.

    Returns:
        pixels (B, 3, h, w) uint8, ``size`` x ``size`` without ``patch``, and valid_hw (B, 2) int64,
        the image's height and width in them.
    """
    resized = [fit_longest_side(image, size) for image in images]
    sides = [image.shape[:2] for image in resized]
    batch = np.zeros((len(images), *frame_hw(sides[0], size, patch), 3), np.uint8)
    for i, image in enumerate(resized):
        height, width = image.shape[:2]
        batch[i, :height, :width] = image
    return torch.from_numpy(batch).permute(0, 3, 1, 2), torch.tensor(sides)


def inside_image(valid_hw: Tensor, size_hw: Sequence[int]) -> Tensor:
    """Tell which pixels of a frame (h, w) belong to the image: (B, h, w) bool."""
    rows, cols = (torch.arange(side, device=valid_hw.device) for side in size_hw)
    return (rows[:, None] < valid_hw[:, :1, None]) & (cols < valid_hw[:, 1:, None])


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
