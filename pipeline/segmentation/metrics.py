"""How good a predicted mask is: overlap and surface distances per image and class.

Distances are in pixels of the masks that are passed in, so values at different image sizes must
never be set beside each other, and in millimetres where the size of a pixel is known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion, distance_transform_edt, find_objects

BoolMask = NDArray[np.bool_]
FloatArray = NDArray[np.float64]


class Scale(NamedTuple):
    """A unit of distances: the size of a pixel in it, and the tolerance of the surface Dice."""

    row: float = 1.0  # from one row to the next
    column: float = 1.0  # from one column to the next
    tolerance: float = 2.0


PIXELS = Scale()


class Distances(NamedTuple):
    """Distances of two masks' surfaces, in one unit; nan where both masks are empty.

    Where exactly one is empty, ``hd95`` and ``assd`` are the image's diagonal, and ``nsd`` is 0.
    """

    hd95: float  # 95th percentile of both directed surface distances pooled (MedPy's)
    assd: float  # mean over the same pooled distances (MedPy's since 0.5)
    nsd: float  # 0..1, share of them within the tolerance: surface Dice (Nikolov et al. 2018)


_ABSENT = Distances(math.nan, math.nan, math.nan)
_NONE_THERE = Distances(0.0, 0.0, 1.0)  # of an image in which there is nothing to find


@dataclass(frozen=True)
class ClassMetrics:
    """One class of one image."""

    common: int  # pixels that are this class in both masks
    predicted: int
    true: int
    px: Distances
    mm: Distances  # all nan where the size of a pixel is not known

    @property
    def dice(self) -> float:
        """Dice 0..1; nan where the class is absent from both masks."""
        return 2 * self.common / (self.predicted + self.true) if self.present else math.nan

    @property
    def iou(self) -> float:
        """Intersection over union 0..1; nan where the class is absent from both masks."""
        union = self.predicted + self.true - self.common
        return self.common / union if self.present else math.nan

    @property
    def present(self) -> bool:
        """Whether at least one of the masks has the class."""
        return self.predicted + self.true > 0

    def values(self) -> dict[str, float]:
        """Return ``CLASS_SCORES`` by name."""
        found = (self.dice, self.iou, *self.px, *self.mm)
        return dict(zip(CLASS_SCORES, found, strict=True))


CLASS_SCORES = ("dice", "iou", "hd95", "assd", "nsd", "hd95_mm", "assd_mm", "nsd_mm")


@dataclass(frozen=True)
class ImageMetrics:
    """One image's metrics, each the mean over the foreground classes that it is scored on.

    These are the classes that truth or prediction has: a class that is absent from both is left
    out. An image without any class in truth and prediction counts as right (Dice, IoU and NSD 1,
    distances 0), with one class as with several. Where a class is in one mask alone, Dice, IoU and
    NSD are 0 and the distances the image's diagonal.
    """

    dice: float  # 0..1
    iou: float  # 0..1
    hd95: float  # px, as in ``Distances``
    assd: float  # px
    hd95_defined: float  # px, over classes present in both masks only; nan if there is none
    assd_defined: float  # px, likewise
    nsd: float  # 0..1, at the tolerance in px
    hd95_mm: float = math.nan  # mm; nan where the size of a pixel is not known
    assd_mm: float = math.nan  # mm
    nsd_mm: float = math.nan  # 0..1, at the tolerance in mm
    classes: tuple[ClassMetrics, ...] = ()  # 1..K

    def values(self) -> tuple[float, ...]:
        """Return the values named by ``IMAGE_SCORES``."""
        return tuple(getattr(self, name) for name in IMAGE_SCORES)


IMAGE_SCORES = tuple(each.name for each in fields(ImageMetrics))[:-1]


def image_metrics(
    prediction: NDArray[np.uint8],
    truth: NDArray[np.uint8],
    *,
    num_classes: int,
    px: Scale = PIXELS,
    mm: Scale | None = None,
) -> ImageMetrics:
    """Compare two class-index masks.

    Args:
        prediction, truth: (H, W) uint8, 0 = background, 1..K = foreground classes.
        num_classes: K, at least 1.
        px: the tolerance in pixels. mm: a pixel's size and the tolerance in mm, where it is known.

    Raises:
        ValueError: the masks differ in shape, are empty, or hold a value above K.
    """
    _check_masks(prediction, truth, num_classes)
    classes = tuple(
        _class_metrics(prediction == k, truth == k, px, mm) for k in range(1, num_classes + 1)
    )
    table = np.array([list(each.values().values()) for each in classes])
    means = over_classes(table, in_mm=mm is not None).tolist()
    both = [each.px[:2] for each in classes if each.predicted and each.true]
    defined = np.mean(both, axis=0).tolist() if both else [math.nan, math.nan]
    values = (*means[:4], *defined, *means[4:])
    return ImageMetrics(**dict(zip(IMAGE_SCORES, values, strict=True)), classes=classes)


def over_classes(table: FloatArray, *, in_mm: bool) -> FloatArray:
    """Return the means (8,) of ``CLASS_SCORES`` (K, 8) over the classes that are not absent.

    Without any class they are those of an image in which there is nothing to find, ``in_mm`` too
    where the size of its pixels is known.
    """
    present = table[~np.isnan(table[:, 0])]
    if not len(present):
        unknown = _NONE_THERE if in_mm else _ABSENT
        return np.array((1.0, 1.0, *_NONE_THERE, *unknown))
    means: FloatArray = present.mean(axis=0)
    return means


def dice_score(
    prediction: NDArray[np.uint8], truth: NDArray[np.uint8], *, num_classes: int
) -> float:
    """Return the Dice of ``image_metrics`` alone, for the same arguments, in less time."""
    _check_masks(prediction, truth, num_classes)
    classes = (_counts(prediction == k, truth == k) for k in range(1, num_classes + 1))
    present = [2 * common / (one + two) for common, one, two in classes if one + two]
    return float(np.mean(present)) if present else 1.0


def _check_masks(prediction: NDArray[Any], truth: NDArray[Any], num_classes: int) -> None:
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction has shape {prediction.shape} but truth {truth.shape}")
    highest = max(prediction.max(), truth.max())
    if highest > num_classes:  # would count as background in silence
        raise ValueError(f"a mask holds class {highest}; expected 0..{num_classes}")


def _counts(prediction: BoolMask, truth: BoolMask) -> tuple[int, int, int]:
    """Return the pixels of both masks, of the prediction and of the truth."""
    masks = (prediction & truth, prediction, truth)
    common, predicted, true = (int(np.count_nonzero(mask)) for mask in masks)
    return common, predicted, true


def _class_metrics(
    prediction: BoolMask, truth: BoolMask, px: Scale, mm: Scale | None
) -> ClassMetrics:
    counts = _counts(prediction, truth)
    in_mm = _ABSENT if mm is None else _distances(prediction, truth, mm)
    return ClassMetrics(*counts, _distances(prediction, truth, px), in_mm)


def _distances(prediction: BoolMask, truth: BoolMask, scale: Scale) -> Distances:
    """Return the distances of the surfaces of two (H, W) masks in the unit of ``scale``."""
    if not (prediction.any() and truth.any()):
        if not (prediction.any() or truth.any()):
            return _ABSENT
        height, width = truth.shape
        diagonal = math.hypot(height * scale.row, width * scale.column)
        return Distances(diagonal, diagonal, 0.0)
    # Outside the box there is no surface, so the crop changes no distance and saves most work.
    (box,) = find_objects((prediction | truth).astype(np.uint8))
    surface_p, surface_t = _surface(prediction[box]), _surface(truth[box])
    pooled = np.concatenate(
        (_directed(surface_p, surface_t, scale), _directed(surface_t, surface_p, scale))
    )
    # 0.3 mm times ten is a little more than 3 mm; it shall lie within a tolerance of 3 mm
    within = float(np.mean(pooled <= scale.tolerance * (1 + 1e-9)))
    return Distances(float(np.percentile(pooled, 95)), float(pooled.mean()), within)


def _directed(origin: BoolMask, target: BoolMask, scale: Scale) -> FloatArray:
    """Return the distance from each pixel of surface ``origin`` to ``target``'s nearest."""
    # The transform's indices are enough: distances at every pixel would cost as much again.
    nearest = distance_transform_edt(
        ~target, sampling=scale[:2], return_distances=False, return_indices=True
    )
    pixels = np.nonzero(origin)
    rows, columns = ((nearest[axis][pixels] - pixels[axis]) * scale[axis] for axis in (0, 1))
    distances: FloatArray = np.hypot(rows, columns)
    return distances


def _surface(mask: BoolMask) -> BoolMask:
    """Return the mask minus its erosion with 4-connectivity: (h, w) -> (h + 2, w + 2).

    The rim of 1 px is background: a mask has a surface at the image's border, as in MedPy.
    """
    padded = np.pad(mask, 1)
    surface: BoolMask = padded & ~binary_erosion(padded)
    return surface
