"""Agreement against hand-worked numbers, and the cases that the method must not lose."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pipeline.config import AgreementConfig, Rule
from pipeline.federation.agreement import (
    Calibration,
    PseudoLabel,
    Sources,
    agree,
    expected_dice,
    expected_lack,
    foreground_dice,
    from_levels,
    raised_for_dice,
    room_left,
    spread,
    tempered,
)
from pipeline.federation.targets import count_agreement, shares_of

SHARPNESS = 3.0
# one image of four pixels: both foreground; SAM only; client only; both background
SAM_LABEL = torch.tensor([[[1, 1, 0, 0]]])
SAM_PROBABILITY = torch.tensor([[[0.9, 0.8, 0.6, 0.95]]])
CLIENT_FOREGROUND = torch.tensor([[[0.7, 0.4, 0.9, 0.2]]])


def two_classes(foreground: Tensor) -> Tensor:
    """Return distributions (B, 2, H, W) by the chance of foreground (B, H, W)."""
    return torch.stack([1 - foreground, foreground], dim=1)


SOURCES = Sources(spread(SAM_LABEL, SAM_PROBABILITY, 2), two_classes(CLIENT_FOREGROUND))


def run(rule: Rule, **changes: float) -> PseudoLabel:
    return agree(SOURCES, config=AgreementConfig(rule=rule), calibration=Calibration(**changes))


def odds(probability: float) -> float:
    return probability / (1 - probability)


def foreground_of(result: PseudoLabel) -> list[float]:
    return result.target[:, 1].flatten().tolist()


def sharp(foreground: list[float]) -> list[float]:
    """Return chances with their odds to the power that targets are sharpened by."""
    return [odds(p) ** SHARPNESS / (1 + odds(p) ** SHARPNESS) for p in foreground]


def dice_of(foreground: list[float]) -> float:
    """Return the expected Dice of chances of foreground, 0.5 and above being its label."""
    found = [p for p in foreground if p >= 0.5]
    return 2 * sum(found) / (sum(foreground) + len(found))


def pooled_by_hand(
    sam: list[float], e_sam: float, client: list[float], e_client: float, offset: float = 0.0
) -> float:
    """Return the trust, and write the pooled chances into ``sam``; ``e_sam`` is without offset."""
    odds_sam = odds(e_sam + offset)
    trust = 2 * odds_sam**3 / (2 * odds_sam**3 + odds(e_client) ** 3)
    raised = [(2 - e_sam) / e_sam * odds(p) for p in sam]
    for i, (mine, theirs) in enumerate(zip(raised, client, strict=True)):
        both = mine**trust * odds(theirs) ** (1 - trust)
        sam[i] = both / (1 + both)
    return trust


def test_soft_agreement_by_hand() -> None:
    """Uncalibrated: E_s = 3.4 / 4.15, E_c = 3.2 / 4.2, and the third pixel is in conflict."""
    result = run("adaptive")
    expected = [0.9, 0.8, 0.4, 0.05]
    trust = pooled_by_hand(expected, 3.4 / 4.15, [0.7, 0.4, 0.9, 0.2], 3.2 / 4.2)
    assert 0.8 < trust < 0.9
    assert foreground_of(result) == pytest.approx(sharp(expected), abs=1e-4)
    assert result.label.flatten().tolist() == [1, 1, 1, 0]
    assert result.foreground.flatten().tolist() == foreground_of(result)
    assert run("consensus").foreground.flatten().tolist() == [1, 1, 0, 0]
    weight = dice_of(sharp(expected)) ** 2 * (1 / 4 + 3 / 4 * trust)
    assert result.weight.flatten().tolist() == pytest.approx([weight] * 4)
    assert shares_of(count_agreement(SOURCES, result)) == pytest.approx(
        {
            "agreement": 0.5,
            "coverage": 1.0,
            "from_sam": 0.25,
            "from_client": 0.25,
            "weight": weight,
        }
    )


def test_what_was_calibrated_counts() -> None:
    """SAM at half its log-odds with b = 1 and 0.1 less Dice, the client at twice its log-odds."""
    result = run(
        "adaptive",
        sam_inverse_temperature=0.5,
        client_inverse_temperature=2.0,
        sam_bias=1.0,
        sam_offset=-0.1,
    )
    sam = [math.e * odds(p) ** 0.5 for p in (0.9, 0.8, 0.4, 0.05)]
    sam = [each / (1 + each) for each in sam]
    client = [odds(p) ** 2 for p in (0.7, 0.4, 0.9, 0.2)]
    client = [each / (1 + each) for each in client]
    pooled_by_hand(sam, dice_of(sam), client, dice_of(client), offset=-0.1)
    assert foreground_of(result) == pytest.approx(sharp(sam), abs=1e-4)


def test_what_the_model_does_not_keep_away_from_home_counts_less() -> None:
    """Its labels have a third of the Dice under other light that four groups say they have at home.

    Two of these are the prior's, which says that home is like the site. The model keeps a ninth.
    """
    home = Calibration(client_consistency=0.9, groups=2)
    away = home.at_site(0.18)
    assert away.client_kept == pytest.approx(1 / 9)
    result = agree(SOURCES, config=AgreementConfig(), calibration=away)
    expected = [0.9, 0.8, 0.4, 0.05]
    trust = pooled_by_hand(expected, 3.4 / 4.15, [0.7, 0.4, 0.9, 0.2], 3.2 / 4.2 / 9)
    assert trust > 0.98
    assert foreground_of(result) == pytest.approx(sharp(expected), abs=1e-4)
    assert result.label.flatten().tolist() == [1, 1, 0, 0], "SAM wins the conflict"
    assert home.at_site(0.95) == home, "to waver less than at home is no merit"


def test_a_model_that_wavers_everywhere_loses_every_conflict() -> None:
    """The more it wavers the more SAM is trusted, to the last (both promises fell to one floor)."""
    home = Calibration(client_consistency=0.95, groups=18)
    doubtful = [  # the pixel that the model alone calls foreground
        foreground_of(
            agree(SOURCES, config=AgreementConfig(), calibration=home.at_site(consistency))
        )[2]
        for consistency in (0.9, 0.6, 0.4, 0.2, 0.1, 0.05, 0.02, 0.0)
    ]
    lost = agree(SOURCES, config=AgreementConfig(), calibration=home.at_site(0.0))
    assert doubtful == sorted(doubtful, reverse=True)
    assert lost.label.flatten().tolist() == run("sam_soft").label.flatten().tolist()


def test_nothing_is_kept_back_where_nothing_was_measured_at_home() -> None:
    for nothing in (Calibration(), Calibration(client_consistency=0.9), Calibration(groups=2)):
        assert nothing.at_site(0.1) == nothing


def test_sam_alone_is_calibrated_and_raised_too() -> None:
    result = run("sam_soft")
    e_sam = 3.4 / 4.15
    raised = [(2 - e_sam) / e_sam * odds(p) for p in (0.9, 0.8, 0.4, 0.05)]
    expected = [each / (1 + each) for each in raised]
    assert foreground_of(result) == pytest.approx(sharp(expected), abs=1e-4)
    assert result.weight.flatten().tolist() == pytest.approx([dice_of(sharp(expected)) ** 2] * 4)


def test_the_other_rules_by_hand() -> None:
    def flat(rule: Rule) -> tuple[list[int], list[float]]:
        result = run(rule)
        return result.label.flatten().tolist(), result.weight.flatten().tolist()

    assert flat("consensus") == ([1, 1, 0, 0], [1, 0, 0, 1])
    assert flat("sam_only") == ([1, 1, 0, 0], [1, 1, 1, 1])
    assert flat("client_only") == ([1, 0, 1, 0], [0, 0, 1, 0])  # c = .7 .6 .9 .8, threshold .9
    assert flat("confident") == ([1, 1, 1, 0], [1, 0, 1, 1])
    assert flat("soft") == ([1, 1, 1, 0], [1, 1, 1, 1])
    assert foreground_of(run("soft")) == pytest.approx([0.8, 0.6, 0.65, 0.125])


# --------------------------------------------------------------------------- cases


def square() -> Tensor:
    """Return a label of 8 x 8 pixels with a square of foreground."""
    label = torch.zeros(1, 8, 8, dtype=torch.int64)
    label[:, 2:6, 2:6] = 1
    return label


def surely(label: Tensor, probability: float = 0.97) -> Tensor:
    return spread(label, torch.full(label.shape, probability), 2)


def test_where_both_agree_the_target_is_their_label() -> None:
    result = agree(Sources(surely(square()), surely(square(), 0.9)), config=AgreementConfig())
    assert torch.equal(result.label, square())
    assert bool((result.target.amax(dim=1) > 0.9).all())
    assert bool((result.weight > 0.8).all())


@pytest.mark.parametrize("client_empty", [0.05, 0.5])
@pytest.mark.parametrize("bias", [-1.0, 0.0, 1.0])
def test_a_collapsed_client_is_rescued(bias: float, client_empty: float) -> None:
    """A client that is quite sure of background everywhere must not silence a confident SAM."""
    collapsed = two_classes(torch.full((1, 8, 8), 0.001))
    result = agree(
        Sources(surely(square()), collapsed),
        config=AgreementConfig(),
        calibration=Calibration(sam_bias=bias, client_empty=client_empty),
    )
    assert torch.equal(result.label, square())
    assert bool((result.weight > 0.6).all())


def test_a_client_wins_where_sam_is_unsure() -> None:
    sam_probability = torch.full((1, 8, 8), 0.99)
    sam_probability[:, 2, 2] = 0.55
    client_label = square()
    client_label[:, 2, 2] = 0
    result = agree(
        Sources(spread(square(), sam_probability, 2), surely(client_label, 0.98)),
        config=AgreementConfig(),
    )
    assert int(result.label[0, 2, 2]) == 0
    assert torch.equal(result.label, client_label)


def test_an_image_that_neither_source_is_sure_of_counts_less() -> None:
    def weight(probability: float) -> float:
        sides = surely(square(), probability)
        return float(agree(Sources(sides, sides), config=AgreementConfig()).weight.mean())

    assert weight(0.8) < 0.9 * weight(0.9) < 0.9 * weight(0.99)


def test_the_models_own_word_alone_counts_a_quarter() -> None:
    nothing = two_classes(torch.full((1, 8, 8), 0.01))
    never = Calibration(sam_empty=0.05)  # SAM's empty labels were wrong
    both = Sources(nothing, surely(square(), 0.99))
    result = agree(both, config=AgreementConfig(), calibration=never)
    assert torch.equal(result.label, square())
    assert bool(((result.weight > 0.24) & (result.weight < 0.26)).all())


def test_a_model_that_lacks_little_is_left_alone() -> None:
    """It lacks 1 - E_c: here 1 - 3.2 / 4.2, more at a site where it does not keep its word."""
    assert float(expected_lack(SOURCES, Calibration())) == pytest.approx(1 - 3.2 / 4.2, abs=1e-4)
    away = Calibration(client_offset=0.1, client_kept=0.5)
    assert float(expected_lack(SOURCES, away)) == pytest.approx(1 - (3.2 / 4.2 + 0.1) / 2, abs=1e-4)
    assert [room_left(lack) for lack in (0.0, 0.05, 0.1, 0.3)] == [0, pytest.approx(1 / 256), 1, 1]


def test_what_a_source_keeps_counts_for_its_empty_labels_too() -> None:
    """Empty labels of the model were right at 0.9, and its others lack 0.3 of their promise."""
    both = Sources(surely(square(), 0.9), two_classes(torch.full((1, 8, 8), 0.01)))
    lacks = expected_lack(both, Calibration(client_empty=0.9, client_offset=-0.3))
    assert float(lacks) == pytest.approx(0.4)


def test_no_source_is_expected_to_reach_all_or_nothing() -> None:
    """A model that is sure of all lacks 0.02; one that never keeps its word still has 0.05."""
    sure = Sources(surely(square(), 0.999), surely(square(), 0.999))
    assert float(expected_lack(sure, Calibration())) == pytest.approx(0.02)
    assert float(expected_lack(sure, Calibration(client_offset=-0.99))) == pytest.approx(0.95)


def test_an_empty_target_promises_what_both_empty_labels_do() -> None:
    """Of SAM's 0.6 are right and of the model's 0.5: t = 2 x 1.5^3 / (2 x 1.5^3 + 1) = 0.871."""
    nothing = two_classes(torch.full((1, 8, 8), 0.01))
    fitted = Calibration(sam_empty=0.6, client_empty=0.5)
    made = agree(Sources(nothing, nothing), config=AgreementConfig(), calibration=fitted)
    expected = (0.871 * 0.6 + 0.129 * 0.5) ** 2 * (1 + 3 * 0.871) / 4
    assert float(made.weight.mean()) == pytest.approx(expected, abs=1e-3)


def test_where_sam_sees_nothing_the_clients_object_stands() -> None:
    """An empty label is right half of the time; the client expects a Dice of 0.9."""
    nothing = two_classes(torch.full((1, 8, 8), 0.05))
    result = agree(Sources(nothing, surely(square(), 0.95)), config=AgreementConfig())
    assert torch.equal(result.label, square())


def test_only_sams_side_is_raised() -> None:
    """A target that is the model's own does not say more than the model does."""
    sam, client = two_classes(torch.full((1, 1, 4), 0.01)), surely(SAM_LABEL, 0.7)
    trusted = Calibration(sam_empty=0.05)
    result = agree(Sources(sam, client), config=AgreementConfig(), calibration=trusted)
    assert foreground_of(result) == pytest.approx(sharp(client[:, 1].flatten().tolist()), abs=2e-3)


