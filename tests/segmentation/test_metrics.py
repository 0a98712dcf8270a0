"""Metrics by hand, against MedPy, and the group bootstrap."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from medpy.metric import binary  # type: ignore[import-untyped]
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.stats import permutation_test

from pipeline.segmentation.metrics import (
    ImageMetrics,
    bootstrap_means,
    dice_score,
    image_metrics,
    sign_flip_test,
    summarise,
)


def _mask(*boxes: tuple[int, int, int, int, int], shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Boxes (top, left, bottom, right, class), ends exclusive."""
    mask = np.zeros(shape, dtype=np.uint8)
    for top, left, bottom, right, index in boxes:
        mask[top:bottom, left:right] = index
    return mask


def _blob(rng: np.random.Generator, size: int, share: float) -> NDArray[np.uint8]:
    """Draw a smooth mask, often in several parts and cut by the border."""
    field = gaussian_filter(rng.standard_normal((size, size)), sigma=size / 12)
    return np.asarray(field > np.quantile(field, 1 - share), dtype=np.uint8)


def _row(dice: float, *, hd95: float = 0.0, defined: float = 0.0) -> ImageMetrics:
    return ImageMetrics(dice, dice / 2, hd95, hd95 / 2, defined, defined / 2)


def test_two_single_pixels() -> None:
    prediction = _mask((0, 0, 1, 1, 1), shape=(8, 8))
    truth = _mask((3, 4, 4, 5, 1), shape=(8, 8))
    assert image_metrics(prediction, truth, num_classes=1) == ImageMetrics(0, 0, 5, 5, 5, 5)


def test_equal_masks_that_fill_the_image() -> None:
    mask = np.ones((5, 7), dtype=np.uint8)
    assert image_metrics(mask, mask, num_classes=1) == ImageMetrics(1, 1, 0, 0, 0, 0)


def test_square_inside_a_square() -> None:
    """3x3 inside 5x5: every surface pixel is 1 px off, but the outer corners sqrt(2)."""
    inner, outer = _mask((2, 2, 5, 5, 1), shape=(9, 9)), _mask((1, 1, 6, 6, 1), shape=(9, 9))
    got = image_metrics(inner, outer, num_classes=1)
    assert got.dice == pytest.approx(2 * 9 / (9 + 25), abs=1e-15)
    assert got.iou == pytest.approx(9 / 25, abs=1e-15)
    # 8 distances inwards of 1; 16 outwards, 12 of 1 and 4 of sqrt(2); the 95th percentile of 24
    # sorted values is at position 0.95 * 23 = 21.85, among the four largest.
    assert got.hd95 == pytest.approx(math.sqrt(2), abs=1e-12)
    assert got.assd == pytest.approx((8 + 12 + 4 * math.sqrt(2)) / 24, abs=1e-12)


def test_the_percentile_pools_both_directions() -> None:
    """A stray pixel 10 px away: the directed distances are [0, 10] and [0]."""
    truth = _mask((0, 0, 1, 1, 1), shape=(1, 20))
    prediction = _mask((0, 0, 1, 1, 1), (0, 10, 1, 11, 1), shape=(1, 20))
    got = image_metrics(prediction, truth, num_classes=1)
    assert got.hd95 == pytest.approx(9.0, abs=1e-12)  # of [0, 0, 10] at position 1.9
    assert got.assd == pytest.approx(10 / 3, abs=1e-12)


def test_empty_masks_follow_the_conventions() -> None:
    empty, full = np.zeros((3, 4), dtype=np.uint8), np.ones((3, 4), dtype=np.uint8)
    both = image_metrics(empty, empty, num_classes=1)
    assert (both.dice, both.iou, both.hd95, both.assd) == (1, 1, 0, 0)
    for one in (
        image_metrics(empty, full, num_classes=1),
        image_metrics(full, empty, num_classes=1),
    ):
        assert (one.dice, one.iou, one.hd95, one.assd) == (0, 0, 5, 5)  # 3-4-5 diagonal
        assert math.isnan(one.hd95_defined)
        assert math.isnan(one.assd_defined)
    assert math.isnan(both.hd95_defined)
    assert math.isnan(both.assd_defined)


