"""How good a predicted mask is: Dice, IoU and surface distances per image, and their summary.

Distances are in pixels of the masks that are passed in, so values at different image sizes must
never be set beside each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion, distance_transform_edt, find_objects

BoolMask = NDArray[np.bool_]
FloatArray = NDArray[np.float64]

_RESAMPLES = 1000  # of the bootstrap
_EXACT_GROUPS = 14  # up to so many, all sign patterns are counted: 2^14 are a moment's work
_FLIPS = 10_000  # random sign patterns where there are more groups


@dataclass(frozen=True)
class ImageMetrics:
    """One image's metrics, each the mean over the foreground classes 1..K.

    Where a class is empty in both masks it counts as right (Dice 1, IoU 1, distances 0); where it
    is empty in exactly one, Dice and IoU are 0 and the distances the image's diagonal.
    """

    dice: float  # 0..1
    iou: float  # 0..1
    hd95: float  # px, 95th percentile of both directed surface distances pooled (MedPy's)
    assd: float  # px, mean over the same pooled distances (MedPy's since 0.5)
    hd95_defined: float  # px, over classes present in both masks only; nan if there is none
    assd_defined: float  # px, likewise


def image_metrics(
    prediction: NDArray[np.uint8], truth: NDArray[np.uint8], *, num_classes: int
) -> ImageMetrics:
    """Compare two class-index masks.

    Args:
        prediction, truth: (H, W) uint8, 0 = background, 1..K = foreground classes.
        num_classes: K, at least 1.

    Raises:
        ValueError: the masks differ in shape, are empty, or hold a value above K.
    """
    _check_masks(prediction, truth, num_classes)
    per_class = [_class_metrics(prediction == k, truth == k) for k in range(1, num_classes + 1)]
    table = np.array(per_class, dtype=np.float64)  # (K, 6)
    defined = table[~np.isnan(table[:, 4]), 4:]
    of_defined = defined.mean(axis=0) if len(defined) else (math.nan, math.nan)
    return ImageMetrics(*map(float, (*table[:, :4].mean(axis=0), *of_defined)))


def dice_score(
    prediction: NDArray[np.uint8], truth: NDArray[np.uint8], *, num_classes: int
) -> float:
    """Return the Dice of ``image_metrics`` alone, for the same arguments, in less time."""
    _check_masks(prediction, truth, num_classes)
    classes = range(1, num_classes + 1)
    return float(np.mean([_overlap(prediction == k, truth == k)[0] for k in classes]))


def summarise(rows: Sequence[ImageMetrics], groups: Sequence[str], *, seed: int) -> dict[str, Any]:
    """Average over images, with 95 % percentile bootstrap intervals that resample whole groups.

    Images of one patient or video resemble each other: resampling single images would make the
    interval too narrow. With a single group the interval has no width and says nothing.

    Args:
        rows: N images' metrics, at least one. groups: the patient or video of each of them.
        seed: of the bootstrap draws; the same seed gives the same interval.

    Returns:
        JSON-ready: ``n``; the means of ``ImageMetrics``' fields, those ``_defined`` over the images
        where they are (None if there is none); ``dice_ci95``, ``hd95_ci95`` as [low, high].

    Raises:
        ValueError: as many groups as rows are not given.
    """
    table = np.array([astuple(row) for row in rows], dtype=np.float64)  # (N, 6)
    low, high = bootstrap_means(table[:, [0, 2]], groups, seed=seed)
    return {
        "n": len(rows),
        **dict(
            zip(("dice", "iou", "hd95", "assd"), table[:, :4].mean(axis=0).tolist(), strict=True)
        ),
        "dice_ci95": [float(low[0]), float(high[0])],
        "hd95_ci95": [float(low[1]), float(high[1])],
        "hd95_defined": _mean_of_defined(table[:, 4]),
        "assd_defined": _mean_of_defined(table[:, 5]),
    }


def bootstrap_means(
    values: FloatArray, groups: Sequence[str], *, seed: int
) -> tuple[FloatArray, FloatArray]:
    """Return 95 % percentile bootstrap intervals of means over images, resampling whole groups.

    All columns share the resamples, so that a column of differences is a paired comparison.

    Args:
        values: (N, M) float64, M values of each of N images. groups: N group names.

    Returns:
        The 2.5th and the 97.5th percentiles, (M,) float64 each.

    Raises:
        ValueError: as many groups as rows are not given.
    """
    sums, counts = _group_sums(values, groups)
    # How often each of G groups is drawn in G draws with replacement is multinomial.
    draws = np.random.default_rng(seed).multinomial(
        len(sums), np.full(len(sums), 1 / len(sums)), size=_RESAMPLES
    )
    means = (draws @ sums) / (draws @ counts)[:, None]  # (_RESAMPLES, M)
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return low, high


def sign_flip_test(differences: FloatArray, groups: Sequence[str], *, seed: int) -> float:
    """Return p of a two-sided paired permutation test: may the mean difference be 0?

    If two methods are alike, the sign of a group's summed difference is chance; p is the share of
    sign patterns whose total lies at least as far from 0 as the one found (Fisher 1935).
    All patterns are counted for up to 14 groups; for more, 10,000 random ones and the one
    found: p = (1 + count) / (1 + 10,000), never 0 (Phipson & Smyth 2010). With G groups p cannot
    be below 2 / 2^G; it is 1 where all differences are 0.

    Args:
        differences: (N,) float64, one value for each of N images.
        groups: N group names; a group's sign is flipped as a whole.

    Raises:
        ValueError: as many groups as differences are not given.
    """
    sums = _group_sums(differences[:, None], groups)[0][:, 0]
    # patterns that tie with the one found differ from it by rounding alone
    bar = abs(sums.sum()) - 1e-9 * np.abs(sums).sum()
    exact = len(sums) <= _EXACT_GROUPS
    if exact:
        bits = np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums)) & 1
    else:
        bits = np.random.default_rng(seed).integers(0, 2, (_FLIPS, len(sums)), dtype=np.int8)
    count = int(np.count_nonzero(np.abs((1 - 2 * bits) @ sums) >= bar))
    return count / len(bits) if exact else (1 + count) / (1 + _FLIPS)


def _check_masks(prediction: NDArray[Any], truth: NDArray[Any], num_classes: int) -> None:
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction has shape {prediction.shape} but truth {truth.shape}")
    highest = max(prediction.max(), truth.max())
    if highest > num_classes:  # would count as background in silence
        raise ValueError(f"a mask holds class {highest}; expected 0..{num_classes}")


def _overlap(prediction: BoolMask, truth: BoolMask) -> tuple[float, float]:
    """Return the Dice and IoU of one class, 1 where both masks are empty."""
    common = int(np.count_nonzero(prediction & truth))
    total = int(np.count_nonzero(prediction)) + int(np.count_nonzero(truth))
    return (2 * common / total, common / (total - common)) if total else (1.0, 1.0)


def _class_metrics(prediction: BoolMask, truth: BoolMask) -> tuple[float, ...]:
    """Return Dice, IoU, HD95, ASSD, then HD95 and ASSD again, nan where a mask is empty."""
    overlap = _overlap(prediction, truth)
    if prediction.any() and truth.any():
        return overlap + 2 * _surface_distances(prediction, truth)
    distance = math.hypot(*truth.shape) if prediction.any() or truth.any() else 0.0
    return *overlap, distance, distance, math.nan, math.nan


def _surface_distances(prediction: BoolMask, truth: BoolMask) -> tuple[float, float]:
    """Return the HD95 and ASSD, px, of two non-empty (H, W) masks."""
    # Outside the box there is no surface, so the crop changes no distance and saves most work.
    (box,) = find_objects((prediction | truth).astype(np.uint8))
    surface_p, surface_t = _surface(prediction[box]), _surface(truth[box])
    pooled = np.concatenate((_directed(surface_p, surface_t), _directed(surface_t, surface_p)))
    return float(np.percentile(pooled, 95)), float(pooled.mean())


def _directed(origin: BoolMask, target: BoolMask) -> FloatArray:
    """Return the distance, px, from each pixel of surface ``origin`` to ``target``'s nearest."""
    # The transform's indices are enough: distances at every pixel would cost as much again.
    nearest = distance_transform_edt(~target, return_distances=False, return_indices=True)
    pixels = np.nonzero(origin)
    distances: FloatArray = np.hypot(*(nearest[axis][pixels] - pixels[axis] for axis in (0, 1)))
    return distances


def _surface(mask: BoolMask) -> BoolMask:
    """Return the mask minus its erosion with 4-connectivity: (h, w) -> (h + 2, w + 2).

    The rim of 1 px is background: a mask has a surface at the image's border, as in MedPy.
    """
    padded = np.pad(mask, 1)
    surface: BoolMask = padded & ~binary_erosion(padded)
    return surface


def _group_sums(values: FloatArray, groups: Sequence[str]) -> tuple[FloatArray, FloatArray]:
    """Return sums (G, M) of ``values`` (N, M) and numbers of rows (G,) by group, by name."""
    if len(groups) != len(values):
        raise ValueError(f"found {len(groups)} groups for {len(values)} rows; expected one per row")
    names, group_of_row = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    sums = np.zeros((len(names), values.shape[1]))
    np.add.at(sums, group_of_row, values)
    return sums, np.bincount(group_of_row).astype(np.float64)


def _mean_of_defined(values: FloatArray) -> float | None:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else None
