"""Adaptive agreement: SAM's label against the client's own prediction, pixel by pixel.

Pure functions on tensors. Input is SAM's label ``y_s`` with its probability ``s``, and the
client's class probabilities on the weak view (label ``y_c``, probability ``c``). Output is a
target, a weight in [0, 1] and statistics. The rules and their reasons are in docs/method.md:

* both probabilities are calibrated on D_p's calibration part: ``s' = a_s logit(s)``,
  ``c' = a_c logit(c)``;
* consensus: the label, with ``w = sigmoid(s' + c' + ln K)``, two independent witnesses;
* conflict: ``p = sigmoid(s' - d c' + b +- g)`` is the chance that SAM is right, ``b`` being what
  the calibration part says of conflicts, ``g`` a prior for whoever says foreground, and ``d`` how
  far the client's side counts, which holds for a negative ``b`` too: fully where the client says
  foreground, by ``Dice(y_s, y_c)`` of the image where it says background. The likelier source wins
  if its chance reaches the class's threshold; else w = 0. At d = 0 (a client collapsed to
  background) SAM's calibrated word alone decides, against the lowest threshold, once the class
  has gone unpredicted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, replace

import torch
from torch import Tensor

from pipeline.config import AgreementConfig

_CLIP = 1 / 512  # probabilities are never taken as certain
_SCALES = torch.logspace(-1.5, 0.7, 89, base=10.0)  # candidates for a_s and a_c
_SCALE_PRIOR = 1.0  # standard deviation of ln(a) around 0
_TRUST_PRIOR = 1.0  # standard deviation of b around 0


@dataclass(frozen=True)
class Calibration:
    """What the calibration part says of the two sources; identity and no trust by default."""

    sam_inverse_temperature: float = 1.0  # a_s
    client_inverse_temperature: float = 1.0  # a_c
    conflict_log_odds: float = 0.0  # b, log-odds that SAM is right in a conflict, all else equal


@dataclass(frozen=True)
class AgreementState:
    """What a client knows of both sources; all that agreement carries from round to round."""

    class_confidence: Tensor  # (K+1,) float32 in 0..1, the client's running confidence by class
    calibration: Calibration = Calibration()

    @classmethod
    def initial(cls, num_classes: int) -> AgreementState:
        """Nothing learnt yet: every class starts at the min_threshold of its threshold."""
        return cls(torch.zeros(num_classes + 1))

    def as_tensor(self) -> Tensor:
        """(K+4,) float32: the class confidences and a_s, a_c, b, for a checkpoint."""
        return torch.cat([self.class_confidence, torch.tensor(astuple(self.calibration))])

    @classmethod
    def from_tensor(cls, values: Tensor) -> AgreementState:
        """The inverse of ``as_tensor``."""
        return cls(values[:-3].clone(), Calibration(*map(float, values[-3:])))


@dataclass
class AgreementStatistics:
    """Additive counts of a client's round."""

    images: int = 0
    pixels: int = 0
    dice: float = 0.0  # sum over images of the foreground Dice(y_s, y_c)
    from_sam: int = 0  # kept pixels of conflicts that SAM won
    from_client: int = 0
    consensus: int = 0  # kept pixels on which both agree
    weight: float = 0.0  # sum

    def add(self, other: AgreementStatistics) -> None:
        """Count ``other`` too."""
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def summary(self) -> dict[str, float]:
        """Means: agreement (Dice), kept, from_sam, from_client (shares of pixels), weight."""
        kept = self.consensus + self.from_sam + self.from_client
        return {
            "agreement": self.dice / self.images,
            "coverage": kept / self.pixels,
            "from_sam": self.from_sam / self.pixels,
            "from_client": self.from_client / self.pixels,
            "weight": self.weight / self.pixels,
        }


@dataclass(frozen=True)
class Agreement:
    """target (B, H, W) int64, weight (B, H, W) float32 in [0, 1], and what was counted."""

    target: Tensor
    weight: Tensor
    statistics: AgreementStatistics = field(repr=False)


def foreground_dice(first: Tensor, second: Tensor) -> Tensor:
    """Dice (B,) of the foregrounds of two label maps (B, H, W); 1 where both are empty.

    A foreground pixel counts as shared only where the classes are equal.
    """
    a, b = first > 0, second > 0
    shared = (a & b & (first == second)).sum(dim=(1, 2)).float()
    total = (a.sum(dim=(1, 2)) + b.sum(dim=(1, 2))).float()
    return torch.where(total > 0, 2 * shared / total.clamp(min=1), torch.ones_like(total))


