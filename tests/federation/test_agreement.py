"""Agreement against hand-worked numbers, and the cases that the method must not lose."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pipeline.config import AgreementConfig
from pipeline.federation.agreement import (
    AgreementState,
    Calibration,
    PseudoLabel,
    Sources,
    agree,
    count_agreement,
    foreground_dice,
    shares_of,
    update_state,
)
from pipeline.federation.calibration import (
    calibrate,
    fit_conflict_log_odds,
    fit_inverse_temperature,
    split_in_halves,
)

# one image of four pixels: both foreground; SAM only; client only; both background
SAM_LABEL = torch.tensor([[[1, 1, 0, 0]]])
SAM_PROBABILITY = torch.tensor([[[0.9, 0.8, 0.6, 0.95]]])
CLIENT_FOREGROUND = torch.tensor([[[0.7, 0.4, 0.9, 0.2]]])
CLIENT = torch.stack([1 - CLIENT_FOREGROUND, CLIENT_FOREGROUND], dim=1)

SOURCES = Sources(SAM_LABEL, SAM_PROBABILITY, CLIENT)


def run(rule: str, **changes: object) -> PseudoLabel:
    arguments = {
        "config": AgreementConfig(rule=rule, foreground_prior=1.0),  # type: ignore[arg-type]
        "state": AgreementState.initial(1),
    } | changes
    return agree(SOURCES, **arguments)  # type: ignore[arg-type]


def sigmoid_of_odds(odds: float) -> float:
    return odds / (1 + odds)


def test_adaptive_by_hand() -> None:
    """d = 2*1/(2+2) = 0.5; threshold 0.6 for both classes at the start; g = 1 for foreground."""
    result = run("adaptive")
    expected = [
        sigmoid_of_odds(9 * (7 / 3)),  # consensus: odds multiply, 21/22
        # SAM says foreground, odds 4 e, against the client's background, 1.5 at half weight
        sigmoid_of_odds(4 * math.e / math.sqrt(1.5)),
        sigmoid_of_odds(9 * math.e / 1.5),  # the client says foreground and counts fully
        sigmoid_of_odds(19 * 4),
    ]
    assert result.label.flatten().tolist() == [1, 1, 1, 0]
    assert result.weight.flatten().tolist() == pytest.approx(expected, abs=1e-6)
    assert shares_of(count_agreement(SOURCES, result)) == pytest.approx(
        {
            "agreement": 0.5,
            "coverage": 1.0,
            "from_sam": 0.25,
            "from_client": 0.25,
            "weight": sum(expected) / 4,
        }
    )


def test_adaptive_rejects_below_the_class_threshold() -> None:
    """At full confidence the threshold is 0.9: SAM's 0.766 and the client's 0.857 both fall."""
    strict = AgreementConfig(max_threshold=0.9, foreground_prior=0.0)
    result = run("adaptive", config=strict, state=AgreementState(torch.ones(2)))
    assert result.weight.flatten()[1:3].tolist() == [0.0, 0.0]
    assert shares_of(count_agreement(SOURCES, result))["coverage"] == 0.5


def test_log_odds_move_conflicts_only() -> None:
    before, after = (
        run("adaptive"),
        run("adaptive", state=AgreementState(torch.zeros(2), Calibration(conflict_log_odds=4.0))),
    )
    assert after.label.flatten().tolist() == [1, 1, 0, 0]  # the third pixel now goes to SAM
    chance = sigmoid_of_odds(1.5 / (9 * math.e) * math.exp(4.0))
    assert float(after.weight.flatten()[2]) == pytest.approx(chance, abs=1e-6)
    assert torch.equal(after.weight.flatten()[[0, 3]], before.weight.flatten()[[0, 3]])


def test_the_other_rules_by_hand() -> None:
    def flat(rule: str) -> tuple[list[int], list[float]]:
        result = run(rule)
        return result.label.flatten().tolist(), result.weight.flatten().tolist()

    assert flat("consensus") == ([1, 1, 0, 0], [1, 0, 0, 1])
    assert flat("sam_only") == ([1, 1, 0, 0], [1, 1, 1, 1])
    assert flat("client_only") == ([1, 0, 1, 0], [0, 0, 1, 0])  # c = .7 .6 .9 .8, threshold .9
    assert flat("confident") == ([1, 1, 1, 0], [1, 0, 1, 1])
    target, weight = flat("soft")
    assert target == [1, 1, 1, 0]
    assert weight == pytest.approx([0.8, 0.6, 0.65, 0.875])


@pytest.mark.parametrize("log_odds", [-1.0, 0.0, 1.0])
def test_a_collapsed_client_is_rescued(log_odds: float) -> None:
    """A client that is quite sure of background everywhere must not silence a confident SAM."""
    sam_label = torch.zeros(1, 8, 8, dtype=torch.int64)
    sam_label[:, 2:6, 2:6] = 1
    sam_probability = torch.full((1, 8, 8), 0.97)
    client = torch.zeros(1, 2, 8, 8)
    client[:, 0], client[:, 1] = 0.999, 0.001
    result = agree(
        Sources(sam_label, sam_probability, client),
        config=AgreementConfig(),
        # sure of background, knows no foreground
        state=AgreementState(torch.tensor([1.0, 0.0]), Calibration(conflict_log_odds=log_odds)),
    )
    assert torch.equal(result.label, sam_label)
    assert bool((result.weight[sam_label == 1] > 0.9).all())


def test_a_collapse_after_learning_is_rescued_whatever_the_calibration() -> None:
    """SAM did badly on the calibration part (b = -4) and both classes had been learnt."""
    config = AgreementConfig()
    client = torch.zeros(1, 2, 8, 8)
    client[:, 0], client[:, 1] = 0.999, 0.001
    state = AgreementState(
        torch.ones(2), Calibration(sam_inverse_temperature=0.41, conflict_log_odds=-4.0)
    )
    sam_label = torch.zeros(1, 8, 8, dtype=torch.int64)
    sam_label[:, 2:6, 2:6] = 1
    sources = Sources(sam_label, torch.full((1, 8, 8), 0.97), client)
    for _ in range(30):
        state = update_state(state, sources, config=config)
    result = agree(sources, config=config, state=state)
    assert torch.equal(result.label, sam_label)
    assert bool((result.weight[sam_label == 1] > 0.8).all())


def test_consensus_of_more_classes_by_hand() -> None:
    """K = 3, s = c = 0.4: odds 0.4 * 0.4 * 3 / 0.36 = 4/3, above either witness alone."""
    client = torch.full((1, 4, 1, 1), 0.2)
    client[:, 2] = 0.4
    result = agree(
        Sources(torch.full((1, 1, 1), 2), torch.full((1, 1, 1), 0.4), client),
        config=AgreementConfig(),
        state=AgreementState.initial(3),
    )
    assert float(result.weight) == pytest.approx(4 / 7)


def test_halves_keep_groups_together() -> None:
    first, second = split_in_halves(["a", "a", "b", "c", "b", "a"])
    assert (first.tolist(), second.tolist()) == ([0, 1, 5], [2, 3, 4])


def test_a_client_wins_where_sam_is_unsure_and_the_image_agrees() -> None:
    sam_label = torch.zeros(1, 8, 8, dtype=torch.int64)
    sam_label[:, 2:6, 2:6] = 1
    client_label = sam_label.clone()
    client_label[:, 2, 2] = 0
    sam_probability = torch.full((1, 8, 8), 0.99)
    sam_probability[:, 2, 2] = 0.55
    c = torch.where(client_label == 1, 0.98, 0.02)
    client = torch.stack([1 - c, c], dim=1)
    result = agree(
        Sources(sam_label, sam_probability, client),
        config=AgreementConfig(),
        state=AgreementState.initial(1),
    )
    assert int(result.label[0, 2, 2]) == 0
    assert float(result.weight[0, 2, 2]) > 0.8


def test_dice_counts_classes_and_empty_images() -> None:
    first = torch.tensor([[[0, 0]], [[1, 2]], [[1, 0]], [[1, 1]]])
    second = torch.tensor([[[0, 0]], [[2, 2]], [[0, 1]], [[1, 1]]])
    assert foreground_dice(first, second).tolist() == [1.0, 0.5, 0.0, 1.0]


def test_more_classes() -> None:
    sam_label = torch.tensor([[[2, 2, 1]]])
    client = torch.tensor([[[0.1, 0.2, 0.1]], [[0.1, 0.7, 0.8]], [[0.8, 0.1, 0.1]]])[None]
    client = client.reshape(1, 3, 1, 3)
    result = agree(
        Sources(sam_label, torch.tensor([[[0.9, 0.9, 0.9]]]), client),
        config=AgreementConfig(),
        state=AgreementState.initial(2),
    )
    assert result.label.flatten().tolist() == [2, 2, 1]
    assert bool((result.weight > 0).all())


def test_state_follows_the_client() -> None:
    """Class 1 at c = 0.9: confidence (2*0.9-1)/1 = 0.8, a tenth of it after one step."""
    probability = torch.tensor([0.1, 0.9]).reshape(1, 2, 1, 1).expand(1, 2, 2, 2)
    sources = Sources(torch.zeros(1, 2, 2, dtype=torch.int64), torch.ones(1, 2, 2), probability)
    config = AgreementConfig(momentum=0.9)
    state = update_state(AgreementState.initial(1), sources, config=config)
    assert state.class_confidence.tolist() == pytest.approx([0.0, 0.08])
    limits = state.thresholds(AgreementConfig(min_threshold=0.6, max_threshold=0.9))
    assert limits.tolist() == pytest.approx([0.6, 0.624])


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


def fit_of(evidence: Tensor, reliability: Tensor, sam_right: Tensor) -> float:
    """b, where SAM and the client contradict each other on all pixels."""
    return fit_conflict_log_odds(
        evidence, reliability, sam_right=sam_right, client_right=~sam_right
    )


def test_log_odds_for_sam_are_recovered() -> None:
    """Log-odds for SAM count fully, however little the client's side does."""
    generator = torch.Generator().manual_seed(1)
    evidence = torch.randn((400, 8, 8), generator=generator)
    won = torch.rand(evidence.shape, generator=generator) < torch.sigmoid(evidence + 1.5)
    fitted = fit_of(evidence, torch.full_like(evidence, 0.2), won)
    assert fitted == pytest.approx(1.5, abs=0.05)


