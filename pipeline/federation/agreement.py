"""Agreement: SAM's label and the received model's prediction become one target for each pixel.

Pure functions on tensors. Each source is a distribution over the K+1 classes of each pixel.
``RULES`` lists the ways from both to a target and its weight. The rule ``adaptive`` is soft
agreement; docs/method.md explains it:

* Both distributions are calibrated on D_p's calibration part.
* A source's expected Dice E on an image (``expected_dice``) says how good its label is there,
  without truth.
* SAM's odds of foreground are multiplied by ``(2 - e) / e``: Dice is highest if foreground is what
  has a chance of e / 2 or more, e being the Dice that this very label promises (Lipton et al., ECML
  2014; ``raised_for_dice``). The model's are not, as it would learn to say more, and more again in
  the next round.
* The model keeps less of what it promises where changes of light and colour move its labels more
  than at home: E_c is lower there (``Calibration.at_site``).
* At a site where the model promises more than 0.9, all of it counts for less (``room_left``).
* The target is proportional to ``p_s^t p_c^(1 - t)`` with the trust
  ``t = 2 O_s^3 / (2 O_s^3 + O_c^3)``, where ``O = E / (1 - E)``. It is sharpened, which moves no
  boundary, and the image's weight is the square of what it promises then, times
  ``1/4 + 3/4 t``: the model's own word alone counts a quarter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.config import AgreementConfig, Rule

#: Groups added to those of the calibration part, as if seen with no difference.
PRIOR_GROUPS = 2.0

_CLIP = 1 / 512  # probabilities are never taken as certain
_LEAST_DICE, _MOST_DICE = 0.05, 0.98  # what a source is expected to reach, so that odds are finite
_RAISES = 3  # times that a label is chosen by the Dice which the one before promised
_TRUST_POWER = 3
_SAM_PRIOR = 2.0  # the model's own word is no news to it: SAM's counts for more, all else equal
# weight of a target that is the model's own word, which holds on to what the model was
_OWN_WEIGHT = 0.25
# mean Dice that the model lacks by its own word, from which on unlabelled images count in full
_ROOM = 0.1
_ROOM_POWER = 8
_KEEPS_POWER = 2  # of the model's consistency, in what it keeps of its promise away from home
_LEAST_KEPT = 0.05  # so that the odds of a model that wavers everywhere stay finite
# Dice that a model may have over the targets where it was trained, with targets that help elsewhere
_HOME_ADVANTAGE = 0.1
# power of a target's odds: calibrated ones are too flat to learn from in few steps
_SHARPNESS = 3.0
_DOUBT = 0.1  # chance of an unused class above which a pixel is left out


@dataclass(frozen=True)
class Calibration:
    """What the calibration part says of the two sources. The default changes nothing."""

    sam_inverse_temperature: float = 1.0  # a_s
    client_inverse_temperature: float = 1.0  # a_c
    sam_bias: float = 0.0  # b, log-odds of foreground that SAM's label lacks
    sam_offset: float = 0.0  # what SAM's true Dice has over the expected one
    client_offset: float = 0.0
    sam_empty: float = 0.5  # chance that an empty label of SAM's is right
    client_empty: float = 0.5
    client_consistency: float | None = None  # Dice of the model's labels under other light
    groups: int = 0  # patients or videos of the calibration part, on which that was measured
    client_kept: float = 1.0  # share of its expected Dice that the model keeps at a site
    target_dice: tuple[float, ...] = ()  # of the targets, by class, where they were measured
    model_dice: tuple[float, ...] = ()  # of the received model alone
    target_gain: tuple[float, ...] = ()  # of the first over the second, shrunk

    @property
    def unused(self) -> list[int]:
        """The classes whose targets are so much worse than what the model says by itself."""
        gains = enumerate(self.target_gain, start=1)
        return [number for number, gain in gains if is_harm(gain)]

    def at_site(self, consistency: float) -> Calibration:
        """Return it for a site at which the model's labels have so much Dice under other light.

        Two groups that have the site's consistency are added to those of the calibration part.
        """
        if not self.client_consistency or not self.groups:
            return self  # nothing was measured at home
        summed = self.groups * self.client_consistency + PRIOR_GROUPS * consistency
        kept = min(1.0, consistency * (self.groups + PRIOR_GROUPS) / summed)
        kept = max(_LEAST_KEPT, kept)
        return replace(self, client_kept=kept**_KEEPS_POWER)

    def numbers(self) -> dict[str, float]:
        """Return all of it by name, for a client's report."""
        single = {k: v for k, v in vars(self).items() if isinstance(v, float)}
        for name in ("target_dice", "model_dice", "target_gain"):
            values = enumerate(getattr(self, name), start=1)
            # a class that nobody has on the calibration part was not measured
            single |= {f"{name}_{number}": v for number, v in values if not math.isnan(v)}
        return single


