"""Losses against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.segmentation.losses import (
    IGNORE,
    agreement_loss,
    dice_loss,
    supervised_loss,
)

# two pixels with foreground probability 0.8 and 0.4
PROBABILITY = torch.tensor([0.8, 0.4])
LOGITS = torch.stack([torch.zeros(2), torch.logit(PROBABILITY)]).reshape(1, 2, 1, 2)
TARGET = torch.tensor([[[1, 0]]])


def test_dice_by_hand() -> None:
    """overlap 0.8, total 1.2 + 1: 1 - (1.6 + 1) / (2.2 + 1)."""
    assert float(dice_loss(LOGITS, TARGET)) == pytest.approx(1 - 2.6 / 3.2)


def test_weighted_dice_by_hand() -> None:
    """The second pixel weighs half: 1 - (1.6 + 1) / (0.8 + 0.2 + 1 + 1)."""
    weight = torch.tensor([[[1.0, 0.5]]])
    assert float(dice_loss(LOGITS, TARGET, weight)) == pytest.approx(1 - 2.6 / 3.0)


def test_supervised_is_cross_entropy_plus_dice() -> None:
    cross_entropy = -(math.log(0.8) + math.log(0.6)) / 2
    expected = cross_entropy + 1 - 2.6 / 3.2
    assert float(supervised_loss(LOGITS, TARGET)) == pytest.approx(expected)


def test_ignored_pixels_do_not_count() -> None:
    """Only the first pixel is left: CE -ln 0.8, Dice 1 - (1.6 + 1) / (1.8 + 1)."""
    target = torch.tensor([[[1, IGNORE]]])
    expected = -math.log(0.8) + 1 - 2.6 / 2.8
    assert float(supervised_loss(LOGITS, target)) == pytest.approx(expected)


def test_rejected_pixels_lower_the_agreement_loss() -> None:
    """Sum of w CE over the number of pixels, not over the weights."""
    weight = torch.tensor([[[1.0, 0.0]]])
    expected = -math.log(0.8) / 2 + 1 - 2.6 / 2.8
    assert float(agreement_loss(LOGITS, TARGET, weight)) == pytest.approx(expected)
    nothing = agreement_loss(LOGITS, TARGET, torch.zeros(1, 1, 2))
    assert float(nothing) == 0.0


SOFT = torch.tensor([0.6, 0.3])  # chances of foreground that serve as the target
SOFT_TARGET = torch.stack([1 - SOFT, SOFT]).reshape(1, 2, 1, 2)


def test_soft_targets_by_hand() -> None:
    """Twice the smaller of both is 1.2 + 0.6, both together are 1.2 + 0.9."""
    cross_entropy = -(
        0.6 * math.log(0.8) + 0.4 * math.log(0.2) + 0.3 * math.log(0.4) + 0.7 * math.log(0.6)
    )
    expected = cross_entropy / 2 + 1 - 2.8 / 3.1
    found = agreement_loss(LOGITS, SOFT_TARGET, torch.ones(1, 1, 2))
    assert float(found) == pytest.approx(expected)


def test_a_soft_target_is_what_has_the_least_loss() -> None:
    """Dice and cross-entropy pull to the target itself, not to its more likely class."""
    logits = LOGITS.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        dice_loss(logits, SOFT_TARGET).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert logits.softmax(dim=1)[0, 1].flatten().tolist() == pytest.approx([0.6, 0.3], abs=0.03)


def test_a_target_of_classes_is_a_distribution_too() -> None:
    certain = torch.nn.functional.one_hot(TARGET, 2).permute(0, 3, 1, 2).float()
    weight = torch.tensor([[[1.0, 0.5]]])
    soft, hard = (agreement_loss(LOGITS, target, weight) for target in (certain, TARGET))
    assert float(soft) == pytest.approx(float(hard))