def test_classes_are_averaged_and_undefined_ones_skipped() -> None:
    """Class 1 is 5 px off, class 2 right, class 3 missed, class 4 absent from both."""
    shape = (30, 40)  # diagonal 50
    truth = _mask((0, 0, 1, 1, 1), (20, 20, 25, 25, 2), (28, 0, 29, 9, 3), shape=shape)
    prediction = _mask((3, 4, 4, 5, 1), (20, 20, 25, 25, 2), shape=shape)
    got = image_metrics(prediction, truth, num_classes=4)
    assert (got.dice, got.iou) == ((0 + 1 + 0 + 1) / 4, (0 + 1 + 0 + 1) / 4)
    assert dice_score(prediction, truth, num_classes=4) == got.dice
    assert (got.hd95, got.assd) == ((5 + 0 + 50 + 0) / 4, (5 + 0 + 50 + 0) / 4)
    assert (got.hd95_defined, got.assd_defined) == (2.5, 2.5)


def _assert_equals_medpy(prediction: NDArray[np.uint8], truth: NDArray[np.uint8]) -> None:
    got = image_metrics(prediction, truth, num_classes=1)
    a, b = prediction == 1, truth == 1
    assert got.dice == pytest.approx(binary.dc(a, b), abs=1e-12)
    assert got.iou == pytest.approx(binary.jc(a, b), abs=1e-12)
    assert got.hd95 == got.hd95_defined == pytest.approx(binary.hd95(a, b), abs=1e-9)
    assert got.assd == got.assd_defined == pytest.approx(binary.assd(a, b), abs=1e-9)


