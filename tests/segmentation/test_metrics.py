"""Metrics of one image by hand, against MedPy and against all pairs of points."""

from __future__ import annotations

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

from pipeline.segmentation.metrics import (
    ImageMetrics,
    Scale,
    dice_score,
    image_metrics,
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


def _scores(found: ImageMetrics) -> tuple[float, ...]:
    """Dice, IoU, HD95, ASSD, both again where defined, and NSD."""
    return found.values()[:7]


def test_two_single_pixels() -> None:
    prediction = _mask((0, 0, 1, 1, 1), shape=(8, 8))
    truth = _mask((3, 4, 4, 5, 1), shape=(8, 8))
    found = image_metrics(prediction, truth, num_classes=1)
    assert _scores(found) == (0, 0, 5, 5, 5, 5, 0)
    assert _scores(image_metrics(prediction, truth, num_classes=1, px=Scale(tolerance=5)))[6] == 1
    # 3 rows of 2 mm and 4 columns of 0.5 mm
    in_mm = image_metrics(prediction, truth, num_classes=1, mm=Scale(2, 0.5, tolerance=6))
    assert in_mm.hd95_mm == in_mm.assd_mm == pytest.approx(math.hypot(6, 2), abs=1e-12)
    assert (in_mm.nsd_mm, in_mm.hd95) == (0, 5)


def test_equal_masks_that_fill_the_image() -> None:
    mask = np.ones((5, 7), dtype=np.uint8)
    assert _scores(image_metrics(mask, mask, num_classes=1)) == (1, 1, 0, 0, 0, 0, 1)


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
    assert (both.dice, both.iou, both.hd95, both.assd, both.nsd) == (1, 1, 0, 0, 1)
    for one in (
        image_metrics(empty, full, num_classes=1),
        image_metrics(full, empty, num_classes=1),
    ):
        assert (one.dice, one.iou, one.hd95, one.assd, one.nsd) == (0, 0, 5, 5, 0)  # 3-4-5
        assert math.isnan(one.hd95_defined)
        assert math.isnan(one.assd_defined)
    assert math.isnan(both.hd95_defined)
    assert math.isnan(both.assd_defined)


def test_classes_are_averaged_and_absent_ones_left_out() -> None:
    """Class 1 is 5 px off, class 2 right, class 3 missed, class 4 absent from both."""
    shape = (30, 40)  # diagonal 50
    truth = _mask((0, 0, 1, 1, 1), (20, 20, 25, 25, 2), (28, 0, 29, 9, 3), shape=shape)
    prediction = _mask((3, 4, 4, 5, 1), (20, 20, 25, 25, 2), shape=shape)
    got = image_metrics(prediction, truth, num_classes=4)
    assert (got.dice, got.iou, got.nsd) == ((0 + 1 + 0) / 3, (0 + 1 + 0) / 3, (0 + 1 + 0) / 3)
    assert dice_score(prediction, truth, num_classes=4) == got.dice
    assert (got.hd95, got.assd) == ((5 + 0 + 50) / 3, (5 + 0 + 50) / 3)
    assert (got.hd95_defined, got.assd_defined) == (2.5, 2.5)
    assert [(each.common, each.predicted, each.true) for each in got.classes] == [
        (0, 1, 1), (25, 25, 25), (0, 0, 9), (0, 0, 0),
    ]  # fmt: skip
    assert [each.dice for each in got.classes[:3]] == [0, 1, 0]
    assert not got.classes[3].present
    assert all(map(math.isnan, got.classes[3].values().values()))


def test_an_image_without_any_class_counts_as_right() -> None:
    """With several classes as with one, and in both units."""
    empty = np.zeros((3, 4), dtype=np.uint8)
    for num_classes in (1, 3):
        got = image_metrics(empty, empty, num_classes=num_classes, mm=Scale())
        assert _scores(got)[:4] == (1, 1, 0, 0)
        assert (got.nsd, got.hd95_mm, got.assd_mm, got.nsd_mm) == (1, 0, 0, 1)
        assert dice_score(empty, empty, num_classes=num_classes) == 1


def _surface_points(mask: NDArray[np.uint8]) -> NDArray[np.int_]:
    """Pixels of a mask with a neighbour outside it (4-connected), the image's outside too."""
    padded = np.pad(mask, 1)
    neighbours = [np.roll(padded, step, axis) for step in (1, -1) for axis in (0, 1)]
    return np.argwhere(padded.astype(bool) & ~np.all(neighbours, axis=0))


def test_distances_equal_all_pairs_of_surface_points() -> None:
    """HD95, ASSD and NSD against plain pairs, in px and with pixels that are not square."""
    rng = np.random.default_rng(8)
    for row, column, tolerance in ((1.0, 1.0, 2.0), (0.7, 1.9, 1.9), (3.0, 0.25, 0.6)):
        for _ in range(4):
            masks = [_blob(rng, 24, rng.uniform(0.05, 0.6)) for _ in range(2)]
            one, two = (_surface_points(mask) * (row, column) for mask in masks)
            pairs = np.linalg.norm(one[:, None] - two[None], axis=2)
            pooled = np.concatenate((pairs.min(axis=1), pairs.min(axis=0)))
            scale = Scale(row, column, tolerance)
            got = image_metrics(*masks, num_classes=1, mm=scale).classes[0].mm
            assert got.hd95 == pytest.approx(np.percentile(pooled, 95), abs=1e-9)
            assert got.assd == pytest.approx(pooled.mean(), abs=1e-9)
            assert got.nsd == pytest.approx(np.mean(pooled <= tolerance + 1e-6), abs=1e-12)


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
    one, two = image_metrics(a, b, num_classes=1), image_metrics(b, a, num_classes=1)
    assert _scores(one) == _scores(two)
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
