"""Generated dermoscopy-like images with exact masks: what they show, and how they are drawn.

Nothing is drawn over a photograph: an image is light that crossed layers of pigment (Beer-Lambert),
then what lies on the skin, then a camera.

Lengths are fractions of the image height; *density* is optical density to the base e, per colour.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

SUPERSAMPLING = 3  # thin strokes are drawn larger, then averaged down

Field = npt.NDArray[np.floating[Any]]  # float32 in fact
Range = tuple[float, float]
Pixels = npt.NDArray[np.uint8]

# Density of one unit of each pigment for red, green and blue light.
MELANIN = np.array([0.42, 0.80, 1.15], np.float32)
BLOOD = np.array([0.10, 0.80, 0.62], np.float32)
VEIL = np.array([1.15, 0.85, 0.50], np.float32)  # melanin deep in the skin looks blue
INK = np.array([1.30, 1.40, 0.35], np.float32)
LAMP = np.array([1.00, 0.96, 0.93], np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What one site's patients and camera look like; a range is drawn from uniformly.

    The defaults are a clinic with a good dermatoscope: clean, centred, mid-tone skin.
    """

    aspect: float = 1.0  # width / height
    skin_melanin: Range = (0.25, 0.45)
    skin_blood: Range = (0.25, 0.45)
    blotches: float = 0.04  # spread of the slow variation of the skin, in pigment units
    lesion_melanin: Range = (0.9, 1.7)
    lesion_blood: Range = (0.0, 0.3)
    area: Range = (0.10, 0.35)  # lesion / image
    offset: float = 0.05  # standard deviation of the lesion's centre, in heights
    softness: Range = (0.05, 0.15)  # width of the boundary, in lesion radii
    hairs: Range = (0, 4)  # this and the next two: how many in an image
    bubbles: Range = (0, 1)
    freckles: Range = (0, 3)
    ruler: float = 0.05  # this and the next three: probability per image
    ink: float = 0.0
    fold: float = 0.1
    aperture: float = 0.0  # a round, black-cornered field of view
    vignette: Range = (0.0, 0.15)  # light lost at the corners, 0..1
    cast: tuple[float, float, float] = (1.0, 1.0, 1.0)  # gain of red, green, blue
    exposure: Range = (0.95, 1.1)
    blur: Range = (0.0, 0.004)  # standard deviation, in heights
    noise: Range = (0.005, 0.012)  # standard deviation, full scale = 1


# Tuned once, before any method was compared on it (130 images a site, 128 px, seed 7; a small U-Net
# at 64 px, 400 steps, mean Dice on held-out patients of all sites, three runs): 20 labels of site_a
# give 0.64 to 0.67, labels of every site 0.89.
SITES: dict[str, Site] = {
    "site_a": Site(),
    # Darker skin, much hair, little contrast.
    "site_b": Site(
        aspect=1.125, skin_melanin=(0.9, 1.5), skin_blood=(0.2, 0.4), blotches=0.10,
        lesion_melanin=(0.45, 0.9), lesion_blood=(0.0, 0.2), area=(0.08, 0.40), offset=0.10,
        softness=(0.10, 0.25), hairs=(15, 45), bubbles=(0, 1), freckles=(2, 10), ruler=0.1,
        ink=0.15, fold=0.5, aperture=0.1, vignette=(0.1, 0.3), cast=(1.05, 1.0, 0.9),
        exposure=(0.9, 1.2), blur=(0.002, 0.008), noise=(0.01, 0.025),
    ),
    # An immersion dermatoscope with a tube: dark corners, blue-green light, gel, small lesions.
    "site_c": Site(
        aspect=1.0, skin_melanin=(0.2, 0.6), skin_blood=(0.3, 0.6), blotches=0.08,
        lesion_melanin=(0.5, 1.2), lesion_blood=(0.0, 0.4), area=(0.04, 0.12), offset=0.16,
        softness=(0.08, 0.22), hairs=(0, 10), bubbles=(4, 14), freckles=(1, 8), ruler=0.5,
        ink=0.3, fold=0.2, aperture=0.7, vignette=(0.4, 0.75), cast=(0.68, 1.0, 1.08),
        exposure=(0.85, 1.1), blur=(0.002, 0.01), noise=(0.01, 0.02),
    ),
    # A phone: over-exposed, noisy, 4:3, pale pink skin, lesions with little pigment.
    "site_d": Site(
        aspect=4 / 3, skin_melanin=(0.05, 0.18), skin_blood=(0.35, 0.6), blotches=0.10,
        lesion_melanin=(0.0, 0.22), lesion_blood=(0.35, 0.8), area=(0.05, 0.30), offset=0.12,
        softness=(0.10, 0.28), hairs=(0, 8), bubbles=(0, 3), freckles=(4, 14), ruler=0.2,
        ink=0.35, fold=0.3, aperture=0.0, vignette=(0.0, 0.25), cast=(1.08, 0.98, 0.98),
        exposure=(1.2, 1.5), blur=(0.002, 0.008), noise=(0.035, 0.07),
    ),
}  # fmt: skip