def test_log_odds_for_the_client_are_fitted_as_they_are_used() -> None:
    """With h = 0 in half of the images, b = -1.5 is what the other half says, not half of it."""
    generator = torch.Generator().manual_seed(1)
    evidence = torch.randn((800, 8, 8), generator=generator)
    reliability = torch.ones_like(evidence)
    reliability[::2] = 0.0
    chance = torch.sigmoid(evidence - 1.5 * reliability)
    won = torch.rand(evidence.shape, generator=generator) < chance
    fitted = fit_of(evidence, reliability, won)
    assert fitted == pytest.approx(-1.5, abs=0.08)
    # the best of all b, by brute force
    grid = torch.linspace(-3, 3, 121, dtype=torch.float64)
    logit = evidence.double() + grid[:, None, None, None].clamp(max=0) * reliability
    logit = logit + grid[:, None, None, None].clamp(min=0)
    loss = (torch.nn.functional.softplus(logit) - won * logit).mean(dim=(2, 3)).sum(dim=1)
    assert fitted == pytest.approx(float(grid[(loss + grid.square() / 2).argmin()]), abs=0.03)


@pytest.mark.parametrize("right", [True, False])
def test_where_both_are_right_or_wrong_there_is_nothing_to_fit(right: bool) -> None:
    nothing, same = torch.zeros(3, 4, 4), torch.full((3, 4, 4), right)
    assert fit_conflict_log_odds(nothing, nothing, sam_right=same, client_right=same) == 0.0


