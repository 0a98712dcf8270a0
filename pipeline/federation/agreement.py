"""Agreement: SAM's label and the client's own prediction become one target, pixel by pixel.

Pure functions on tensors. ``Sources`` holds SAM's label ``y_s`` with its probability ``s`` and the
client's prediction on the weak view, label ``y_c`` with probability ``c``. ``RULES`` lists the ways
from there to a target and its weight. The rule ``adaptive`` is explained in docs/method.md:

* Both probabilities are calibrated on D_p's calibration part: ``s' = a_s logit(s)``,
  ``c' = a_c logit(c)``.
* Where the labels are the same, ``w = sigmoid(s' + c' + ln K)``, as of two independent witnesses.
* Where they differ, ``p = sigmoid(s' - h c' + max(b, 0) + h min(b, 0) +- g)`` is the chance that
  SAM is right: ``b`` is what the calibration part says of conflicts, ``g`` a prior for the source
  that says foreground, and ``h`` the reliability of the client's side. The likelier source wins if
  its chance reaches the threshold of its class; otherwise w = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.config import AgreementConfig, Rule

_CLIP = 1 / 512  # probabilities are never taken as certain


@dataclass(frozen=True)
class Calibration:
    """What the calibration part says of the two sources. The default changes nothing."""

    sam_inverse_temperature: float = 1.0  # a_s
    client_inverse_temperature: float = 1.0  # a_c
    conflict_log_odds: float = 0.0  # b, log-odds that SAM is right in a conflict, all else equal


@dataclass(frozen=True)
class AgreementState:
    """What a client knows of both sources: all that agreement carries from round to round."""

    class_confidence: Tensor  # (K+1,) float32 in 0..1, the client's running confidence by class
    calibration: Calibration = Calibration()

    @classmethod
    def initial(cls, num_classes: int) -> AgreementState:
        """Return the state before any learning: every class has the lowest threshold."""
        return cls(torch.zeros(num_classes + 1))

    def thresholds(self, config: AgreementConfig) -> Tensor:
        """Return the class-wise thresholds (K+1,), lowest for a class that is not learnt yet."""
        span = config.max_threshold - config.min_threshold
        return config.min_threshold + span * self.class_confidence


@dataclass(eq=False)
class Sources:
    """What SAM and the client say of the same pixels of B images."""

    sam_label: Tensor  # (B, H, W) int64 in 0..K
    sam_probability: Tensor  # (B, H, W) float32, of that label
    client_probabilities: Tensor  # (B, K+1, H, W) float32, sum to one over the classes
    client_label: Tensor = field(init=False)  # (B, H, W) int64, the most probable class
    client_probability: Tensor = field(init=False)  # (B, H, W) float32, of that label
    same: Tensor = field(init=False)  # (B, H, W) bool, whether the labels are the same
    dice: Tensor = field(init=False)  # (B,) float32, ``foreground_dice`` of the labels

    def __post_init__(self) -> None:
        self.client_probability, self.client_label = self.client_probabilities.max(dim=1)
        self.same = self.sam_label == self.client_label
        self.dice = foreground_dice(self.sam_label, self.client_label)

    def select(self, rows: Tensor) -> Sources:
        """Return the sources of the images ``rows`` (R,) int64 alone."""
        given = self.sam_label, self.sam_probability, self.client_probabilities
        return Sources(*(values[rows] for values in given))

    def client_reliability(self) -> Tensor:
        """Return h (B, H, W) float32 in 0..1: how far the client's side counts in a conflict.

        It is 1 where the client says foreground and the image's Dice where it says background. A
        network that fails says background, so that word and the client's past successes count only
        as far as it agrees with SAM on the image at all.
        """
        return torch.where(self.client_label == 0, self.dice[:, None, None], 1.0)

    def foreground_log_odds(self, prior: float) -> Tensor:
        """Return +``prior`` where only SAM says foreground, -``prior`` where only the client does.

        Elsewhere it is 0: (B, H, W) float32.
        """
        return prior * ((self.sam_label > 0).float() - (self.client_label > 0).float())

    def calibrated(self, calibration: Calibration) -> tuple[Tensor, Tensor]:
        """Return s' and c', the calibrated logits of both labels, (B, H, W) float32 each."""
        return (
            calibration.sam_inverse_temperature * logit(self.sam_probability),
            calibration.client_inverse_temperature * logit(self.client_probability),
        )


class PseudoLabel(NamedTuple):
    """What the unlabelled term trains towards."""

    label: Tensor  # (B, H, W) int64
    weight: Tensor  # (B, H, W) float32 in 0..1


def agree(sources: Sources, *, config: AgreementConfig, state: AgreementState) -> PseudoLabel:
    """Return the target and the weight of every pixel under ``config.rule``."""
    return RULES[config.rule](sources, config, state)


def count_agreement(sources: Sources, target: PseudoLabel) -> dict[str, float]:
    """Return what a batch adds to the sums of a client's round; ``shares_of`` reads these."""
    kept = target.weight > 0
    conflict, sam_won = kept & ~sources.same, target.label == sources.sam_label
    return {
        "images": len(sources.dice),
        "pixels": kept.numel(),
        "agreement": float(sources.dice.sum()),
        "coverage": int(kept.sum()),
        "from_sam": int((conflict & sam_won).sum()),
        "from_client": int((conflict & ~sam_won).sum()),
        "weight": float(target.weight.sum()),
    }


