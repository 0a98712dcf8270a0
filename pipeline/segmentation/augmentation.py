"""Random views of whole batches: geometry shared by image and labels, photometry on images alone.

Every image of a batch draws its own parameters, all at once. torchvision v2 draws one set for a
batch, or needs a Python loop over images; on the small networks of stage two that loop costs as
much as a tenth of a training step. Parameters are drawn on the CPU, pixels change where they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import AugmentConfig

_GREY = torch.tensor((0.299, 0.587, 0.114))  # ITU-R BT.601 luma
_MARGIN = 32  # px by which noise is larger than the images that share it


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


def random_affine(count: int, rng: np.random.Generator, *, settings: AugmentConfig) -> Tensor:
    """Draw ``count`` maps (count, 2, 3) float32 from output to input, in coordinates -1..1.

    Flips, quarter turns, and a small rotation, change of scale and shift. What ``settings`` leave
    out moves no other draw.
    """
    draw = rng.random((count, 7), dtype=np.float32)
    turns = np.floor(draw[:, 0] * 4) * (math.pi / 2) * settings.turns
    angle = turns + (draw[:, 1] * 2 - 1) * math.radians(settings.rotation)
    zoom = 1 + (draw[:, 2] * 2 - 1) * settings.scale
    flipped = draw[:, 3] < 0.5, draw[:, 6] < 0.5  # left and right, up and down
    axes = {"none": 0, "horizontal": 1, "both": 2}[settings.flips]
    x, y = (np.where(f & (i < axes), -1.0, 1.0) for i, f in enumerate(flipped))
    cos, sin = np.cos(angle) * zoom, np.sin(angle) * zoom
    shift = (draw[:, 4:6] * 2 - 1) * settings.shift * 2
    columns = [np.stack(pair, axis=1) for pair in ((cos * x, sin * x), (-sin * y, cos * y))]
    return torch.from_numpy(np.stack([*columns, shift], axis=2).astype(np.float32))


def sampling_grid(maps: Tensor, pixels: Tensor) -> Tensor:
    """Return where each pixel of ``pixels`` (B, ..., H, W) comes from: (B, H, W, 2) float.

    It equals ``torch.nn.functional.affine_grid`` at pixel centres and takes a tenth of its time.
    Images and their labels share one.
    """
    height, width = pixels.shape[-2:]
    x, y = (_centres(side, pixels.device) for side in (width, height))
    maps = maps.to(pixels.device)
    grid = torch.empty((len(maps), height, width, 2), device=pixels.device)
    for axis in range(2):
        row = maps[:, axis, 0, None] * x
        column = maps[:, axis, 1, None] * y + maps[:, axis, 2, None]
        torch.add(row[:, None, :], column[:, :, None], out=grid[..., axis])
    return grid


def _centres(side: int, device: torch.device) -> Tensor:
    """Return the coordinates of pixel centres, -1..1 from edge to edge."""
    return (torch.arange(side, device=device) * 2 + 1) / side - 1


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


def is_grey(images: Tensor) -> Tensor:
    """Return for each image (B, 3, H, W) whether its three channels are equal: (B,) bool."""
    return (images[:, 1:] == images[:, :1]).flatten(start_dim=1).all(dim=1)


def change_appearance(
    images: Tensor, limits: Photometry, rng: np.random.Generator, *, grey: Tensor
) -> Tensor:
    """Change light, contrast, colour, blur and noise of images (B, 3, H, W) in 0..1 at random.

    Args:
        grey: (B,) bool on the CPU, ``is_grey``: all channels of such an image change alike.
    """
    out = _change_colour(images, limits, rng, grey=grey)
    if rng.random() < limits.blur_probability:
        out = _blur(out, sigma=0.3 + float(rng.random()))
    if limits.noise > 0:
        _add_noise(out, rng.uniform(0, limits.noise, len(out)), rng, grey=grey)
    return out.clamp_(0, 1)


def _change_colour(
    images: Tensor, limits: Photometry, rng: np.random.Generator, *, grey: Tensor
) -> Tensor:
    """Change contrast, brightness, saturation and cast, all of which one affine map makes.

    With c the contrast, s the saturation, b the brightness, m the image's mean, l its luma:
    ``c (x - m) + m + b``, then ``l + s (x - l)``, then the cast.
    """

    def uniform(limit: float, channels: int = 1) -> Tensor:
        return torch.from_numpy(rng.uniform(-limit, limit, (len(images), channels))).float()

    contrast, brightness = 1 + uniform(limits.contrast), uniform(limits.brightness)
    coloured = ~grey[:, None]
    saturation = 1 + uniform(limits.saturation) * coloured
    cast = uniform(limits.colour_cast, 3) * coloured
    mix = saturation[:, :, None] * torch.eye(3) + (1 - saturation)[:, :, None] * _GREY
    mix = (mix * contrast[:, :, None]).to(images)
    mean = images.mean(dim=(1, 2, 3))[:, None]
    offset = (1 - contrast).to(images) * mean + (brightness + cast).to(images)
    return torch.baddbmm(offset[:, :, None], mix, images.flatten(2)).view_as(images)


def _blur(images: Tensor, *, sigma: float) -> Tensor:
    """Blur with a Gaussian of 5 x 5 pixels, one axis after the other."""
    taps = np.exp(-0.5 * (np.arange(3) / sigma) ** 2)
    centre, near, far = (float(tap) for tap in taps / (taps[0] + 2 * taps[1:].sum()))
    for axis, pad in ((2, (0, 0, 2, 2)), (3, (2, 2, 0, 0))):
        side = images.shape[axis]
        wide = F.pad(images, pad, mode="reflect")
        images = wide.narrow(axis, 2, side) * centre
        for first, tap in ((1, near), (3, near), (0, far), (4, far)):
            images.add_(wide.narrow(axis, first, side), alpha=tap)
    return images


def _add_noise(
    images: Tensor, strength: np.ndarray, rng: np.random.Generator, *, grey: Tensor
) -> None:
    """Add noise of a standard deviation for each image, in place.

    Each image takes another window of the same noise, which is most of what noise costs.
    """
    generator = torch.Generator(images.device).manual_seed(int(rng.integers(2**63)))
    height, width = images.shape[-2:]
    size = (3, height + _MARGIN, width + _MARGIN)
    noise = torch.randn(size, generator=generator, device=images.device)
    corners = rng.integers(0, _MARGIN + 1, (len(images), 2)).tolist()
    rows = zip(images, strength.tolist(), corners, grey.tolist(), strict=True)
    for image, deviation, (top, left), alike in rows:
        window = noise[: 1 if alike else 3, top : top + height, left : left + width]
        image.add_(window, alpha=deviation)