def test_calibration_finds_the_worse_source() -> None:
    """SAM right on 9 pixels of 10, the client on 7, both claiming 0.9."""
    generator = torch.Generator().manual_seed(2)
    truth = torch.zeros(20, 16, 16, dtype=torch.int64)
    truth[:, 4:12, 4:12] = 1
    good = torch.where(torch.rand(truth.shape, generator=generator) < 0.9, truth, 1 - truth)
    poor = torch.where(torch.rand(truth.shape, generator=generator) < 0.7, truth, 1 - truth)

    def fit(sam: Tensor, client: Tensor) -> Calibration:
        c = torch.where(client == 1, 0.9, 0.1)
        sources = Sources(sam, torch.full(sam.shape, 0.9), torch.stack([1 - c, c], 1))
        groups = [str(i) for i in range(20)]
        return calibrate(sources, truth, groups=groups, config=AgreementConfig())

    fitted = fit(good, poor)
    assert fitted.sam_inverse_temperature == pytest.approx(1.0, rel=0.15)
    assert fitted.client_inverse_temperature < 0.6
    assert fitted.conflict_log_odds > fit(poor, good).conflict_log_odds


def test_few_images_leave_calibration_alone() -> None:
    sources = Sources(SAM_LABEL, SAM_PROBABILITY, CLIENT)
    fitted = calibrate(sources, SAM_LABEL, groups=["a"], config=AgreementConfig())
    assert fitted == Calibration()


def test_a_clients_foreground_counts_whatever_its_image_agrees() -> None:
    """SAM sees nothing, d = 0; the client's foreground wins by its own odds, 3 e : 1.5."""
    client = torch.tensor([[[[0.25]], [[0.75]]]])
    result = agree(
        Sources(torch.zeros(1, 1, 1, dtype=torch.int64), torch.full((1, 1, 1), 0.6), client),
        config=AgreementConfig(foreground_prior=1.0),
        state=AgreementState.initial(1),
    )
    assert result.label.item() == 1
    assert result.weight.item() == pytest.approx(sigmoid_of_odds(3 * math.e / 1.5), abs=1e-6)


def test_two_foregrounds_have_no_prior() -> None:
    """Classes 1 and 2 in conflict: 4 : 9 for the client, with any prior for foreground."""
    client = torch.tensor([[[[0.05]], [[0.05]], [[0.9]]]])
    for prior in (0.0, 5.0):
        result = agree(
            Sources(torch.ones(1, 1, 1, dtype=torch.int64), torch.full((1, 1, 1), 0.8), client),
            config=AgreementConfig(foreground_prior=prior),
            state=AgreementState.initial(2),
        )
        assert result.label.item() == 2
        assert result.weight.item() == pytest.approx(9 / 13, abs=1e-6)


def test_a_batch_leaves_the_calibration_alone() -> None:
    state = AgreementState(torch.tensor([0.25, 0.5, 0.75]), Calibration(0.5, 1.5, -0.25))
    same = torch.zeros(1, 2, 2, dtype=torch.int64)
    sources = Sources(same, torch.ones(1, 2, 2), torch.full((1, 3, 2, 2), 1 / 3))
    assert update_state(state, sources, config=AgreementConfig()).calibration == state.calibration
