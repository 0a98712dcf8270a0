"""What agreement learns of both sources on the calibration part: fits of what was put in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config import AgreementConfig, Rule
from pipeline.federation.agreement import Calibration, Sources, agree, spread
from pipeline.federation.calibration import (
    calibrate,
    fit_bias,
    fit_inverse_temperature,
    split_in_halves,
)


def test_halves_keep_groups_together() -> None:
    first, second = split_in_halves(["a", "a", "b", "c", "b", "a"])
    assert (first.tolist(), second.tolist()) == ([0, 1, 5], [2, 3, 4])


def test_the_rows_of_a_single_group_go_to_the_halves_in_turn() -> None:
    first, second = split_in_halves(["a"] * 5)
    assert (first.tolist(), second.tolist()) == ([0, 2, 4], [1, 3])


def draw_probabilities(
    count: int, scale: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Labels with probabilities whose true odds are their own to the power ``scale``."""
    truth = torch.randint(0, 2, (count, 16, 16), generator=generator)
    probability = 0.5 + torch.rand((count, 16, 16), generator=generator) * 0.49
    right = torch.rand(truth.shape, generator=generator) < torch.sigmoid(
        scale * torch.logit(probability)
    )
    return torch.where(right, truth, 1 - truth), probability, truth


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.0])
def test_scale_is_recovered(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    label, probability, truth = draw_probabilities(200, scale, generator)
    assert fit_inverse_temperature(probability, label, truth) == pytest.approx(scale, rel=0.1)


def test_scale_counts_only_classes_that_are_there() -> None:
    """A number that no label has is no class; the others weigh equally, however rare."""
    generator = torch.Generator().manual_seed(0)
    label, probability, truth = draw_probabilities(20, 0.5, generator)
    apart = fit_inverse_temperature(probability, 3 * label, 3 * truth)
    assert apart == fit_inverse_temperature(probability, label, truth)
    assert apart == pytest.approx(0.5, rel=0.2)
    # right at class 0, wrong at class 3: a mean over pixels would follow the many of class 0
    rare = 3 * (torch.arange(label.numel()).reshape(label.shape) % 50 == 0).long()
    sure, nothing = torch.full_like(probability, 0.9), torch.zeros_like(rare)
    assert fit_inverse_temperature(sure, rare, nothing) < 0.3
    assert fit_inverse_temperature(sure, nothing, nothing) > 1


@pytest.mark.parametrize("bias", [-1.5, 0.0, 0.7])
def test_bias_is_recovered(bias: float) -> None:
    """Foreground of all classes counts alike, and the rarer of both sides as much."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((400, 8, 8), generator=generator) * 2 - 1.5
    chance = torch.sigmoid(logits)
    truth = torch.rand(chance.shape, generator=generator) < torch.sigmoid(logits + bias)
    distribution = torch.stack([1 - chance, chance / 4, chance * 3 / 4], dim=1)
    assert fit_bias(distribution, 2 * truth.long()) == pytest.approx(bias, abs=0.08)


def test_few_images_do_not_move_the_bias_far() -> None:
    """Foreground all over where 0.1 was said: four images are held back by the prior."""
    said = torch.tensor([0.9, 0.1]).reshape(1, 2, 1, 1)
    few, many = (
        fit_bias(said.expand(n, 2, 4, 4), torch.ones(n, 4, 4, dtype=torch.int64)) for n in (4, 400)
    )
    assert 0.5 < few < many - 0.5


# --------------------------------------------------------------------------- the whole fit

GROUPS = [str(row // 2) for row in range(20)]  # ten patients of two images


def truth_of(count: int = 20) -> Tensor:
    """Return squares of foreground (N, 16, 16) int64, a little apart from image to image."""
    truth = torch.zeros(count, 16, 16, dtype=torch.int64)
    for row in range(count):
        truth[row, 4 : 10 + row % 3, 4:12] = 1
    return truth


def wrong_in(truth: Tensor, share: float, seed: int = 2) -> Tensor:
    """Return the truth with so many of the pixels wrong, anywhere."""
    generator = torch.Generator().manual_seed(seed)
    return torch.where(torch.rand(truth.shape, generator=generator) < share, 1 - truth, truth)


def said(label: Tensor, probability: float = 0.9) -> Tensor:
    return spread(label, torch.full(label.shape, probability), int(label.max()) + 1)


def fit(
    sam: Tensor,
    client: Tensor,
    truth: Tensor,
    groups: list[str] | None = None,
    rule: Rule = "adaptive",
) -> Calibration:
    config = AgreementConfig(rule=rule)
    return calibrate(Sources(sam, client), truth, groups=groups or GROUPS, config=config)


def test_the_worse_source_is_believed_less() -> None:
    """SAM right on 9 pixels of 10, the client on 7, both claiming 0.9."""
    truth = truth_of()
    found = fit(said(wrong_in(truth, 0.1)), said(wrong_in(truth, 0.3, 3)), truth)
    assert 0.6 < found.sam_inverse_temperature <= 1.0
    assert found.client_inverse_temperature < 0.5
    assert found.unused == []


def test_what_is_promised_and_not_kept_is_taken_off() -> None:
    """The client puts its object elsewhere on every image; SAM keeps its word."""
    truth = truth_of()
    found = fit(said(truth, 0.97), said(truth.roll(6, dims=1), 0.97), truth)
    assert abs(found.sam_offset) < 0.05
    assert found.client_offset < -0.1


def test_offsets_are_shrunk_by_the_number_of_groups() -> None:
    truth = truth_of()
    elsewhere = said(truth.roll(6, dims=1), 0.97)
    one, two = (["a"] * 20, [str(row % 2) for row in range(20)])
    sam = said(truth, 0.97)
    offsets = [fit(sam, elsewhere, truth, groups).client_offset for groups in (one, two, GROUPS)]
    # two halves with one, one and five groups each: the single one is in both
    assert offsets[0] == pytest.approx(offsets[1], rel=0.1)
    assert offsets[1] == pytest.approx(offsets[2] * (1 / 3) / (5 / 7), rel=0.1)


def test_a_single_patient_is_measured_on_too() -> None:
    """Found on hearts: SAM was believed as it came, because D_p kept one patient apart."""
    truth = truth_of()
    found = fit(said(wrong_in(truth, 0.1)), said(wrong_in(truth, 0.3, 3)), truth, ["a"] * 20)
    assert found.client_inverse_temperature < 0.5 < found.sam_inverse_temperature <= 1.0


def test_empty_labels_are_right_as_often_as_they_were() -> None:
    """The client misses everything; SAM's empty labels are right."""
    truth = truth_of()
    truth[::2] = 0
    client = torch.stack([torch.full(truth.shape, 0.99), torch.full(truth.shape, 0.01)], dim=1)
    found = fit(said(truth, 0.97), client, truth)
    assert found.sam_empty > 0.9
    assert found.client_empty == pytest.approx(0.5, abs=0.1)


def test_a_collapse_is_seen_and_sam_takes_over_in_spite_of_its_mistakes() -> None:
    truth = truth_of()
    collapsed = torch.stack([torch.full(truth.shape, 0.999), torch.full(truth.shape, 0.001)], dim=1)
    found = fit(said(wrong_in(truth, 0.25), 0.97), collapsed, truth)
    assert found.client_empty < 0.1
    result = agree(
        Sources(said(truth, 0.97), collapsed), config=AgreementConfig(), calibration=found
    )
    assert torch.equal(result.label, truth)


@pytest.mark.parametrize("groups", ["aaaa", "abbb", "abca", "abcd", "aaaab"])
def test_four_images_are_measured_on_whatever_their_groups(groups: str) -> None:
    truth = truth_of(len(groups))
    found = fit(said(wrong_in(truth, 0.3)), said(truth), truth, list(groups))
    assert 0 < found.sam_inverse_temperature < found.client_inverse_temperature
    assert len(found.target_dice) == 1


def test_few_images_leave_all_as_it_is() -> None:
    truth = truth_of(3)
    assert fit(said(truth), said(truth), truth, GROUPS[:3]) == Calibration()


# --------------------------------------------------------------------------- the guard


def test_a_class_that_sam_gets_wrong_is_not_used() -> None:
    """SAM sees class 2 elsewhere. Alone it does harm; agreement believes the client instead."""
    truth = truth_of()
    truth[:, 8:] *= 2
    sam = truth.clone()
    sam[:, :4, :8], sam[:, 8:] = 2, 0
    alone = fit(said(sam, 0.99), said(truth, 0.7), truth, rule="sam_soft")
    assert alone.unused == [2]
    assert alone.target_dice[1] < 0.2
    assert alone.target_dice[0] > 0.95
    assert alone.model_dice == (1.0, 1.0)
    both = fit(said(sam, 0.99), said(truth, 0.7), truth)
    assert both.unused == []
    assert both.target_dice[1] > 0.95


@pytest.mark.parametrize(("columns", "unused"), [(13, []), (16, [1])])
def test_a_little_harm_is_no_reason(columns: int, unused: list[int]) -> None:
    """A model is best at the server's site, where it learnt: that says little of others."""
    truth = truth_of()
    sam = truth.clone()
    sam[:, :, 12:columns] = truth[:, :, 11:12]
    found = fit(said(sam, 0.99), said(truth, 0.7), truth, rule="sam_soft")
    assert found.target_dice[0] < found.model_dice[0] == 1.0
    assert found.unused == unused


def test_harm_on_few_groups_is_no_reason() -> None:
    truth = truth_of()
    wider = truth.clone()
    wider[:, :, 12:15] = truth[:, :, 11:12]
    sam, client = said(wider, 0.99), said(truth, 0.7)
    two = [str(row % 2) for row in range(20)]
    few, many = (fit(sam, client, truth, groups, "sam_soft") for groups in (two, GROUPS))
    assert few.target_dice == pytest.approx(many.target_dice, abs=0.02)
    assert few.target_gain[0] == pytest.approx(many.target_gain[0] * (1 / 2) / (10 / 12), rel=0.1)
    assert (few.unused, many.unused) == ([], [1])


def test_a_class_that_sam_invents_beside_a_good_one_is_not_used() -> None:
    """Trust is one number an image: class 1, in which SAM is the better one, carries class 2."""
    truth = truth_of()
    sam = truth.clone()
    sam[:, :2, :6] = 2
    model = wrong_in(truth, 0.2)
    sides = [spread(label, torch.full(label.shape, 0.9), 3) for label in (sam, model)]
    found = fit(*sides, truth)
    assert found.target_dice[0] > found.model_dice[0] + 0.05
    assert found.target_dice[1] < 0.1 < 0.9 < found.model_dice[1]
    assert found.unused == [2]


def test_no_half_is_judged_by_what_was_fitted_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second patient SAM's masks are wrong, and so are its empty ones."""
    truth = truth_of()
    truth[:4] = 0
    sam = truth.clone()
    sam[10:] = truth[10:].roll(3, dims=2)
    sam[10:14] = 0
    groups = ["a"] * 10 + ["b"] * 10
    used = []

    def record(sources: Sources, *, config: AgreementConfig, calibration: Calibration) -> Any:
        used.append((bool((sources.sam_label == truth[:10]).all()), calibration))
        return agree(sources, config=config, calibration=calibration)

    monkeypatch.setattr("pipeline.federation.calibration.agree", record)
    fit(said(sam), said(truth), truth, groups)
    by_half = dict(used)
    assert set(by_half) == {True, False}
    first, second = by_half[True], by_half[False]
    assert first.sam_inverse_temperature < 0.7 < second.sam_inverse_temperature
    assert first.sam_empty < 0.3 < 0.8 < second.sam_empty
    assert first.sam_offset < -0.1 < second.sam_offset


def test_a_class_that_is_invented_counts_against_its_source() -> None:
    """No image has class 2. Who sees it has a Dice of 0 there, and who does not is right."""
    truth = truth_of()
    invented = truth.clone()
    invented[:, :2, :6] = 2
    two, one = (spread(label, torch.full(label.shape, 0.97), 3) for label in (invented, truth))
    found = fit(two, one, truth, rule="sam_soft")
    assert (found.target_dice[1], found.model_dice[1]) == (0.0, 1.0)
    assert found.unused == [2]
    found = fit(one, two, truth, rule="sam_soft")
    assert (found.target_dice[1], found.model_dice[1]) == (1.0, 0.0)
    assert found.target_gain[1] == pytest.approx(10 / 12)


def test_of_a_class_that_nobody_has_nothing_is_said() -> None:
    truth = truth_of()
    three = torch.cat([said(truth), torch.zeros(20, 1, 16, 16)], dim=1)
    found = fit(three, three, truth)
    assert found.target_gain[1] == 0
    assert found.unused == []
    numbers = found.numbers()
    assert {"target_dice_1", "model_dice_1"} <= numbers.keys()
    assert not {"target_dice_2", "model_dice_2"} & numbers.keys()