def test_more_classes() -> None:
    sam = spread(torch.tensor([[[2, 2, 1]]]), torch.tensor([[[0.9, 0.9, 0.9]]]), 3)
    client = torch.tensor([[0.1, 0.2, 0.1], [0.1, 0.7, 0.8], [0.8, 0.1, 0.1]])[None, :, None]
    result = agree(Sources(sam, client), config=AgreementConfig())
    assert result.label.flatten().tolist() == [2, 2, 1]
    assert torch.allclose(result.target.sum(dim=1), torch.ones(1, 1, 3))


def test_stored_levels_of_every_class_keep_the_label_on_top() -> None:
    """The first pixel as stored; the second a tie by rounding; the third a class that is sure."""
    levels = torch.tensor([[200, 100, 0], [40, 100, 0], [15, 55, 255]], dtype=torch.uint8)
    label = torch.tensor([[[0, 1, 2]]])
    found = from_levels(levels[None, :, None], label)
    assert found.argmax(dim=1).equal(label)
    assert torch.allclose(found.sum(dim=1), torch.ones(1, 1, 3))
    assert found[0, :, 0, 0].tolist() == pytest.approx([200 / 255, 40 / 255, 15 / 255])
    least = 255 / 512  # nothing is taken as certain
    expected = [least / (255 + 2 * least), least / (255 + 2 * least), 255 / (255 + 2 * least)]
    assert found[0, :, 0, 2].tolist() == pytest.approx(expected)


