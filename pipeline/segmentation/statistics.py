"""What the scores of many images say: means, intervals, a paired test, classes and patients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.segmentation.metrics import CLASS_SCORES, IMAGE_SCORES, ImageMetrics, over_classes

FloatArray = NDArray[np.float64]

_RESAMPLES = 1000  # of the bootstrap
_EXACT_GROUPS = 14  # up to so many, all sign patterns are counted: 2^14 are a moment's work
_FLIPS = 10_000  # random sign patterns where there are more groups
_RIGHT = (1.0, 1.0, 0.0, 0.0)  # Dice, IoU, HD95 and ASSD of a class that is rightly not found


def summarise(
    rows: Sequence[ImageMetrics],
    groups: Sequence[str],
    *,
    seed: int,
    names: Sequence[str] = ("foreground",),
) -> dict[str, Any]:
    """Average over images, with 95 % percentile bootstrap intervals that resample whole groups.

    Images of one patient or video resemble each other: resampling single images would make the
    interval too narrow. A single group says nothing of others, so it has no interval.

    Args:
        rows: N images' metrics, at least one. groups: the patient or video of each of them.
        seed: of the bootstrap draws; the same seed gives the same interval.
        names: of the classes 1..K.

    Returns:
        JSON-ready, None where there is no value: ``n``; the means of ``IMAGE_SCORES``, each over
        the images where it is defined; ``dice_ci95``, ``hd95_ci95`` as [low, high];
        ``empty_images``, those without a class in truth and prediction; ``absent_as_right``, the
        means if a class that is absent from both counted 1; ``classes`` by name, with ``n``
        images of truth or prediction each, and their ``class_mean``; ``groups``, which
        ``_of_groups`` describes.

    Raises:
        ValueError: as many groups as rows are not given.
    """
    table = np.array([row.values() for row in rows], dtype=np.float64)  # (N, 10)
    classes = _class_tables(rows)
    right = np.where(np.isnan(classes[..., :4]), _RIGHT, classes[..., :4]).mean(axis=(0, 1))
    pairs = intervals(table[:, [0, 2]], groups, seed=seed)
    by_class = {name: _of_class(rows, groups, index, seed=seed) for index, name in enumerate(names)}
    return {
        "n": len(rows),
        **_means(table, IMAGE_SCORES),
        **dict(zip(("dice_ci95", "hd95_ci95"), pairs, strict=True)),
        "empty_images": int(np.isnan(classes[..., 0]).all(axis=1).sum()),
        "absent_as_right": dict(zip(CLASS_SCORES[:4], right.tolist(), strict=True)),
        "classes": by_class,
        "class_mean": mean_of(list(by_class.values()), CLASS_SCORES),
        "groups": _of_groups(rows, groups, seed=seed, names=names),
    }


def mean_of(summaries: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, float | None]:
    """Return plain means of values by name, over the summaries that have them; None if none has."""
    table = np.array([[each.get(name) for name in names] for each in summaries], dtype=np.float64)
    return _means(table.reshape(-1, len(names)), names)


def intervals(values: FloatArray, groups: Sequence[str], *, seed: int) -> list[list[float] | None]:
    """Return ``bootstrap_means`` of each column as [low, high]; None for fewer than two groups."""
    if len(groups) == len(values) and len(set(groups)) < 2:
        return [None] * values.shape[1]
    low, high = bootstrap_means(values, groups, seed=seed)
    return [[float(one), float(two)] for one, two in zip(low, high, strict=True)]


def group_tables(rows: Sequence[ImageMetrics], groups: Sequence[str]) -> dict[str, FloatArray]:
    """Return by group, sorted, what its classes score: (K, 8) float64, ``CLASS_SCORES`` each.

    Dice and IoU are those of all pixels of the group together, as of a volume whose slices the
    images are; distances and NSD are means over its images. nan where a class is absent from all.
    """
    tables, found = _class_tables(rows), dict[str, FloatArray]()
    counts = np.array([[(c.common, c.predicted, c.true) for c in row.classes] for row in rows])
    for group in sorted(set(groups)):
        own = np.array([each == group for each in groups])
        common, predicted, true = counts[own].sum(axis=0).astype(np.float64).T
        with np.errstate(invalid="ignore"):  # 0 / 0 is nan: absent
            overlap = 2 * common / (predicted + true), common / (predicted + true - common)
        distances = np.array([_column_means(table) for table in tables[own, :, 2:].swapaxes(0, 1)])
        found[group] = np.column_stack((*overlap, distances))
    return found


def _class_tables(rows: Sequence[ImageMetrics]) -> FloatArray:
    """Return ``CLASS_SCORES`` of every image and class: (N, K, 8), nan where it is absent."""
    return np.array([[list(c.values().values()) for c in row.classes] for row in rows], np.float64)


def _of_class(
    rows: Sequence[ImageMetrics], groups: Sequence[str], index: int, *, seed: int
) -> dict[str, Any]:
    """Return the means of a class over the images whose truth or prediction has it."""
    pairs = [(row.classes[index], g) for row, g in zip(rows, groups, strict=True)]
    present = [(each, group) for each, group in pairs if each.present]
    table = np.array([list(each.values().values()) for each, _ in present], dtype=np.float64)
    table = table.reshape(-1, len(CLASS_SCORES))
    both = np.array([each.predicted > 0 and each.true > 0 for each, _ in present], dtype=bool)
    return {
        "n": len(present),
        **_means(table, CLASS_SCORES),
        "dice_ci95": intervals(table[:, :1], [group for _, group in present], seed=seed)[0],
        **_means(table[both, 2:4], ("hd95_defined", "assd_defined")),
    }


def _of_groups(
    rows: Sequence[ImageMetrics], groups: Sequence[str], *, seed: int, names: Sequence[str]
) -> dict[str, Any]:
    """Average over groups, each counting the same: what cardiac and brain tasks report.

    Returns:
        ``n`` groups, the means of ``CLASS_SCORES`` as ``group_tables`` defines them and over the
        classes of each group, ``dice_sd`` over groups, ``dice_ci95``, and ``classes`` likewise.
    """
    tables = group_tables(rows, groups)
    stacked = np.stack([*tables.values()])  # (G, K, 8)
    in_mm = not any(math.isnan(row.hd95_mm) for row in rows)
    means = np.array([over_classes(table, in_mm=in_mm) for table in stacked])
    return {
        "n": len(tables),
        **_means(means, CLASS_SCORES),
        "dice_sd": _sd(means[:, 0]),
        "dice_ci95": intervals(means[:, :1], list(tables), seed=seed)[0],
        "classes": {
            name: {
                "n": int(np.count_nonzero(~np.isnan(stacked[:, index, 0]))),
                **_means(stacked[:, index], CLASS_SCORES),
                "dice_sd": _sd(stacked[:, index, 0]),
            }
            for index, name in enumerate(names)
        },
    }


def _sd(values: FloatArray) -> float | None:
    """Return the standard deviation of the values that are there; None for fewer than two."""
    there = values[~np.isnan(values)]
    return float(there.std(ddof=1)) if len(there) > 1 else None


def _means(table: FloatArray, names: Sequence[str]) -> dict[str, float | None]:
    """Return the mean of each named column (N, M) where it is defined; None where it never is."""
    means = _column_means(table).tolist()
    return {k: None if math.isnan(v) else v for k, v in zip(names, means, strict=True)}


def _column_means(table: FloatArray) -> FloatArray:
    """Return means (M,) of the columns (N, M) without their nan; nan where nothing is left."""
    means: FloatArray = table.mean(axis=0) if len(table) else np.full(table.shape[1], math.nan)
    for index in np.flatnonzero(np.isnan(means)):
        there = table[~np.isnan(table[:, index]), index]
        means[index] = there.mean() if len(there) else math.nan
    return means


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


def _group_sums(values: FloatArray, groups: Sequence[str]) -> tuple[FloatArray, FloatArray]:
    """Return sums (G, M) of ``values`` (N, M) and numbers of rows (G,) by group, by name."""
    if len(groups) != len(values):
        raise ValueError(f"found {len(groups)} groups for {len(values)} rows; expected one per row")
    names, group_of_row = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    sums = np.zeros((len(names), values.shape[1]))
    np.add.at(sums, group_of_row, values)
    return sums, np.bincount(group_of_row).astype(np.float64)