def thresholds(state: AgreementState, config: AgreementConfig) -> Tensor:
    """Class-wise thresholds (K+1,), lowest for a class unlearnt, highest for one well learnt."""
    return (
        config.min_threshold
        + (config.max_threshold - config.min_threshold) * state.class_confidence
    )


def update_state(
    state: AgreementState, client_probability: Tensor, config: AgreementConfig
) -> AgreementState:
    """Move the running confidence of each class that the client predicts in this batch.

    The confidence of a class is the mean of ``((K+1) c - 1) / K`` over its pixels: 0 at chance, and
    0 where it is not predicted at all, so a class that a client unlearns loses its threshold too.
    """
    c, label = client_probability.max(dim=1)
    classes = client_probability.shape[1]
    certainty = ((classes * c - 1) / (classes - 1)).flatten()
    counts = torch.bincount(label.flatten(), minlength=classes).float()
    sums = torch.zeros(classes).scatter_add_(0, label.flatten().cpu(), certainty.float().cpu())
    old = state.class_confidence
    mean = sums / counts.cpu().clamp(min=1)
    return replace(state, class_confidence=config.momentum * old + (1 - config.momentum) * mean)


def agree(
    sam_label: Tensor,
    sam_probability: Tensor,
    client_probability: Tensor,
    *,
    config: AgreementConfig,
    state: AgreementState,
) -> Agreement:
    """Target and weight of every pixel under ``config.rule``.

    Args:
        sam_label: (B, H, W) int64 in 0..K.
        sam_probability: (B, H, W) float32, SAM's probability of that label.
        client_probability: (B, K+1, H, W) float32, sums to one.

    Raises:
        ValueError: the shapes do not belong together.
    """
    pixels = (client_probability.shape[0], *client_probability.shape[2:])
    if not sam_label.shape == sam_probability.shape == pixels:
        raise ValueError(
            f"SAM's labels {tuple(sam_label.shape)}, its probabilities "
            f"{tuple(sam_probability.shape)} and the client's {tuple(client_probability.shape)} "
            "do not belong together"
        )
    c, client_label = client_probability.max(dim=1)
    same = sam_label == client_label
    dice = foreground_dice(sam_label, client_label)
    one = torch.ones_like(c)
    if config.rule == "adaptive":
        sam_wins, weight = _adaptive(
            sam_label, sam_probability, client_label, c, dice, same, config, state
        )
        target = torch.where(sam_wins, sam_label, client_label)
    elif config.rule == "consensus":
        target, weight = sam_label, same.float()
    elif config.rule == "confident":
        target = torch.where(sam_probability >= c, sam_label, client_label)
        weight = (torch.maximum(sam_probability, c) >= config.threshold).float()
    elif config.rule == "soft":
        weight, target = _mixture(sam_label, sam_probability, client_probability).max(dim=1)
    elif config.rule == "sam_only":
        target, weight = sam_label, one
    else:
        target, weight = client_label, (c >= config.threshold).float()
    return Agreement(target, weight, _count(target, weight, sam_label, same, dice))


def _adaptive(
    sam_label: Tensor,
    sam_probability: Tensor,
    client_label: Tensor,
    c: Tensor,
    dice: Tensor,
    same: Tensor,
    config: AgreementConfig,
    state: AgreementState,
) -> tuple[Tensor, Tensor]:
    """Whether SAM's label is the target, and the weight, for every pixel."""
    calibration = state.calibration
    s_logit = calibration.sam_inverse_temperature * _logit(sam_probability)
    c_logit = calibration.client_inverse_temperature * _logit(c)
    trust = _trust(client_label, dice)
    bias = max(calibration.conflict_log_odds, 0.0) + trust * min(calibration.conflict_log_odds, 0.0)
    prior = _foreground(sam_label, client_label, config)
    chance = torch.sigmoid(s_logit - trust * c_logit + bias + prior)
    sam_wins = same | (chance >= 0.5)
    winner = torch.where(sam_wins, sam_label, client_label)
    posterior = torch.maximum(chance, 1 - chance)
    accepted = posterior >= thresholds(state, config).to(c)[winner]
    conflict = posterior * accepted * torch.where(sam_wins, torch.ones_like(trust), trust)
    # Bayes with a uniform prior: two wrong witnesses must also hit the same one of K classes
    classes = math.log(len(state.class_confidence) - 1)
    return sam_wins, torch.where(same, torch.sigmoid(s_logit + c_logit + classes), conflict)