@given(data=st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_equals_medpy_on_any_small_masks(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    masks = arrays(np.uint8, shape, elements=st.integers(0, 1)).filter(lambda mask: mask.any())
    _assert_equals_medpy(data.draw(masks), data.draw(masks))


def test_equals_medpy_on_smooth_masks_of_all_sizes() -> None:
    rng = np.random.default_rng(0)
    for size in (16, 33, 64, 128):
        for share in (0.01, 0.1, 0.5, 0.95):
            _assert_equals_medpy(_blob(rng, size, share), _blob(rng, size, rng.uniform(0.05, 0.9)))


def test_equals_medpy_where_masks_touch_the_border() -> None:
    corner = _mask((0, 0, 6, 6, 1), shape=(32, 32))
    edge = _mask((20, 3, 32, 32, 1), shape=(32, 32))
    frame = _mask((0, 0, 32, 32, 1), (1, 1, 31, 31, 0), shape=(32, 32))
    full = np.ones((32, 32), dtype=np.uint8)
    for a in (corner, edge, frame, full):
        for b in (corner, edge, frame, full):
            _assert_equals_medpy(a, b)


def test_is_symmetric_and_leaves_its_inputs_alone() -> None:
    rng = np.random.default_rng(1)
    a, b = _blob(rng, 40, 0.3), _blob(rng, 40, 0.2)
    before = a.copy(), b.copy()
    assert image_metrics(a, b, num_classes=1) == image_metrics(b, a, num_classes=1)
    assert np.array_equal(a, before[0])
    assert np.array_equal(b, before[1])


@pytest.mark.parametrize(
    ("prediction", "truth", "num_classes", "message"),
    [
        (np.zeros((4, 4), np.uint8), np.zeros((4, 5), np.uint8), 1, r"\(4, 4\) but truth \(4, 5\)"),
        (np.zeros((4, 4), np.uint8), np.full((4, 4), 255, np.uint8), 2, "class 255; expected 0..2"),
        (np.full((4, 4), 3, np.uint8), np.zeros((4, 4), np.uint8), 2, "class 3; expected 0..2"),
    ],
)
def test_refuses_what_is_no_pair_of_masks(
    prediction: NDArray[Any], truth: NDArray[Any], num_classes: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        image_metrics(prediction, truth, num_classes=num_classes)


def test_summary_by_hand() -> None:
    rows = [
        _row(0.5, hd95=4, defined=4),
        _row(1.0, hd95=0, defined=math.nan),
        _row(0.0, hd95=11, defined=11),
    ]
    got = summarise(rows, ["a", "a", "b"], seed=0)
    assert (got["n"], got["dice"], got["iou"], got["hd95"], got["assd"]) == (3, 0.5, 0.25, 5, 2.5)
    assert (got["hd95_defined"], got["assd_defined"]) == (7.5, 3.75)
    # Two groups: a draw is (a, a), (a, b) or (b, b) with chances 1/4, 1/2, 1/4, so that the
    # percentiles at 2.5 and 97.5 are the means of the groups themselves.
    assert got["dice_ci95"] == [0.0, 0.75]
    assert got["hd95_ci95"] == [2.0, 11.0]
    assert json.loads(json.dumps(got, allow_nan=False)) == got


def test_summary_without_a_defined_distance() -> None:
    got = summarise([_row(1.0, defined=math.nan)], ["a"], seed=0)
    assert got["hd95_defined"] is None
    assert got["assd_defined"] is None


def test_interval_draws_groups_not_images() -> None:
    """100 images of one patient carry no more evidence than one."""
    one_group = summarise([_row(0.2), _row(0.8)] * 50, ["p"] * 100, seed=0)
    assert one_group["dice_ci95"] == pytest.approx([0.5, 0.5], abs=1e-12)
    rows = [_row(0.2)] * 50 + [_row(0.8)] * 50
    low, high = summarise(rows, [str(i // 10) for i in range(100)], seed=0)["dice_ci95"]
    narrow_low, narrow_high = summarise(rows, [str(i) for i in range(100)], seed=0)["dice_ci95"]
    assert high - low > 2 * (narrow_high - narrow_low)


def test_interval_equals_a_plain_loop() -> None:
    """The vectorised bootstrap against drawing groups one resample at a time."""
    rng = np.random.default_rng(3)
    values = rng.uniform(size=60)
    groups = [f"g{i}" for i in rng.integers(0, 12, size=60)]
    got = summarise([_row(v) for v in values], groups, seed=0)["dice_ci95"]
    names = sorted(set(groups))
    members = {name: values[[g == name for g in groups]] for name in names}
    means = [
        np.concatenate([members[name] for name in rng.choice(names, size=len(names))]).mean()
        for _ in range(4000)
    ]
    assert got == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.02)


def test_summary_is_deterministic_by_seed() -> None:
    rng = np.random.default_rng(4)
    rows = [_row(v, hd95=9 * v) for v in rng.uniform(size=40)]
    groups = [str(i // 3) for i in range(40)]
    assert summarise(rows, groups, seed=5) == summarise(rows, groups, seed=5)
    assert summarise(rows, groups, seed=5) != summarise(rows, groups, seed=6)


def test_summary_refuses_bad_input() -> None:
    with pytest.raises(ValueError, match="found 1 groups for 2 rows"):
        summarise([_row(1.0)] * 2, ["a"], seed=0)


# --------------------------------------------------------------------------- pairs


def _brute_force(sums: list[float]) -> float:
    totals = [
        abs(sum(sign * value for sign, value in zip(signs, sums, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(sums))
    ]
    return sum(total >= abs(sum(sums)) - 1e-9 for total in totals) / len(totals)


def test_sign_flips_by_hand() -> None:
    """Sums 3 and 1 by group: totals 4, 2, -2, -4, so that two of four lie as far out as 4."""
    differences = np.array([1.0, 2.0, 1.0])
    assert sign_flip_test(differences, ["a", "a", "b"], seed=0) == 0.5
    assert sign_flip_test(differences, ["a", "b", "c"], seed=0) == 0.25  # 1 + 2 + 1, all flipped
    assert sign_flip_test(np.array([1.0, -1.0, 1.0]), ["a", "b", "c"], seed=0) == 1
    assert sign_flip_test(np.zeros(3), ["a", "b", "c"], seed=0) == 1


@given(
    sums=st.lists(st.integers(-20, 20), min_size=1, max_size=7),
    images=st.integers(1, 3),
    data=st.data(),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_all_sign_flips_equal_brute_force(
    sums: list[int], images: int, data: st.DataObject
) -> None:
    """However a group's sum is spread over images, and in whatever order these come."""
    values = [value / 10 / images for value in sums for _ in range(images)]
    groups = [f"g{number}" for number in range(len(sums)) for _ in range(images)]
    order = data.draw(st.permutations(range(len(values))))
    got = sign_flip_test(np.array([values[i] for i in order]), [groups[i] for i in order], seed=0)
    assert got == _brute_force([value / 10 for value in sums])


@pytest.mark.parametrize("number", [2, 7, 14])
def test_all_sign_flips_equal_scipys(number: int) -> None:
    """SciPy's own test draws other patterns beyond 14 groups, takes 1 s to import and 10 times as
    long to run, so it serves as a check alone.
    """
    values = np.random.default_rng(number).standard_normal(number) + 0.3
    expected = permutation_test(
        (values,),
        lambda flipped, axis: np.abs(flipped.sum(axis=axis)),
        permutation_type="samples",
        alternative="greater",
        n_resamples=np.inf,
    )
    assert sign_flip_test(values, list(map(str, range(number))), seed=0) == expected.pvalue


def test_fourteen_groups_are_counted_and_fifteen_drawn() -> None:
    """All 2^14 patterns, of which two are extreme; then 10,000 draws and the one found."""
    groups = [str(number) for number in range(15)]
    assert sign_flip_test(np.ones(14), groups[:14], seed=0) == 2 / 2**14
    drawn = sign_flip_test(np.ones(15), groups, seed=0)
    assert round(drawn * 10_001, 6) in range(1, 8)  # about 0.6 of 10,000 are extreme
    assert drawn == sign_flip_test(np.ones(15), groups, seed=0)
    assert sign_flip_test(np.ones(40), list(map(str, range(40))), seed=0) == 1 / 10_001


def test_drawn_sign_flips_come_close_to_all_of_them() -> None:
    rng = np.random.default_rng(5)
    for shift in (0.0, 0.3, 0.6):
        sums = rng.standard_normal(15) + shift
        bits = np.arange(2**15)[:, None] >> np.arange(15) & 1
        totals = np.abs((1 - 2 * bits) @ sums)
        exact = float(np.mean(totals >= abs(sums.sum()) - 1e-9))
        groups = [str(number) for number in range(15)]
        drawn = [sign_flip_test(sums, groups, seed=seed) for seed in range(5)]
        assert drawn == pytest.approx([exact] * 5, abs=0.02)
        assert len(set(drawn)) > 1  # the seed counts


@pytest.mark.parametrize(("number", "images"), [(10, 4), (25, 1)])
def test_the_test_keeps_its_level(number: int, images: int) -> None:
    """Where nothing differs p is below 0.1 in about a tenth of trials, images of a group alike."""
    rng, trials = np.random.default_rng(6), 400
    groups = [str(i // images) for i in range(number * images)]
    below = 0
    for _ in range(trials):
        values = np.repeat(rng.standard_normal(number), images)
        values += 0.1 * rng.standard_normal(len(values))
        below += sign_flip_test(values, groups, seed=0) <= 0.1
    assert below / trials == pytest.approx(0.1, abs=0.045)  # three standard deviations


def test_one_group_says_nothing_of_a_difference() -> None:
    assert sign_flip_test(np.ones(100), ["p"] * 100, seed=0) == 1


def test_columns_share_their_resamples() -> None:
    """A difference that is the same in every image has an interval without width."""
    rng = np.random.default_rng(7)
    one, groups = rng.uniform(size=60), [f"g{i}" for i in rng.integers(0, 12, size=60)]
    two = one - 0.25
    low, high = bootstrap_means(np.stack((one, two, one - two), axis=1), groups, seed=0)
    assert high[0] - low[0] > 0.05
    assert [low[2], high[2]] == pytest.approx([0.25, 0.25], abs=1e-12)
    assert [low[0] - low[1], high[0] - high[1]] == pytest.approx([0.25, 0.25], abs=1e-12)


def test_bootstrap_and_test_refuse_bad_input() -> None:
    with pytest.raises(ValueError, match="found 1 groups for 2 rows; expected one per row"):
        bootstrap_means(np.zeros((2, 1)), ["a"], seed=0)
    with pytest.raises(ValueError, match="found 3 groups for 2 rows"):
        sign_flip_test(np.zeros(2), ["a", "b", "c"], seed=0)