def shares_of(counts: Mapping[str, float]) -> dict[str, float]:
    """Return means in 0..1: ``agreement`` is the images' foreground Dice, the others of pixels.

    They are the pixels with a weight, those in conflicts that SAM or the client won, the weight.
    """
    names = ("coverage", "from_sam", "from_client", "weight")
    shares = {name: counts[name] / counts["pixels"] for name in names}
    return {"agreement": counts["agreement"] / counts["images"], **shares}


def update_state(
    state: AgreementState, sources: Sources, *, config: AgreementConfig
) -> AgreementState:
    """Return ``state`` with each class's running confidence moved by a batch.

    The confidence of a class is the mean of ``((K+1) c - 1) / K`` over the pixels that the client
    predicts as that class: 0 at chance. It is 0 where the class is not predicted at all, so that a
    class which the client unlearns loses its threshold too.
    """
    label, classes = sources.client_label.flatten(), sources.client_probabilities.shape[1]
    certainty = ((classes * sources.client_probability - 1) / (classes - 1)).flatten()
    counts = torch.bincount(label, minlength=classes).float()
    sums = torch.zeros(classes).scatter_add_(0, label.cpu(), certainty.float().cpu())
    old, new = state.class_confidence, sums / counts.cpu().clamp(min=1)
    return replace(state, class_confidence=config.momentum * old + (1 - config.momentum) * new)


def foreground_dice(first: Tensor, second: Tensor) -> Tensor:
    """Return the Dice (B,) of the foregrounds of two label maps (B, H, W); 1 if both are empty.

    A foreground pixel counts as shared only where the classes are equal.
    """
    a, b = first > 0, second > 0
    shared = (a & b & (first == second)).sum(dim=(1, 2)).float()
    total = (a.sum(dim=(1, 2)) + b.sum(dim=(1, 2))).float()
    return torch.where(total > 0, 2 * shared / total.clamp(min=1), 1.0)


def logit(probability: Tensor) -> Tensor:
    """Return the log-odds of ``probability``, which is never taken as certain."""
    return torch.logit(probability.clamp(_CLIP, 1 - _CLIP))


# --------------------------------------------------------------------------- rules

AgreementRule = Callable[[Sources, AgreementConfig, AgreementState], PseudoLabel]


def _adaptive(sources: Sources, config: AgreementConfig, state: AgreementState) -> PseudoLabel:
    s, c = sources.calibrated(state.calibration)
    h, b = sources.client_reliability(), state.calibration.conflict_log_odds
    bias = max(b, 0.0) + h * min(b, 0.0)
    chance = torch.sigmoid(s - h * c + bias + sources.foreground_log_odds(config.foreground_prior))
    sam_wins = sources.same | (chance >= 0.5)
    target = torch.where(sam_wins, sources.sam_label, sources.client_label)
    posterior = torch.maximum(chance, 1 - chance)
    accepted = posterior >= state.thresholds(config).to(c)[target]
    conflict = posterior * accepted * torch.where(sam_wins, 1.0, h)
    # Bayes with a uniform prior: two wrong witnesses must also hit the same one of K classes
    classes = math.log(len(state.class_confidence) - 1)
    weight = torch.where(sources.same, torch.sigmoid(s + c + classes), conflict)
    return PseudoLabel(target, weight)


def _confident(sources: Sources, config: AgreementConfig, state: AgreementState) -> PseudoLabel:
    s, c = sources.sam_probability, sources.client_probability
    target = torch.where(s >= c, sources.sam_label, sources.client_label)
    return PseudoLabel(target, (torch.maximum(s, c) >= config.threshold).float())


def _soft(sources: Sources, config: AgreementConfig, state: AgreementState) -> PseudoLabel:
    """Take the mean of both distributions; SAM's other classes share what its label leaves."""
    s, client = sources.sam_probability, sources.client_probabilities
    rest = ((1 - s) / (client.shape[1] - 1))[:, None].expand_as(client)
    sam = rest.scatter(1, sources.sam_label[:, None], s[:, None])
    weight, target = ((sam + client) / 2).max(dim=1)
    return PseudoLabel(target, weight)


RULES: Mapping[Rule, AgreementRule] = {
    "adaptive": _adaptive,
    "consensus": lambda both, config, state: PseudoLabel(both.sam_label, both.same.float()),
    "confident": _confident,
    "soft": _soft,
    "sam_only": lambda both, config, state: PseudoLabel(
        both.sam_label, torch.ones_like(both.sam_probability)
    ),
    "client_only": lambda both, config, state: PseudoLabel(
        both.client_label, (both.client_probability >= config.threshold).float()
    ),
}