def _trust(client_label: Tensor, dice: Tensor) -> Tensor:
    """How far a client's word counts, 0..1: its foreground fully, its background by the Dice.

    A network that fails says background. So what speaks for the client there, its confidence and
    its record, counts as far as its image agrees with SAM at all; its foreground needs no proof.
    """
    return torch.where(client_label == 0, dice[:, None, None], torch.ones_like(dice)[:, None, None])


def _foreground(sam_label: Tensor, client_label: Tensor, config: AgreementConfig) -> Tensor:
    """Log-odds for the source that says foreground where the other says background."""
    return config.foreground_prior * ((sam_label > 0).float() - (client_label > 0).float())


def _mixture(sam_label: Tensor, sam_probability: Tensor, client_probability: Tensor) -> Tensor:
    """The mean of both distributions; SAM's other classes share what its label leaves."""
    classes = client_probability.shape[1]
    rest = ((1 - sam_probability) / (classes - 1))[:, None].expand_as(client_probability)
    sam = rest.scatter(1, sam_label[:, None], sam_probability[:, None])
    return (sam + client_probability) / 2


def _count(
    target: Tensor, weight: Tensor, sam_label: Tensor, same: Tensor, dice: Tensor
) -> AgreementStatistics:
    kept = weight > 0
    conflict = kept & ~same
    from_sam = conflict & (target == sam_label)
    return AgreementStatistics(
        images=len(dice),
        pixels=target.numel(),
        dice=float(dice.sum()),
        from_sam=int(from_sam.sum()),
        from_client=int((conflict & ~from_sam).sum()),
        consensus=int((kept & same).sum()),
        weight=float(weight.sum()),
    )


def _logit(probability: Tensor) -> Tensor:
    return torch.logit(probability.clamp(_CLIP, 1 - _CLIP))


# --------------------------------------------------------------------------- calibration


def calibrate(
    sam_label: Tensor,
    sam_probability: Tensor,
    client_probability: Tensor,
    truth: Tensor,
    *,
    groups: Sequence[str],
    config: AgreementConfig,
) -> Calibration:
    """Fit the three scalars on labelled images that neither source was trained on.

    Two-fold cross-fitted: the scales of one half are used for the trust of the other, and the two
    results are averaged, so that the scales' own fit does not flatter the trust. A group is in one
    half. With fewer than four images, or one group, nothing is fitted.

    Args:
        sam_label: (N, H, W) int64. sam_probability: (N, H, W) float32.
        client_probability: (N, K+1, H, W) float32. truth: (N, H, W) int64.
        groups: the group of each image, e.g. its patient or video.
    """
    halves = split_in_halves(groups)
    if len(groups) < 4 or not all(len(half) for half in halves):
        return Calibration()
    c, client_label = client_probability.max(dim=1)
    trusted = _trust(client_label, foreground_dice(sam_label, client_label))
    prior = _foreground(sam_label, client_label, config)
    fits = []
    for fit, rest in (halves, halves[::-1]):
        sam_inverse_temperature = fit_inverse_temperature(
            sam_probability[fit], sam_label[fit], truth[fit]
        )
        client_inverse_temperature = fit_inverse_temperature(c[fit], client_label[fit], truth[fit])
        evidence = (
            sam_inverse_temperature * _logit(sam_probability[rest])
            - client_inverse_temperature * _logit(c[rest]) * trusted[rest]
            + prior[rest]
        )
        trust = fit_conflict_log_odds(
            evidence,
            sam_label[rest],
            client_label[rest],
            truth[rest],
            trusted=trusted[rest],
        )
        fits.append((sam_inverse_temperature, client_inverse_temperature, trust))
    means = [sum(values) / len(fits) for values in zip(*fits, strict=True)]
    return Calibration(*means)