# The probability that a patient's lesion shows a structure.
STRUCTURES = {"veil": 0.25, "network": 0.6, "globules": 0.45, "streaks": 0.35, "regression": 0.4}


@dataclass(frozen=True, slots=True)
class Patient:
    """What the images of one patient share; units as in :class:`Site`."""

    skin_melanin: float
    skin_blood: float
    lesion_melanin: float
    lesion_blood: float
    softness: float
    structures: dict[str, float]  # strength of each of STRUCTURES, 0 = absent
    blond: bool  # hair lighter than the skin
    images: int  # 1..3


def _draw(rng: np.random.Generator, limits: Range) -> float:
    return float(rng.uniform(*limits))


def _count(rng: np.random.Generator, limits: Range) -> int:
    return int(rng.integers(int(limits[0]), int(limits[1]) + 1))


def draw_patient(site: Site, rng: np.random.Generator) -> Patient:
    """Draw what all images of one patient of ``site`` share."""
    present = rng.random(len(STRUCTURES)) < list(STRUCTURES.values())
    strengths = present * rng.uniform(0.4, 1.0, len(STRUCTURES))
    pigments = (site.skin_melanin, site.skin_blood, site.lesion_melanin, site.lesion_blood)
    melanin, blood, lesion_melanin, lesion_blood = (_draw(rng, limits) for limits in pigments)
    softness, blond = _draw(rng, site.softness), bool(rng.random() < 0.3)
    images, shows = _count(rng, (1, 3)), dict(zip(STRUCTURES, map(float, strengths), strict=True))
    return Patient(melanin, blood, lesion_melanin, lesion_blood, softness, shows, blond, images)


def _sigmoid(x: Field) -> Field:
    return np.asarray(0.5 + 0.5 * np.tanh(0.5 * x))


class _Canvas:
    """The image being made: its frame, and its own random stream, used in a fixed order."""

    def __init__(self, rng: np.random.Generator, shape_hw: tuple[int, int]) -> None:
        self.rng, (h, w) = rng, shape_hw
        self.shape_hw, self.aspect = shape_hw, w / h
        y, x = np.mgrid[:h, :w].astype(np.float32)
        self.y: Field = (y + np.float32(0.5 - h / 2)) / np.float32(h)
        self.x: Field = (x + np.float32(0.5 - w / 2)) / np.float32(h)

    def noise(self, cells: int) -> Field:
        """Draw smooth noise (H, W): mean 0, deviation about 0.7, ``cells`` bumps a height."""
        across = math.ceil(cells * self.aspect)
        knots = self.rng.standard_normal((cells + 2, across + 2), np.float32)
        # The outer ring of knots is cut off: Pillow holds the edge constant, which would show.
        box = (1.0, 1.0, 1.0 + cells * self.aspect, 1.0 + cells)
        size_wh = self.shape_hw[::-1]
        return np.asarray(Image.fromarray(knots).resize(size_wh, Image.Resampling.BICUBIC, box))

    def point(self, spread: float = 0.5) -> tuple[float, float]:
        """Draw a point (y, x), uniform over the middle ``2 * spread`` of the image."""
        y, x = self.rng.uniform(-spread, spread, 2)
        return float(y), float(x) * self.aspect

    def distance(self, centre_yx: tuple[float, float]) -> Field:
        return np.asarray(np.hypot(self.y - centre_yx[0], self.x - centre_yx[1]))

    def strokes(self, lines_yx: list[npt.NDArray[np.float64]], width: float) -> Field:
        """Draw polylines, each (points, 2) in the canvas's frame; returns coverage (H, W), 0..1."""
        h, w = self.shape_hw
        layer = Image.new("L", (w * SUPERSAMPLING, h * SUPERSAMPLING))
        pen, scale = ImageDraw.Draw(layer), h * SUPERSAMPLING
        for line in lines_yx:
            xy = (line[:, ::-1] + (self.aspect / 2, 0.5)) * scale
            pen.line([(float(x), float(y)) for x, y in xy], 255, max(1, round(width * scale)))
        return np.asarray(layer.resize((w, h), Image.Resampling.BOX), np.float32) / np.float32(255)


