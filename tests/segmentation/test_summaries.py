"""Means over images, classes and patients, the group bootstrap, and the paired test."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import permutation_test

from pipeline.segmentation.metrics import (
    ClassMetrics,
    Distances,
    ImageMetrics,
    Scale,
    image_metrics,
)
from pipeline.segmentation.statistics import (
    bootstrap_means,
    group_tables,
    sign_flip_test,
    summarise,
)

NOWHERE = Distances(math.nan, math.nan, math.nan)


def _row(dice: float, *, hd95: float = 0.0, defined: float = 0.0) -> ImageMetrics:
    """An image of one class with these scores; a class of 100 pixels in both masks."""
    of_class = ClassMetrics(round(100 * dice), 100, 100, Distances(hd95, hd95 / 2, 1.0), NOWHERE)
    values = (dice, dice / 2, hd95, hd95 / 2, defined, defined / 2, 1.0)
    return ImageMetrics(*values, classes=(of_class,))


def _strip(*classes: int) -> np.ndarray:
    """A mask of one row."""
    return np.array([classes], dtype=np.uint8)


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


def test_one_group_has_no_interval() -> None:
    """100 images of one patient carry no more evidence on others than one."""
    found = summarise([_row(0.2), _row(0.8)] * 50, ["p"] * 100, seed=0)
    assert (found["dice"], found["dice_ci95"], found["hd95_ci95"]) == (0.5, None, None)
    assert found["groups"]["dice_sd"] is None


def test_a_class_absent_from_truth_and_prediction_is_left_out_of_its_mean() -> None:
    """Two patients of 1 x 4 px. Class 1: found by half, right; class 2: right once, then absent."""
    pairs = [
        (_strip(1, 0, 2, 2), _strip(1, 1, 2, 2)),  # class 1: Dice 2/3, class 2: 1
        (_strip(1, 1, 0, 0), _strip(1, 1, 0, 0)),  # class 1: 1, class 2 absent
        (_strip(0, 0, 0, 0), _strip(0, 0, 0, 0)),  # nothing to find
        (_strip(0, 2, 0, 0), _strip(0, 0, 0, 0)),  # class 1 absent, class 2 invented
    ]
    rows = [image_metrics(*pair, num_classes=2, mm=Scale(1, 3, 2.0)) for pair in pairs]
    got = summarise(rows, ["p", "p", "q", "q"], seed=0, names=("a", "b"))
    a, b = got["classes"]["a"], got["classes"]["b"]
    assert (a["n"], a["dice"]) == (2, pytest.approx((2 / 3 + 1) / 2))
    assert (b["n"], b["dice"], b["hd95_defined"]) == (2, 0.5, 0)
    assert b["hd95"] == pytest.approx(math.hypot(1, 4) / 2)  # the diagonal, once
    assert b["hd95_mm"] == pytest.approx(math.hypot(1, 12) / 2)
    assert (b["nsd"], b["nsd_mm"]) == (0.5, 0.5)
    assert got["class_mean"]["dice"] == pytest.approx((a["dice"] + 0.5) / 2)
    # by image, over the classes that it has: 5/6, 1, nothing to find counts 1, 0
    assert got["dice"] == pytest.approx((5 / 6 + 1 + 1 + 0) / 4)
    assert got["empty_images"] == 1
    # as it would be if an absent class were one more that is right
    assert got["absent_as_right"]["dice"] == pytest.approx((5 / 6 + 1 + 1 + 0.5) / 4)
    assert json.loads(json.dumps(got, allow_nan=False)) == got


def test_scores_of_a_patient_are_those_of_all_its_pixels() -> None:
    """Class 1 of p: 3 of 3 predicted and 4 true pixels in common; of q there is no pixel."""
    pairs = [
        (_strip(1, 0, 2, 2), _strip(1, 1, 2, 2)),
        (_strip(1, 1, 0, 0), _strip(1, 1, 0, 0)),
        (_strip(0, 2, 0, 0), _strip(0, 2, 2, 0)),
    ]
    rows = [image_metrics(*pair, num_classes=2) for pair in pairs]
    tables = group_tables(rows, ["p", "p", "q"])
    assert tables["p"][:, 0] == pytest.approx([2 * 3 / (3 + 4), 1])
    assert tables["p"][:, 1] == pytest.approx([3 / 4, 1])
    assert math.isnan(tables["q"][0, 0])
    assert tables["q"][1, 0] == pytest.approx(2 / 3)
    got = summarise(rows, ["p", "p", "q"], seed=0, names=("a", "b"))["groups"]
    per_patient = [(6 / 7 + 1) / 2, 2 / 3]
    assert (got["n"], got["dice"]) == (2, pytest.approx(np.mean(per_patient)))
    assert got["dice_sd"] == pytest.approx(np.std(per_patient, ddof=1))
    assert got["dice_ci95"] == pytest.approx(sorted(per_patient))  # two groups: their own values
    assert (got["classes"]["a"]["n"], got["classes"]["a"]["dice"]) == (1, pytest.approx(6 / 7))
    assert got["classes"]["b"]["dice"] == pytest.approx((1 + 2 / 3) / 2)
    assert got["hd95_mm"] is None


def test_interval_draws_groups_not_images() -> None:
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