def is_harm(gain: float) -> bool:
    """Return whether targets lose more to the model alone than its being at home explains."""
    return gain < -_HOME_ADVANTAGE


@dataclass(eq=False)
class Sources:
    """What SAM and the received model say of the same pixels of B images."""

    sam: Tensor  # (B, K+1, H, W) float32, sum to one over the classes: ``spread``
    client: Tensor  # likewise
    sam_label: Tensor = field(init=False)  # (B, H, W) int64, the most probable class
    client_label: Tensor = field(init=False)  # likewise
    same: Tensor = field(init=False)  # (B, H, W) bool, whether the labels are the same
    dice: Tensor = field(init=False)  # (B,) float32, ``foreground_dice`` of the labels

    def __post_init__(self) -> None:
        self.sam_label, self.client_label = likeliest(self.sam), likeliest(self.client)
        self.same = self.sam_label == self.client_label
        self.dice = foreground_dice(self.sam_label, self.client_label)

    def select(self, rows: Tensor) -> Sources:
        """Return the sources of the images ``rows`` (R,) int64 alone."""
        return Sources(self.sam[rows], self.client[rows])


class PseudoLabel(NamedTuple):
    """What the unlabelled term trains towards."""

    target: Tensor  # (B, H, W) int64 classes, or (B, K+1, H, W) float32 distributions
    weight: Tensor  # (B, H, W) float32 in 0..1

    @property
    def label(self) -> Tensor:
        """The most probable class (B, H, W) int64."""
        return likeliest(self.target) if self.target.ndim == 4 else self.target

    @property
    def foreground(self) -> Tensor:
        """The chance of any foreground (B, H, W) float32."""
        target = self.target
        return target[:, 1:].sum(dim=1) if target.ndim == 4 else (target > 0).float()


def spread(label: Tensor, probability: Tensor, classes: int) -> Tensor:
    """Return distributions (B, K+1, H, W) of labels with their probabilities.

    The other classes share evenly what the label leaves. A label is never below chance, so that it
    stays the most probable class.

    Args:
        label: (B, H, W) int64 in 0..K. probability: (B, H, W) float32. classes: K+1.
    """
    own = probability.clamp(1 / classes + _CLIP, 1)[:, None]
    rest = ((1 - own) / (classes - 1)).expand(-1, classes, -1, -1)
    return rest.scatter(1, label[:, None], own)


def from_levels(levels: Tensor, label: Tensor) -> Tensor:
    """Return distributions (B, K+1, H, W) from stored levels of every class.

    Rounding may have made the label's level that of another class; it stays the most probable one,
    by half a level at least.

    Args:
        levels: (B, K+1, H, W) uint8 in 0..255, each rounded by itself. label: (B, H, W) int64.
    """
    values, own = levels.float(), label[:, None]
    others = values.scatter(1, own, 0).amax(dim=1, keepdim=True)
    values = values.scatter(1, own, torch.maximum(values.gather(1, own), others + 0.5))
    values = values.clamp(min=255 * _CLIP)
    return values / values.sum(dim=1, keepdim=True)


def likeliest(distribution: Tensor) -> Tensor:
    """Return the most probable class (B, H, W) int64 of (B, K+1, H, W), the first of equals.

    ``argmax`` says the same, and takes four to ten times as long over this dimension on a CPU.
    """
    return distribution.max(dim=1).indices


def tempered(distribution: Tensor, inverse_temperature: float) -> Tensor:
    """Return distributions whose likeliest class has its log-odds times ``inverse_temperature``.

    The other classes keep their proportions. Where the likeliest class, one of several, has less
    than one half nothing changes, so that it stays the likeliest one.

    Args and result: (B, K+1, H, W) float32.
    """
    top, label = distribution.max(dim=1, keepdim=True)
    own = torch.sigmoid(tempered_logit(logit(top), inverse_temperature))
    rest = distribution * ((1 - own) / (1 - top).clamp(min=1e-6))
    rest = torch.where(top > 1 - 1e-6, (1 - own) / (distribution.shape[1] - 1), rest)
    return rest.scatter(1, label, own)