def _lesion_level(canvas: _Canvas, site: Site) -> tuple[Field, Field]:
    """Draw the lesion's shape: (level, angle), each (H, W).

    ``level`` is in lesion radii: 0 on the outline, positive inside, 1 at most; ``angle`` is in
    radians around the centre. The area is exact: the outline is a quantile of the gauge.
    """
    rng = canvas.rng
    area = _draw(rng, site.area)
    radius = math.sqrt(area * canvas.aspect / math.pi)
    cy, cx = (float(c) for c in np.clip(rng.normal(0, site.offset, 2), -0.28, 0.28))
    stretch, turn = math.sqrt(_draw(rng, (1.0, 1.8))), _draw(rng, (0, math.pi))
    dy, dx = canvas.y - cy, canvas.x - cx * canvas.aspect
    u: Field = (dx * math.cos(turn) + dy * math.sin(turn)) / (radius * stretch)
    v: Field = (dy * math.cos(turn) - dx * math.sin(turn)) * (stretch / radius)
    angle: Field = np.arctan2(v, u)
    outline = np.ones_like(u)
    for order in range(2, 8):
        outline += float(rng.normal(0, 0.3 / order)) * np.cos(order * angle + _draw(rng, (0, 6.3)))
    gauge = np.hypot(u, v) / np.maximum(outline, 0.4)
    for _ in range(_count(rng, (0, 3))):  # lobes that grow out of the body
        at, size = _draw(rng, (-math.pi, math.pi)), _draw(rng, (0.35, 0.6))
        lobe = np.hypot(u - 0.75 * math.cos(at), v - 0.75 * math.sin(at)) / size
        gauge = np.minimum(gauge, lobe)
    gauge += 0.05 * canvas.noise(9) + 0.03 * canvas.noise(22)
    edge = np.float32(np.quantile(gauge, area))
    return 1 - gauge / edge, angle


