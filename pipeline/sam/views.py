"""Test-time views: an image is flipped and turned, and the mean of its views becomes its label.

A view is made of the image in the teacher's frame, where the padding stays at the bottom and the
right, so that each view is what the teacher would see of the flipped or turned file. Its class
probabilities go back in the client's frame, in which flips and quarter turns are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SizeHW = tuple[int, int]

#: (pixels (B, 3, h, w) uint8, valid_hw (B, 2), size_hw of the client's frame)
#: -> class probabilities (B, K+1, *size_hw) and IoU estimates (B, K+1), float32.
Network = Callable[[Tensor, Tensor, SizeHW], tuple[Tensor, Tensor]]


class View(NamedTuple):
    """How an image is seen: rows and columns exchanged, and then turned over."""

    transposed: bool = False
    upside_down: bool = False
    mirrored: bool = False


#: The first 2 are the image and its mirror image, the first 4 all flips, all 8 the dihedral group.
VIEWS = tuple(
    View(transposed, upside_down, mirrored)
    for transposed in (False, True)
    for upside_down in (False, True)
    for mirrored in (False, True)
)


class Seen(NamedTuple):
    """What a teacher says of B images."""

    probabilities: Tensor  # (B, K+1, h, w) float32 in the client's frame, the mean over the views
    iou: Tensor  # (B, K+1) float32, the mean of the estimates
    # (B,) float32: mean foreground Dice of each view's label with the mean's; NaN of one view
    agreement: Tensor
    # (B,) float32: Dice of the image's label with its mirror image's, foreground against background
    flip_dice: Tensor


def seen_as(view: View, pixels: Tensor, valid_hw: Tensor) -> tuple[Tensor, Tensor]:
    """Return images as a view sees them: pixels (B, 3, h, w), padded, and valid_hw (B, 2)."""
    if view.transposed:
        pixels, valid_hw = pixels.transpose(2, 3), valid_hw.flip(1)
    if view.upside_down:
        pixels = _turned_over(pixels, valid_hw[:, 0], dim=2)
    if view.mirrored:
        pixels = _turned_over(pixels, valid_hw[:, 1], dim=3)
    return pixels.contiguous(), valid_hw


def _turned_over(pixels: Tensor, lengths: Tensor, *, dim: int) -> Tensor:
    """Reverse the first ``lengths`` (B,) places of an axis of (B, 3, h, w); padding stays."""
    places, ends = torch.arange(pixels.shape[dim], device=pixels.device), lengths[:, None]
    source = torch.where(places < ends, ends - 1 - places, places)
    shape = [1] * pixels.ndim
    shape[0], shape[dim] = source.shape
    return pixels.gather(dim, source.view(shape).expand_as(pixels))


def seen_back(view: View, maps: Tensor) -> Tensor:
    """Return maps (..., h, w) of a view in the image's own frame."""
    if view.upside_down:
        maps = maps.flip(-2)
    if view.mirrored:
        maps = maps.flip(-1)
    return maps.transpose(-1, -2) if view.transposed else maps


def mean_of_views(
    network: Network, pixels: Tensor, valid_hw: Tensor, size_hw: SizeHW, *, views: int
) -> Seen:
    """Run a teacher on so many views of a batch, one after the other, and average them.

    A pass has as many images as the batch, so views cost time and hardly any memory.

    Args:
        pixels, valid_hw: as ``Network`` takes them. views: 1, 2, 4 or 8.
    """
    if views == 1:
        maps, iou = network(pixels, valid_hw, size_hw)
        nothing = iou.new_full((len(iou),), torch.nan)
        return Seen(maps, iou, nothing, nothing)
    total, scores, masks = None, [], []
    for view in VIEWS[:views]:
        seen = seen_as(view, pixels, valid_hw)
        maps, iou = network(*seen, size_hw[::-1] if view.transposed else size_hw)
        maps = seen_back(view, maps)
        total = maps if total is None else total + maps
        masks.append(maps.argmax(dim=1).to(torch.uint8))
        scores.append(iou)
    assert total is not None
    probabilities = total / views
    final, classes = probabilities.argmax(dim=1), probabilities.shape[1] - 1
    agreement = torch.stack([foreground_dice(mask, final, classes) for mask in masks]).mean(dim=0)
    flip_dice = foreground_dice(masks[0] > 0, masks[1] > 0, 1)
    return Seen(probabilities, torch.stack(scores).mean(dim=0), agreement, flip_dice)


def foreground_dice(one: Tensor, other: Tensor, num_classes: int) -> Tensor:
    """Return the Dice of B pairs of (B, h, w) masks: (B,) float32.

    The mean over the foreground classes that either mask has, and 1 where neither has any, as
    ``pipeline.segmentation.metrics.dice_score``.
    """
    total, count = torch.zeros(2, len(one), device=one.device)
    for index in range(1, num_classes + 1):
        first, second = (one == index).flatten(1), (other == index).flatten(1)
        pixels = first.sum(dim=1) + second.sum(dim=1)
        common = (first & second).sum(dim=1)
        total += 2 * common / pixels.clamp(min=1)
        count += pixels > 0
    return torch.where(count > 0, total / count.clamp(min=1), 1.0)


def in_order(parts: Sequence[Seen], groups: Sequence[Sequence[int]]) -> Seen:
    """Join what was seen of groups of images, given by their places, in the images' order."""
    if len(parts) == 1:
        return parts[0]
    order = torch.tensor([place for group in groups for place in group]).argsort()
    order = order.to(parts[0].iou.device)
    return Seen(*(torch.cat(values)[order] for values in zip(*parts, strict=True)))