# --------------------------------------------------------------------------- classes not used


def test_a_class_whose_targets_do_harm_is_left_out() -> None:
    """Of three classes the second is worse: pixels that may be of it have no weight."""
    sam = spread(torch.tensor([[[0, 1, 2, 3]]]), torch.full((1, 1, 4), 0.9), 4)
    fitted = Calibration(
        target_dice=(0.8, 0.3, 0.8), model_dice=(0.7, 0.5, 0.7), target_gain=(0.1, -0.2, 0.1)
    )
    assert fitted.unused == [2]
    result = agree(Sources(sam, sam), config=AgreementConfig(), calibration=fitted)
    assert (result.weight > 0).flatten().tolist() == [True, True, False, True]
    # where it is not the likeliest one, too, if it has a chance of more than 0.1 in the target
    chances = [[0.58, 0.02, 0.36, 0.04], [0.80, 0.02, 0.16, 0.02], *[[0.02, 0.96, 0.01, 0.01]] * 2]
    unsure = torch.tensor(chances).T[None, :, None]
    result = agree(Sources(unsure, unsure), config=AgreementConfig(), calibration=fitted)
    assert 0.1 < float(result.target[0, 2, 0, 0]) < 0.45
    assert (result.weight > 0).flatten().tolist() == [False, True, True, True]


