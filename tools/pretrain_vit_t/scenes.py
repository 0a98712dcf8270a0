"""Generated generic scenes for pretraining ``vit_t``: shapes, textures and clutter, with masks.

A stand-in for SA-1B: whatever can be segmented, drawn back to front over a textured background,
some objects with parts inside. Nothing here imitates a medical image or the demo's data set.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

MIN_AREA_PX = 80  # a visible region smaller than this is clutter, not an object


def generate_scene(seed: int, index: int, *, size: int = 256) -> tuple[NDArray[np.uint8], Floats]:
    """Draw scene number ``index`` of ``seed``.

    Returns:
        the image (size, size, 3) uint8 RGB and the visible regions of its objects and parts
        (M, size, size) float32 in {0, 1}, M >= 1.
    """
    rng = np.random.default_rng([seed, index])
    while True:
        image, regions = _draw(rng, size)
        if len(regions):
            return image, regions


def _draw(rng: Generator, size: int) -> tuple[NDArray[np.uint8], Floats]:
    canvas = _fill(rng, size, _random_colour(rng))
    visible: list[Floats] = []
    for _ in range(rng.integers(1, 7)):
        shape = _shape(rng, size, scale=float(np.exp(rng.uniform(np.log(0.06), np.log(0.42)))))
        if (shape > 0.5).sum() < MIN_AREA_PX:
            continue
        under = canvas[shape > 0.5].mean(axis=0)
        canvas = _paint(rng, canvas, shape, under)
        solid = (shape > 0.5).astype(np.float32)
        visible = [region * (1 - solid) for region in visible] + [solid]
        if rng.random() < 0.4:  # a part: it belongs to the whole, and is an object of its own
            part = _shape(rng, size, scale=0.12) * solid
            if (part > 0.5).sum() >= MIN_AREA_PX:
                canvas = _paint(rng, canvas, part, canvas[part > 0.5].mean(axis=0))
                visible.append((part > 0.5).astype(np.float32))
    canvas = _clutter(rng, canvas)
    canvas = _camera(rng, canvas)
    kept = [region for region in visible if region.sum() >= MIN_AREA_PX]
    stacked = np.stack(kept) if kept else np.zeros((0, size, size), np.float32)
    return np.clip(canvas, 0, 255).astype(np.uint8), stacked


def _random_colour(rng: Generator) -> Floats:
    return rng.uniform(20, 235, size=3).astype(np.float32)


def _field(rng: Generator, size: int, cells: int, channels: int = 1) -> Floats:
    """Draw smooth noise (size, size, channels) in about [-1, 1], with ``cells`` bumps a side."""
    coarse = rng.standard_normal((cells + 1, cells + 1, channels)).astype(np.float32)
    planes = [
        np.asarray(Image.fromarray(coarse[:, :, c]).resize((size, size), Image.Resampling.BICUBIC))
        for c in range(channels)
    ]
    return np.stack(planes, axis=-1)


def _fill(rng: Generator, size: int, colour: Floats) -> Floats:
    """Draw a textured surface (size, size, 3) around ``colour``, 0..255."""
    surface = colour + _field(rng, size, 2, 3) * rng.uniform(2, 25)
    kind = rng.integers(0, 5)
    strength = float(rng.uniform(3, 30))
    if kind == 0:
        surface += _field(rng, size, int(rng.integers(12, 64))) * strength
    elif kind == 1:  # stripes
        rows, cols = np.mgrid[0:size, 0:size].astype(np.float32)
        angle, period = rng.uniform(0, np.pi), rng.uniform(5, 40)
        wave = np.sin((rows * np.sin(angle) + cols * np.cos(angle)) * 2 * np.pi / period)
        surface += wave[:, :, None].astype(np.float32) * strength
    elif kind == 2:  # blotches
        surface += np.sign(_field(rng, size, int(rng.integers(8, 32)))) * strength * 0.6
    elif kind == 3:
        surface += _field(rng, size, int(rng.integers(30, 100)), 3) * strength * 0.7
    return surface.astype(np.float32)


def _shape(rng: Generator, size: int, *, scale: float) -> Floats:
    """Draw one anti-aliased shape (size, size) in [0, 1]; ``scale`` is its radius over ``size``."""
    centre = rng.uniform(0.1, 0.9, size=2) * size
    radius = scale * size
    kind = rng.integers(0, 6)
    if kind <= 2:  # a smooth or lobed blob
        turn = np.linspace(0, 2 * np.pi, 96, endpoint=False)
        order = int(rng.integers(2, 9))
        amplitudes = rng.normal(0, rng.uniform(0.05, 0.3), order) / np.arange(1, order + 1) ** 0.7
        phases = rng.uniform(0, 2 * np.pi, order)
        r = 1 + sum(
            a * np.cos((i + 1) * turn + p)
            for i, (a, p) in enumerate(zip(amplitudes, phases, strict=True))
        )
        stretch, angle = rng.uniform(0.5, 1.0), rng.uniform(0, np.pi)
        x, y = r * np.cos(turn), r * np.sin(turn) * stretch
        points = np.stack(
            [x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)], axis=1
        )
    elif kind == 3:  # a polygon
        corners = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 9))))
        lengths = rng.uniform(0.5, 1.1, len(corners))
        points = np.stack([np.cos(corners) * lengths, np.sin(corners) * lengths], axis=1)
    elif kind == 4:  # a box
        angle, aspect = rng.uniform(0, np.pi), rng.uniform(0.3, 1.0)
        box = np.array([[-1, -aspect], [1, -aspect], [1, aspect], [-1, aspect]])
        turn_matrix = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        points = box @ np.array(turn_matrix)
    else:  # a thick stroke
        return _stroke(rng, size, centre, radius)
    drawing = Image.new("L", (2 * size, 2 * size), 0)
    outline = [tuple(p) for p in (points * radius + centre) * 2]
    ImageDraw.Draw(drawing).polygon(outline, fill=255)
    small = drawing.resize((size, size), Image.Resampling.BOX)
    return np.asarray(small, np.float32) / np.float32(255)


def _stroke(rng: Generator, size: int, centre: Doubles, radius: float) -> Floats:
    """Draw a curved band (size, size) in [0, 1]."""
    steps = np.cumsum(rng.normal(0, 0.25, 24)) + rng.uniform(0, 2 * np.pi)
    path = np.cumsum(np.stack([np.cos(steps), np.sin(steps)], axis=1), axis=0) * radius / 8
    path = path - path.mean(axis=0) + centre
    drawing = Image.new("L", (size, size), 0)
    width = max(4, int(radius * rng.uniform(0.15, 0.5)))
    ImageDraw.Draw(drawing).line(
        [tuple(p) for p in path.tolist()], fill=255, width=width, joint="curve"
    )
    return np.asarray(drawing, np.float32) / np.float32(255)


def _paint(rng: Generator, canvas: Floats, shape: Floats, under: Floats) -> Floats:
    """Blend a textured ``shape`` over ``canvas``; often close in colour to what lies ``under``."""
    if rng.random() < 0.6:
        shift = rng.normal(0, 1, 3)
        shift = shift / np.linalg.norm(shift) * rng.uniform(18, 90)
        colour = np.clip(under + shift, 5, 250).astype(np.float32)
    else:
        colour = _random_colour(rng)
    surface = _fill(rng, canvas.shape[0], colour)
    alpha = shape
    if rng.random() < 0.6:  # the mask stays at the blurred edge's half level
        alpha = ndimage.gaussian_filter(shape, rng.uniform(0.5, 4.0)).astype(np.float32)
    alpha = alpha[:, :, None] * float(rng.uniform(0.7, 1.0))
    return canvas * (1 - alpha) + surface * alpha


def _clutter(rng: Generator, canvas: Floats) -> Floats:
    """Add thin curves, dots and glints, which belong to no object."""
    size = canvas.shape[0]
    drawing = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(drawing)
    if rng.random() < 0.4:
        ink = tuple(int(v) for v in _random_colour(rng))
        for _ in range(rng.integers(1, 20)):
            start = rng.uniform(0, size, 2)
            angle = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, 0.1, 16))
            step = rng.uniform(4, 14)
            path = start + np.cumsum(np.stack([np.cos(angle), np.sin(angle)], 1) * step, axis=0)
            pen.line([tuple(p) for p in path.tolist()], fill=ink, width=int(rng.integers(1, 4)))
    if rng.random() < 0.4:
        for _ in range(rng.integers(1, 30)):
            x, y = rng.uniform(0, size, 2)
            r = rng.uniform(1, 4)
            tone = tuple(int(v) for v in _random_colour(rng))
            pen.ellipse((x - r, y - r, x + r, y + r), fill=tone)
    return np.asarray(drawing, np.float32)


def _camera(rng: Generator, canvas: NDArray[Any]) -> Floats:
    """Add light, a colour cast, dark corners, blur and sensor noise."""
    size = canvas.shape[0]
    if rng.random() < 0.5:
        canvas = canvas * (1 + _field(rng, size, 1) * rng.uniform(0.05, 0.25))
    canvas = canvas * rng.uniform(0.75, 1.25, 3) + rng.uniform(-15, 15, 3)
    if rng.random() < 0.3:
        rows, cols = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
        distance = np.hypot(rows, cols)[:, :, None]
        shade = np.clip(1 - np.clip(distance - rng.uniform(0.6, 1.1), 0, 1) * 2, 0, 1)
        canvas = canvas * shade
    if rng.random() < 0.4:
        canvas = ndimage.gaussian_filter(canvas, (*[rng.uniform(0.4, 1.6)] * 2, 0))
    noise = rng.standard_normal(canvas.shape, dtype=np.float32) * rng.uniform(0, 10)
    return (canvas + noise).astype(np.float32)