def tempered_logit(logit: Tensor, inverse_temperature: float | Tensor) -> Tensor:
    """Return log-odds times ``inverse_temperature`` where they are positive, else as they are."""
    return torch.where(logit > 0, inverse_temperature * logit, logit)


def expected_dice(
    distribution: Tensor, empty: float | Tensor, label: Tensor | None = None
) -> Tensor:
    """Return the Dice (B,) that a label is to be expected to have, by default the likeliest one.

    ``2 sum(p[label]) / (sum(p) + sum([label]))`` over the foreground; ``empty`` for a label without
    foreground.

    Args:
        distribution: (B, K+1, H, W). label: (B, H, W) int64.
    """
    label = likeliest(distribution) if label is None else label
    chance = distribution.gather(1, label[:, None])[:, 0]
    found = (label > 0).float()
    total = distribution[:, 1:].sum(dim=(1, 2, 3)) + found.sum(dim=(1, 2))
    promised = 2 * (chance * found).sum(dim=(1, 2)) / total.clamp(min=1e-6)
    return torch.where(found.sum(dim=(1, 2)) > 0, promised, empty)


def foreground_raised(distribution: Tensor, factor: Tensor) -> Tensor:
    """Return distributions (B, K+1, H, W) with the odds of foreground times ``factor`` (B,)."""
    foreground = distribution[:, 1:] * factor[:, None, None, None]
    raised = torch.cat([distribution[:, :1], foreground], dim=1)
    return raised / raised.sum(dim=1, keepdim=True)


class Raised(NamedTuple):
    """Distributions raised for Dice, the labels by which they are trusted, and their promise."""

    distribution: Tensor  # (B, K+1, H, W) float32
    label: Tensor  # (B, H, W) int64
    dice: Tensor  # (B,) float32


def raised_for_dice(distribution: Tensor, empty: float) -> Raised:
    """Raise the odds of foreground to where the likeliest label is the best for Dice.

    A label of what has a chance of half the Dice that another one promises, or more, promises no
    less than that one (Dinkelbach, 1967); three such steps come to the best within a hundredth. An
    empty likeliest label stays where no other one promises more than ``empty``; odds are raised by
    that then, so that an object which another source sees stands where empty labels are wrong.

    Args:
        distribution: (B, K+1, H, W). empty: what a label without foreground promises.
    """
    raised, label = distribution, likeliest(distribution)
    dice = expected_dice(distribution, empty, label)
    found = (label > 0).flatten(1).any(dim=1)
    for _ in range(_RAISES):
        dice = dice.clamp(_LEAST_DICE, _MOST_DICE)
        raised = foreground_raised(distribution, (2 - dice) / dice)
        label = likeliest(raised)
        dice = expected_dice(distribution, empty, label)
    better = found | (dice > empty)
    worth = torch.full_like(dice, empty).clamp(_LEAST_DICE, _MOST_DICE)
    alone = foreground_raised(distribution, (2 - worth) / worth)
    return Raised(
        torch.where(better[:, None, None, None], raised, alone),
        label * better[:, None, None],
        dice.where(better, empty),
    )


def agree(
    sources: Sources, *, config: AgreementConfig, calibration: Calibration | None = None
) -> PseudoLabel:
    """Return the target and the weight of every pixel under ``config.rule``."""
    return RULES[config.rule](sources, config, calibration or Calibration())


def expected_lack(sources: Sources, calibration: Calibration) -> Tensor:
    """Return the Dice (B,) that the model lacks by its own word, ``1 - E_c``."""
    _, dice = _client_side(sources.client, calibration)
    return 1 - dice


def room_left(lack: float) -> float:
    """Return how much unlabelled images count, 0..1, for a model that lacks so much Dice.

    ``min(1, lack / 0.1)^8``: labels that are no better than a good model only hold it back.
    """
    return min(1.0, lack / _ROOM) ** _ROOM_POWER


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

AgreementRule = Callable[[Sources, AgreementConfig, Calibration], PseudoLabel]