def _lesion_density(canvas: _Canvas, patient: Patient, level: Field, angle: Field) -> Field:
    """Return the density (H, W, 3) that the lesion adds; half of it is left on the outline."""
    rng, shows = canvas.rng, patient.structures
    # The boundary is sharp here and fades there, as in a real lesion.
    width = patient.softness * np.exp(0.6 * canvas.noise(4))
    opacity = _sigmoid(4 * level / width)
    fading = 1 - 0.2 * (1 + np.cos(angle - _draw(rng, (0, 2 * math.pi))))
    pigment = fading * (1 + 0.35 * canvas.noise(5) + 0.15 * canvas.noise(14))
    pitch = _draw(rng, (75, 110))  # radians per height: the mesh of the pigment network
    y, x = canvas.y + 0.012 * canvas.noise(9), canvas.x + 0.012 * canvas.noise(9)
    waves = [np.cos(pitch * (x * math.cos(a) + y * math.sin(a))) for a in (0.3, 2.394, 4.488)]
    pigment -= 0.22 * shows["network"] * sum(waves)
    dots = _sigmoid(9 * (canvas.noise(30) - 0.9))
    pigment += 1.1 * shows["globules"] * dots
    rays = _sigmoid(6 * np.cos(_count(rng, (14, 26)) * angle + canvas.noise(6)) - 2)
    pigment += 0.9 * shows["streaks"] * rays * np.exp(-(((level - 0.12) / 0.15) ** 2))
    scar = _sigmoid(7 * (canvas.noise(5) - 0.55))
    pigment *= 1 - 0.75 * shows["regression"] * scar
    pigment = np.maximum(pigment, 0.12)
    red = np.maximum(1 + 0.4 * canvas.noise(5), 0.2)
    veil = 0.6 * shows["veil"] * patient.lesion_melanin * _sigmoid(6 * (canvas.noise(4) - 0.3))
    density: Field = np.multiply.outer(opacity * pigment * patient.lesion_melanin, MELANIN)
    density += np.multiply.outer(opacity * red * patient.lesion_blood, BLOOD)
    density += np.multiply.outer(opacity * veil, VEIL)
    return density


def _skin_density(canvas: _Canvas, site: Site, patient: Patient) -> Field:
    """Return the density (H, W, 3) of healthy skin: variation, lines, pores, freckles, folds."""
    rng = canvas.rng
    melanin = patient.skin_melanin + site.blotches * (canvas.noise(3) + 0.5 * canvas.noise(7))
    blood = patient.skin_blood + site.blotches * (canvas.noise(3) + 0.4 * canvas.noise(10))
    texture = 0.03 * canvas.noise(24) + 0.03 * canvas.noise(48)
    pores = 0.12 * _sigmoid(10 * (canvas.noise(40) - 1.3))
    melanin += (0.4 + patient.skin_melanin) * (texture + pores)
    for _ in range(_count(rng, site.freckles)):
        spot = canvas.distance(canvas.point()) / _draw(rng, (0.008, 0.04)) + 0.2 * canvas.noise(12)
        strength = _draw(rng, (0.2, 0.9)) * (0.3 + patient.lesion_melanin)
        melanin += strength * _sigmoid(6 * (1 - spot))
    if rng.random() < site.fold:
        across, turn = _draw(rng, (4, 14)), _draw(rng, (0, math.pi))
        along = canvas.x * math.cos(turn) + canvas.y * math.sin(turn) + 0.06 * canvas.noise(3)
        blood += 0.3 * np.abs(np.cos(across * along)) ** 24
    density = np.multiply.outer(np.maximum(melanin, 0), MELANIN)
    density += np.multiply.outer(np.maximum(blood, 0), BLOOD)
    if rng.random() < site.ink:
        blot = canvas.distance(canvas.point(0.48)) / _draw(rng, (0.05, 0.13))
        blot += 0.25 * canvas.noise(6)
        density += np.multiply.outer(_draw(rng, (0.4, 0.9)) * _sigmoid(8 * (1 - blot)), INK)
    return density


def _hair(canvas: _Canvas, count: int, width: float) -> Field:
    """Return the coverage (H, W) of ``count`` bent hairs that lie mostly one way."""
    rng, lines = canvas.rng, []
    lie = _draw(rng, (0, math.pi))
    t = np.linspace(-0.5, 0.5, 13)
    for _ in range(count):
        turn, length, bend = rng.normal(lie, 0.5), rng.uniform(0.3, 1.1), rng.normal(0, 0.25)
        along, aside = length * t, length * bend * (t * t - 0.1)
        y = along * math.sin(turn) + aside * math.cos(turn)
        x = along * math.cos(turn) - aside * math.sin(turn)
        lines.append(np.stack([y, x], axis=1) + canvas.point())
    return canvas.strokes(lines, width)