def test_where_no_class_is_used_nothing_counts() -> None:
    harm = Calibration(target_gain=(-0.2,))
    result = agree(SOURCES, config=AgreementConfig(), calibration=harm)
    assert not result.weight.any()
    alone = agree(SOURCES, config=AgreementConfig(rule="sam_soft"), calibration=harm)
    assert alone.weight.all(), "SAM alone has no guard"
    assert shares_of(count_agreement(SOURCES, result))["coverage"] == 0


# --------------------------------------------------------------------------- parts


def test_what_a_label_leaves_is_shared_by_the_others() -> None:
    found = spread(torch.tensor([[[2, 0]]]), torch.tensor([[[0.7, 0.1]]]), 4)
    assert found[0, :, 0, 0].tolist() == pytest.approx([0.1, 0.1, 0.7, 0.1])
    assert found[0, :, 0, 1].argmax() == 0, "a label is never below chance"
    assert torch.allclose(found.sum(dim=1), torch.ones(1, 1, 2))


def test_tempering_keeps_the_label_and_the_others_proportions() -> None:
    found = tempered(torch.tensor([0.2, 0.6, 0.05, 0.15])[None, :, None, None], 0.5).flatten()
    own = math.sqrt(1.5) / (1 + math.sqrt(1.5))
    expected = [p * (1 - own) / 0.4 for p in (0.2, 0.05, 0.15)]
    assert found.tolist() == pytest.approx([expected[0], own, *expected[1:]])
    certain = tempered(torch.tensor([0.0, 1.0, 0.0])[None, :, None, None], 1.0).flatten()
    assert certain.tolist() == pytest.approx([1 / 1024, 511 / 512, 1 / 1024])