def _adaptive(sources: Sources, config: AgreementConfig, fitted: Calibration) -> PseudoLabel:
    sam, e_sam = _sam_side(sources.sam, fitted)
    client, e_client = _client_side(sources.client, fitted)
    lead = _TRUST_POWER * (e_sam.logit() - e_client.logit())
    trust = torch.sigmoid(math.log(_SAM_PRIOR) + lead)
    t = trust[:, None, None, None]
    logs = t * sam.clamp(min=_CLIP).log() + (1 - t) * client.clamp(min=_CLIP).log()
    target = logs.softmax(dim=1)
    empty = trust * fitted.sam_empty + (1 - trust) * fitted.client_empty
    made = _weighted(target, empty)
    news = _OWN_WEIGHT + (1 - _OWN_WEIGHT) * trust
    return _unless_unused(made._replace(weight=made.weight * news[:, None, None]), fitted)


def _sam_soft(sources: Sources, config: AgreementConfig, fitted: Calibration) -> PseudoLabel:
    sam, _ = _sam_side(sources.sam, fitted)
    return _weighted(sam, fitted.sam_empty)


def sam_calibrated(distribution: Tensor, fitted: Calibration) -> Tensor:
    """Return SAM's calibrated distributions (B, K+1, H, W)."""
    factor = distribution.new_full(distribution.shape[:1], math.exp(fitted.sam_bias))
    return foreground_raised(tempered(distribution, fitted.sam_inverse_temperature), factor)


def _sam_side(distribution: Tensor, fitted: Calibration) -> tuple[Tensor, Tensor]:
    """Return SAM's distributions, calibrated and raised for Dice, and its E (B,)."""
    raised = raised_for_dice(sam_calibrated(distribution, fitted), fitted.sam_empty)
    dice = raised.dice + fitted.sam_offset
    return raised.distribution, dice.clamp(_LEAST_DICE, _MOST_DICE)


def _client_side(distribution: Tensor, fitted: Calibration) -> tuple[Tensor, Tensor]:
    """Return the model's calibrated distributions and its E (B,)."""
    client = tempered(distribution, fitted.client_inverse_temperature)
    dice = expected_dice(client, fitted.client_empty) + fitted.client_offset
    return client, dice.clamp(_LEAST_DICE, _MOST_DICE) * fitted.client_kept


def _weighted(target: Tensor, empty: float | Tensor) -> PseudoLabel:
    """Sharpen the target, and weigh an image's pixels by the square of what it promises then."""
    sharp = (_SHARPNESS * target.clamp(min=_CLIP).log()).softmax(dim=1)
    weight = expected_dice(sharp, empty).square()[:, None, None]
    return PseudoLabel(sharp, weight.expand(-1, *target.shape[2:]))


def _unless_unused(made: PseudoLabel, fitted: Calibration) -> PseudoLabel:
    """Take the weight of pixels that may be of classes which are not used."""
    target, weight = made
    if len(fitted.unused) == target.shape[1] - 1:
        return PseudoLabel(target, torch.zeros_like(weight))
    doubtful = target[:, fitted.unused].sum(dim=1) > _DOUBT
    return PseudoLabel(target, weight * ~doubtful)


def _confident(sources: Sources, config: AgreementConfig, fitted: Calibration) -> PseudoLabel:
    s, c = sources.sam.amax(dim=1), sources.client.amax(dim=1)
    target = torch.where(s >= c, sources.sam_label, sources.client_label)
    return PseudoLabel(target, (torch.maximum(s, c) >= config.threshold).float())


def _mean(sources: Sources, config: AgreementConfig, fitted: Calibration) -> PseudoLabel:
    target = (sources.sam + sources.client) / 2
    return PseudoLabel(target, torch.ones_like(target[:, 0]))


RULES: Mapping[Rule, AgreementRule] = {
    "adaptive": _adaptive,
    "consensus": lambda both, config, fitted: PseudoLabel(both.sam_label, both.same.float()),
    "confident": _confident,
    "soft": _mean,
    "sam_only": lambda both, config, fitted: PseudoLabel(
        both.sam_label, torch.ones_like(both.sam[:, 0])
    ),
    "sam_soft": _sam_soft,
    "client_only": lambda both, config, fitted: PseudoLabel(
        both.client_label, (both.client.amax(dim=1) >= config.threshold).float()
    ),
}
#: Those that read the calibration.
CALIBRATED_RULES: frozenset[Rule] = frozenset({"adaptive", "sam_soft"})
#: Those that ask of SAM its labels at most, and not how probable other classes are.
LABEL_RULES: frozenset[Rule] = frozenset({"consensus", "sam_only", "client_only"})