def _add_overlays(canvas: _Canvas, site: Site, patient: Patient, light: Field) -> Field:
    """Return the light (H, W, 3) after what lies on the skin: hairs, a ruler, gel bubbles."""
    rng = canvas.rng
    hair = _hair(canvas, _count(rng, site.hairs), _draw(rng, (0.006, 0.012)))[..., None]
    tone = np.array([0.85, 0.72, 0.5] if patient.blond else [0.12, 0.09, 0.08], np.float32)
    light = light * (1 - 0.8 * hair) + 0.8 * hair * tone
    if rng.random() < site.ruler:
        edge, flip = _draw(rng, (0.32, 0.46)), 1 if rng.random() < 0.5 else -1
        at = np.arange(-0.5, 0.5, 0.05) * canvas.aspect
        long = np.where(np.arange(at.size) % 5 == 0, 0.07, 0.035)
        ends = zip(at, long, strict=True)
        marks = [np.array([[edge, a], [edge + tick, a]]) * (flip, 1) for a, tick in ends]
        light = light * (1 - 0.75 * canvas.strokes(marks, 0.008)[..., None])
    for _ in range(_count(rng, site.bubbles)):
        (cy, cx), radius = canvas.point(), _draw(rng, (0.015, 0.06))
        away = canvas.distance((cy, cx)) / radius
        rim = 0.3 * np.exp(-(((away - 1) / 0.12) ** 2))
        rim -= 0.12 * np.exp(-(((away - 0.8) / 0.1) ** 2))
        glint = canvas.distance((cy - 0.4 * radius, cx - 0.4 * radius)) / (0.25 * radius)
        light = light + (rim + 0.7 * np.exp(-(glint**2)))[..., None]
    return light


def _photograph(canvas: _Canvas, site: Site, light: Field) -> Pixels:
    """Send light (H, W, 3), 1 = white, through the site's lamp, lens and sensor; RGB uint8."""
    rng = canvas.rng
    tilt, slope = _draw(rng, (0, 2 * math.pi)), _draw(rng, (0.0, 0.25))
    lamp = 1 + slope * (canvas.x * math.cos(tilt) + canvas.y * math.sin(tilt))
    off_axis = canvas.distance((0.0, 0.0)) / (0.5 * math.hypot(1, canvas.aspect))
    lamp = lamp * (1 - _draw(rng, site.vignette) * off_axis**2.5)
    if rng.random() < site.aperture:
        hole = canvas.distance(canvas.point(0.02)) - _draw(rng, (0.48, 0.62))
        lamp = lamp * (0.03 + 0.97 * _sigmoid(-hole / 0.008))
    gains = np.array(site.cast) * rng.normal(1, 0.03, 3) * _draw(rng, site.exposure)
    light = light * lamp[..., None] * gains.astype(np.float32)
    # Over-exposure bends towards white before it clips, as sensors and skin do.
    light = np.where(light > 0.8, 0.8 + 0.2 * np.tanh((light - 0.8) / 0.2), light)
    exact = Image.fromarray(np.rint(255 * np.clip(light, 0, 1)).astype(np.uint8))
    sigma_px = _draw(rng, site.blur) * canvas.shape_hw[0]
    seen = np.asarray(exact.filter(ImageFilter.GaussianBlur(sigma_px)), np.float32) / 255
    # Pixel noise is drawn last: everything before it is the same at every size.
    grain = rng.standard_normal(seen.shape, np.float32) * (0.5 + np.sqrt(seen))
    seen = seen + _draw(rng, site.noise) * grain
    return np.rint(255 * np.clip(seen, 0, 1)).astype(np.uint8)


def render(
    site: Site, patient: Patient, rng: np.random.Generator, size_px: int
) -> tuple[Pixels, Pixels]:
    """Make one image, RGB (H, W, 3) uint8, and its mask (H, W) uint8, 0 or 255."""
    canvas = _Canvas(rng, (size_px, round(size_px * site.aspect)))
    level, angle = _lesion_level(canvas, site)
    density = _skin_density(canvas, site, patient)
    density += _lesion_density(canvas, patient, level, angle)
    light = _add_overlays(canvas, site, patient, LAMP * np.exp(-density))
    mask = np.where(level >= 0, 255, 0).astype(np.uint8)
    return _photograph(canvas, site, light), mask