def test_tempering_keeps_a_label_that_has_less_than_one_half() -> None:
    """Its log-odds are negative: times 2 they would make another class the likeliest."""
    three = torch.tensor([0.4, 0.35, 0.25])[None, :, None, None]
    for inverse_temperature in (0.5, 2.0):
        assert torch.allclose(tempered(three, inverse_temperature), three)


def test_the_dice_to_be_expected() -> None:
    """The mean Dice of truths that are drawn from the chances is close to what is promised."""
    generator = torch.Generator().manual_seed(0)
    chances = torch.rand((1, 64, 64), generator=generator) ** 2
    label = (chances > 0.5).long()
    promised = float(expected_dice(two_classes(chances), 0.5))
    drawn = torch.rand((200, 64, 64), generator=generator) < chances
    dice = foreground_dice(label.expand(200, -1, -1), drawn.long())
    assert float(dice.mean()) == pytest.approx(promised, abs=0.005)
    assert float(expected_dice(two_classes(torch.zeros(1, 2, 2)), 0.3)) == pytest.approx(0.3)


@pytest.mark.parametrize("power", [3, 12])  # one step does for the first
def test_raising_makes_the_label_that_has_most_dice(power: int) -> None:
    """Nothing that is cut off elsewhere has a higher expected Dice than where odds are raised."""
    generator = torch.Generator().manual_seed(1)
    chances = torch.rand((1, 64, 64), generator=generator) ** power

    def dice(label: Tensor) -> float:
        return float(2 * chances[label].sum() / (chances.sum() + label.sum()))

    best = max(dice(chances > cut / 100) for cut in range(5, 95))
    raised = raised_for_dice(two_classes(chances), 0.5)
    assert torch.equal(raised.label, raised.distribution.argmax(dim=1))
    assert dice(raised.label > 0) == pytest.approx(best, abs=1e-3)
    assert float(raised.dice) == pytest.approx(best, abs=1e-3)
    assert best > dice(chances > 0.5) + 0.01


def test_an_empty_label_stays_where_no_other_promises_more() -> None:
    """An image with nothing but a doubtful blob, and one with a blob that is nearly half sure."""
    chances = torch.full((2, 16, 16), 0.01)
    chances[0, :4, :4], chances[1, :4, :4] = 0.2, 0.48
    both = two_classes(chances)
    raised = raised_for_dice(both, 0.5)
    assert raised.label.sum(dim=(1, 2)).tolist() == [0, 16]
    odds_raised = raised.distribution[0, 1] / raised.distribution[0, 0]
    assert torch.allclose(odds_raised, 3 * both[0, 1] / both[0, 0]), "(2 - 0.5) / 0.5"
    blob = 2 * 0.48 * 16 / (0.48 * 16 + 0.01 * 240 + 16)
    assert raised.dice.tolist() == pytest.approx([0.5, blob])
    assert blob > 0.5
    assert raised_for_dice(both, 0.9).label.sum() == 0, "images without objects are known"


def test_dice_counts_classes_and_empty_images() -> None:
    first = torch.tensor([[[0, 0]], [[1, 2]], [[1, 0]], [[1, 1]]])
    second = torch.tensor([[[0, 0]], [[2, 2]], [[0, 1]], [[1, 1]]])
    assert foreground_dice(first, second).tolist() == [1.0, 0.5, 0.0, 1.0]
