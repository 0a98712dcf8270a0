"""SAM's windows without a branch, so that one exported graph serves frames of any shape.

segment-anything pads a map of tokens to whole windows only where that is needed, and torch's
exporter would fix the frame's height and width by that ``if``. Here tokens are picked by their
place, which needs none; what lies beyond the frame is zero, as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.sam.attention import ImageEncoder


class AnyFrameBlock(nn.Module):
    """segment-anything's ``Block``, with the same modules and the same result."""

    def __init__(self, block: Any) -> None:
        """Take over the modules of ``block``, a ``Block`` of segment-anything."""
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = (
            block.norm1,
            block.attn,
            block.norm2,
            block.mlp,
        )
        self.window_size: int = block.window_size

    def forward(self, x: Tensor) -> Tensor:
        """Run ``x`` (B, H, W, C) through attention and MLP; returns the same shape."""
        inside = self.norm1(x)
        if self.window_size:
            windows = self.attn(to_windows(inside, self.window_size))
            inside = from_windows(windows, x.shape)
        else:
            inside = self.attn(inside)
        x = x + inside
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


def to_windows(x: Tensor, size: int) -> Tensor:
    """Cut ``x`` (B, H, W, C) into windows (B * count, size, size, C), with zeros beyond it."""
    for axis in (1, 2):
        side = x.shape[axis]
        place = torch.arange(_whole(side, size), device=x.device)
        inside = (place < side).view([-1 if each == axis else 1 for each in range(4)])
        x = x.index_select(axis, place.clamp(max=side - 1)).masked_fill(~inside, 0)
    batch, height, width, channels = x.shape
    cut = x.view(batch, height // size, size, width // size, size, channels)
    return cut.transpose(2, 3).reshape(-1, size, size, channels)


def from_windows(windows: Tensor, shape: Sequence[int]) -> Tensor:
    """Put windows (B * count, size, size, C) together to a map of ``shape`` (B, H, W, C)."""
    batch, height, width, channels = shape
    size = windows.shape[1]
    rows, cols = _whole(height, size), _whole(width, size)
    cut = windows.view(batch, rows // size, cols // size, size, size, channels)
    whole = cut.transpose(2, 3).reshape(batch, rows, cols, channels)
    for axis, side in ((1, height), (2, width)):
        whole = whole.index_select(axis, torch.arange(side, device=windows.device))
    return whole


def _whole(side: int, size: int) -> int:
    """Round ``side`` up to whole windows."""
    return (side + size - 1) // size * size


def for_any_frame(encoder: nn.Module) -> None:
    """Replace the blocks of segment-anything's encoder, in place; others need nothing."""
    if isinstance(encoder, ImageEncoder):
        encoder.blocks = nn.ModuleList(AnyFrameBlock(block) for block in encoder.blocks)
