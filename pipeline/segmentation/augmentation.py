"""Random views of whole batches: geometry shared by image and labels, photometry on images alone.

Every image of a batch draws its own parameters, all at once as tensors. torchvision v2 draws one
set for a batch, or needs a Python loop over images; on the small networks of stage two that loop
costs as much as a tenth of a training step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline import runtime  # noqa: F401  (before torchvision)

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from pipeline.config import AugmentConfig

_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601 luma


@dataclass(frozen=True)
class Photometry:
    """Limits of the random change of appearance."""

    brightness: float = 0.2  # of the full range, either way
    contrast: float = 0.3
    saturation: float = 0.4
    colour_cast: float = 0.1  # per channel, of the full range
    blur_probability: float = 0.3  # of the whole batch
    noise: float = 0.03  # standard deviation, of the full range

    def times(self, factor: float) -> Photometry:
        """Return limits ``factor`` times as wide; a probability stays below 1."""
        values = {name: value * factor for name, value in vars(self).items()}
        return Photometry(**values | {"blur_probability": min(1.0, values["blur_probability"])})


STRONG = Photometry()
LIGHT = Photometry(0.1, 0.15, 0.2, 0.04, 0.0, 0.0)
#: For a teacher that must hold at sites whose light and colour its few labelled images lack.
HEAVY = Photometry(0.3, 0.5, 0.8, 0.2, 0.3, 0.05)


def random_affine(count: int, generator: torch.Generator, *, settings: AugmentConfig) -> Tensor:
    """Draw ``count`` maps (count, 2, 3) from output to input, in coordinates -1..1.

    Flips, quarter turns, and a small rotation, change of scale and shift. What ``settings`` leave
    out moves no other draw.
    """
    draw = torch.rand((count, 7), generator=generator)
    turns = (draw[:, 0] * 4).floor() * (math.pi / 2) * settings.turns
    angle = turns + (draw[:, 1] * 2 - 1) * math.radians(settings.rotation)
    zoom = 1 + (draw[:, 2] * 2 - 1) * settings.scale
    flipped = draw[:, 3] < 0.5, draw[:, 6] < 0.5  # left and right, up and down
    axes = {"none": 0, "horizontal": 1, "both": 2}[settings.flips]
    x, y = (torch.where(f & (i < axes), -1.0, 1.0) for i, f in enumerate(flipped))
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    shift = (draw[:, 4:6] * 2 - 1) * settings.shift * 2
    columns = [torch.stack(pair, dim=1) for pair in ((cos * x, sin * x), (-sin * y, cos * y))]
    return torch.stack([*columns, shift], dim=2)


def sampling_grid(maps: Tensor, pixels: Tensor) -> Tensor:
    """Return where each pixel of ``pixels`` (B, ..., H, W) comes from: (B, H, W, 2) float.

    It costs half of a resampling, so images and their labels share one.
    """
    return F.affine_grid(maps, [len(maps), 1, *pixels.shape[-2:]], align_corners=False)


def warp_images(images: Tensor, grid: Tensor, *, padding: str = "reflection") -> Tensor:
    """Resample images (B, C, H, W) float bilinearly at a ``sampling_grid``."""
    return F.grid_sample(images, grid, padding_mode=padding, align_corners=False)


def warp_labels(
    labels: Tensor, grid: Tensor, *, padding: str = "reflection", fill: int = 0
) -> Tensor:
    """Resample class indices or stored confidences (B, H, W), nearest neighbour, dtype kept.

    With ``padding="zeros"`` what comes from outside becomes ``fill``.
    """
    values = labels[:, None].float() - fill
    out = F.grid_sample(values, grid, mode="nearest", padding_mode=padding, align_corners=False)
    return (out[:, 0] + fill).to(labels.dtype)


def change_appearance(images: Tensor, limits: Photometry, generator: torch.Generator) -> Tensor:
    """Change light, contrast, colour, blur and noise of images (B, 3, H, W) in 0..1 at random.

    An image whose three channels are equal is grey and stays grey.
    """
    is_grey = (images == images[:, :1]).flatten(start_dim=1).all(dim=1)[:, None, None, None]

    def uniform(limit: float, channels: int = 1) -> Tensor:
        draw = torch.rand((len(images), channels, 1, 1), generator=generator)
        return ((draw * 2 - 1) * limit).to(images)

    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    out = (images - mean) * (1 + uniform(limits.contrast)) + mean + uniform(limits.brightness)
    grey = (out * out.new_tensor(_GREY)[None, :, None, None]).sum(dim=1, keepdim=True)
    out = grey + (out - grey) * (1 + uniform(limits.saturation))
    out = out + uniform(limits.colour_cast, 3) * ~is_grey
    chance = limits.blur_probability
    if chance > 0 and torch.rand((), generator=generator) < chance:
        sigma = 0.3 + float(torch.rand((), generator=generator))
        out = gaussian_blur(out, [5, 5], [sigma, sigma])
    if limits.noise > 0:
        strength = torch.rand((len(images), 1, 1, 1), generator=generator) * limits.noise
        noise = (torch.randn(out.shape, generator=generator) * strength).to(out)
        out = out + torch.where(is_grey, noise[:, :1], noise)
    return out.clamp(0, 1)