def split_in_halves(groups: Sequence[str]) -> list[Tensor]:
    """Rows of two halves of about equal size; each group goes to the lighter one, largest first."""
    sizes = {group: groups.count(group) for group in dict.fromkeys(groups)}
    halves: list[list[int]] = [[], []]
    for group in sorted(sizes, key=lambda g: (-sizes[g], g)):
        lighter = min(halves, key=len)
        lighter += [row for row, own in enumerate(groups) if own == group]
    return [torch.tensor(sorted(half), dtype=torch.int64) for half in halves]


def fit_inverse_temperature(probability: Tensor, label: Tensor, truth: Tensor) -> float:
    """The ``a`` for which ``sigmoid(a logit(p))`` best predicts that the label is right.

    Minimises the mean negative log-likelihood, predicted classes weighing equally (background
    would drown the rest), with a Gaussian prior on ln(a) worth one unit.
    """
    logits = _logit(probability).flatten()
    right = (label == truth).flatten()
    levels = torch.linspace(float(logits.min()), float(logits.max()) + 1e-6, 129)
    centres = (levels[1:] + levels[:-1]) / 2
    bins = torch.bucketize(logits, levels[1:-1])
    # one count for every class, whether it was right, and bin
    cells = (label.flatten() * 2 + right) * 128 + bins
    counts = torch.bincount(cells, minlength=256 * (int(label.max()) + 1)).reshape(-1, 2, 128)
    present = counts[counts.sum(dim=(1, 2)) > 0]
    scaled = _SCALES[:, None] * centres
    loss = torch.zeros(len(_SCALES))
    for count in present:
        misses, hits = count.float()
        nll = -(hits * torch.nn.functional.logsigmoid(scaled)).sum(1) - (
            misses * torch.nn.functional.logsigmoid(-scaled)
        ).sum(1)
        loss += nll / count.sum() / len(present)
    images = probability.shape[0]
    prior = (torch.log(_SCALES) / _SCALE_PRIOR).square() / 2 / images
    return float(_SCALES[(loss + prior).argmin()])


def fit_conflict_log_odds(
    evidence: Tensor, sam_label: Tensor, client_label: Tensor, truth: Tensor, *, trusted: Tensor
) -> float:
    """The ``b`` for which ``sigmoid(evidence + max(b, 0) + h min(b, 0))`` best predicts conflicts.

    That is how ``agree`` uses it: a record that favours the client counts by ``trusted``, h. Each
    image with conflicts weighs one, whatever its number of pixels, and b has a Gaussian prior
    around 0; pixels on which both are wrong say nothing.

    Args:
        evidence, trusted: (N, H, W) float32. sam_label, client_label, truth: (N, H, W) int64.
    """
    decided = (sam_label != client_label) & ((sam_label == truth) | (client_label == truth))
    per_image = decided.flatten(1).sum(dim=1)
    if not decided.any():
        return 0.0
    weight = (decided / per_image.clamp(min=1)[:, None, None])[decided].double()
    value, slope = evidence[decided].double(), trusted[decided].double()
    won = (sam_label == truth)[decided].double()
    # the two signs of b are two convex problems that meet at 0
    above = _minimise(value, torch.ones_like(slope), weight, won).clamp(min=0)
    below = _minimise(value, slope, weight, won).clamp(max=0)
    losses = [
        _conflict_loss(value + factor * b, weight, won) + b.square() / 2 / _TRUST_PRIOR**2
        for b, factor in ((above, 1.0), (below, slope))
    ]
    return float(above if losses[0] <= losses[1] else below)


def _conflict_loss(logit: Tensor, weight: Tensor, won: Tensor) -> Tensor:
    return (weight * (torch.nn.functional.softplus(logit) - won * logit)).sum()


def _minimise(value: Tensor, slope: Tensor, weight: Tensor, won: Tensor) -> Tensor:
    """The b that minimises the loss of ``value + slope b`` with the prior, by Newton's method."""
    b = torch.zeros((), dtype=torch.float64)
    for _ in range(50):
        chance = torch.sigmoid(value + slope * b)
        gradient = (weight * slope * (chance - won)).sum() + b / _TRUST_PRIOR**2
        curvature = (weight * slope.square() * chance * (1 - chance)).sum() + 1 / _TRUST_PRIOR**2
        step = (gradient / curvature).clamp(-1, 1)
        b = b - step
        if abs(float(step)) < 1e-9:
            break
    return b
