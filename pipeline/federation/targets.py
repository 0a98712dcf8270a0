"""The target of the unlabelled term, as a table of functions by ``MethodTraits.target``."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import AgreementConfig, Config, Rule
from pipeline.federation.agreement import (
    CALIBRATED_RULES,
    Calibration,
    PseudoLabel,
    Sources,
    agree,
    expected_lack,
    foreground_dice,
    from_levels,
    room_left,
    spread,
)
from pipeline.federation.calibration import calibrate
from pipeline.federation.streams import Streams
from pipeline.federation.views import ClientData, PublicSet, Views, strong_copies
from pipeline.methods import METHODS, Target
from pipeline.segmentation.networks import (
    logits_of,
    normalise,
    predict_probabilities,
)

_BATCH = 32  # images that are labelled at a time
_ASKED = 64  # images that tell how consistent a model is
# of a mean teacher's weights, what a step keeps; a round has some 10 to 30 steps
_TEACHER_KEEPS = 0.9
_RULES_OF_SAM: Mapping[Target, Rule] = {"sam": "sam_only", "sam_soft": "sam_soft"}


@dataclass
class Learner:
    """A client's network in a round, and what agreement knows of it."""

    model: nn.Module
    config: Config
    calibration: Calibration
    counts: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    teacher: nn.Module | None = None  # the running mean of the model's weights, where it teaches
    room: float = 1.0  # how much the unlabelled term counts in this round (``room_left``)

    def count(self, more: Mapping[str, float]) -> None:
        """Add what agreement or the audit counted of a batch."""
        for name, value in more.items():
            self.counts[name] += value

    def predict(self, images: Tensor) -> Tensor:
        """Return probabilities (B, K+1, S, S) on the weak view, in evaluation mode."""
        return _predict(self.model, images)


def _predict(model: nn.Module, images: Tensor) -> Tensor:
    """Return probabilities (B, K+1, S, S) of images (B, 3, S, S) float, in evaluation mode."""
    model.eval()
    with torch.inference_mode():
        probabilities = logits_of(model, normalise(images)).softmax(dim=1)
    return probabilities.clone()  # a normal tensor, which the loss may use


@dataclass(frozen=True)
class TargetRule:
    """How a method labels unlabelled images: once before the steps, and at each step.

    ``prepare`` is told the rows that the steps will draw; ``follow`` comes after each step.
    """

    label: Callable[[Learner, Views], PseudoLabel]
    prepare: Callable[[Learner, ClientData, Tensor], ClientData] = lambda learner, client, rows: (
        client
    )
    follow: Callable[[Learner], None] = lambda learner: None


def agreement_rule(config: Config) -> AgreementConfig:
    """Return the agreement that the method uses: SAM alone, hard or soft, is a rule of its own."""
    rule = _RULES_OF_SAM.get(METHODS[config.federate.method].target)
    return config.agreement if rule is None else config.agreement.model_copy(update={"rule": rule})


def sources_of(model: nn.Module, data: ClientData) -> Sources:
    """Return what SAM and ``model`` say of the images as they are."""
    client = predict_probabilities(model, data.images)
    return Sources(sam_distribution(data, client.shape[1]), client)


def sam_distribution(data: ClientData, classes: int) -> Tensor:
    """Return SAM's distributions (N, K+1, S, S) float32, from what the label store has."""
    label = _given(data.masks).long()
    if data.probabilities is not None:
        return from_levels(data.probabilities, label)
    return spread(label, _given(data.confidences).float() / 255, classes)


def measure_calibration(model: nn.Module, public: PublicSet, config: Config) -> Calibration:
    """Return both sources' calibration on D_p's calibration part, for the weights as they are.

    It is the identity for methods and rules that do not use it, and with ``agreement.calibrate``
    off.
    """
    rule = agreement_rule(config)
    uses = METHODS[config.federate.method].uses_sam and rule.rule in CALIBRATED_RULES
    if not (uses and rule.calibrate):
        return Calibration()
    truth = _given(public.calibration.truth).long()
    sources = sources_of(model, public.calibration)
    found = calibrate(sources, truth, groups=public.groups, config=rule)
    if rule.rule != "adaptive":
        return found
    own = measure_consistency(model, public.calibration.images, config)
    return replace(found, client_consistency=own, groups=len(set(public.groups)))


def calibration_at_site(
    model: nn.Module, images: Tensor, calibration: Calibration, config: Config
) -> Calibration:
    """Return what holds of ``calibration``, measured on D_p, for a site with such images.

    Args:
        images: (N, 3, S, S) uint8, of which up to 64 are asked about.
    """
    if calibration.client_consistency is None:
        return calibration
    return calibration.at_site(measure_consistency(model, images, config))


def measure_consistency(model: nn.Module, images: Tensor, config: Config) -> float:
    """Return the mean Dice, 0..1, of a model's labels of images with those of strong views.

    The views differ from the images in light, colour, blur and noise. The first image has the same
    random changes in every round and for every owner, and so on, so that values can be compared.

    Args:
        images: (N, 3, S, S) uint8, of which up to 64 are taken, evenly.
    """
    some = images[:: -(-len(images) // _ASKED)]
    rng = Streams(config.seed).rng("consistency views")
    # one by one, as the images of a batch share draws
    changed = torch.cat([strong_copies(image[None], rng, config.augment) for image in some])
    # in the precision of the rounds, as all that targets are made of
    label, other = (predict_probabilities(model, each).argmax(dim=1) for each in (some, changed))
    return float(foreground_dice(label, other).mean())


def count_agreement(sources: Sources, target: PseudoLabel) -> dict[str, float]:
    """Return what images add to the sums of a client's round; ``shares_of`` reads these."""
    kept = target.weight > 0
    label = target.label
    conflict = kept & ~sources.same
    return {
        "images": len(sources.dice),
        "pixels": kept.numel(),
        "agreement": float(sources.dice.sum()),
        "coverage": int(kept.sum()),
        "from_sam": int((conflict & (label == sources.sam_label)).sum()),
        "from_client": int((conflict & (label == sources.client_label)).sum()),
        "weight": float(target.weight.sum()),
    }


def shares_of(counts: Mapping[str, float]) -> dict[str, float]:
    """Return means in 0..1: ``agreement`` is the images' foreground Dice, the others of pixels.

    They are the pixels with a weight, those in conflicts that SAM or the client won, the weight.
    """
    names = ("coverage", "from_sam", "from_client", "weight")
    shares = {name: counts[name] / counts["pixels"] for name in names}
    return {"agreement": counts["agreement"] / counts["images"], **shares}


def _label_by_agreement(learner: Learner, client: ClientData, rows: Tensor) -> ClientData:
    """Fix the targets for the round: SAM's labels against the received model's predictions."""
    rule = agreement_rule(learner.config)
    learner.calibration = calibration_at_site(
        learner.model, client.images[rows], learner.calibration, learner.config
    )
    shape = (len(client.images), *client.images.shape[2:])
    classes = learner.config.data.num_classes
    target = torch.zeros((shape[0], classes, *shape[1:]), dtype=torch.uint8)
    weight = torch.zeros(shape, dtype=torch.uint8)
    lack = 0.0  # summed over images, of a promise that was checked at home
    checked = rule.rule == "adaptive" and bool(learner.calibration.model_dice)
    for part in rows.split(_BATCH):
        sources = sources_of(learner.model, client.part(part))
        made = agree(sources, config=rule, calibration=learner.calibration)
        learner.count(count_agreement(sources, made))
        if checked:
            lack += float(expected_lack(sources, learner.calibration).sum())
        soft = made.target
        if soft.ndim == sources.same.ndim:  # classes
            soft = F.one_hot(soft, classes + 1).permute(0, 3, 1, 2)
        target[part] = (soft[:, 1:] * 255.0).round().to(torch.uint8)
        weight[part] = (made.weight * 255.0).round().to(torch.uint8)
    if checked:
        learner.room = room_left(lack / len(rows))
    # SAM's labels have done their work, and need not follow the steps' views
    return replace(
        client, target=target, weight=weight, masks=None, confidences=None, probabilities=None
    )


def _as_fixed(learner: Learner, views: Views) -> PseudoLabel:
    return PseudoLabel(_given(views.target), _given(views.weight))


def _own_prediction(learner: Learner, views: Views) -> PseudoLabel:
    """Take the client's own label where it is sure (FixMatch)."""
    confidence, label = learner.predict(views.weak).max(dim=1)
    return PseudoLabel(label, _sure(confidence, learner))


def _label_with_received(learner: Learner, client: ClientData, rows: Tensor) -> ClientData:
    """Fix pseudo-labels of the received model for the round (SemiFL, Diao et al., 2022)."""
    shape = (len(client.images), *client.images.shape[2:])
    masks, confidences = (torch.zeros(shape, dtype=torch.uint8) for _ in range(2))
    for part in rows.split(_BATCH):
        found = predict_probabilities(learner.model, client.images[part]).max(dim=1)
        masks[part] = found.indices.to(torch.uint8)
        confidences[part] = (found.values * 255).round().to(torch.uint8)
    return replace(client, masks=masks, confidences=confidences)


def _received(learner: Learner, views: Views) -> PseudoLabel:
    return PseudoLabel(_given(views.masks), _sure(_given(views.confidences), learner))


def _unlabelled(learner: Learner, views: Views) -> PseudoLabel:
    """Leave the unlabelled images to batch norm."""
    shape = (len(views.strong), *views.strong.shape[2:])
    return PseudoLabel(torch.zeros(shape, dtype=torch.int64), torch.zeros(shape))


def _teacher_prediction(learner: Learner, views: Views) -> PseudoLabel:
    """Take what the running mean of the model's weights says (Tarvainen & Valpola, 2017)."""
    if learner.teacher is None:
        learner.teacher = copy.deepcopy(learner.model).requires_grad_(False)
    target = _predict(learner.teacher, views.weak)
    return PseudoLabel(target, torch.ones_like(target[:, 0]))


def _teacher_follows(learner: Learner) -> None:
    """Move the teacher's weights towards the model's; batch norm's statistics are the model's."""
    if learner.teacher is None:
        raise ValueError("the teacher follows a step that it did not teach")
    pairs = zip(learner.teacher.parameters(), learner.model.parameters(), strict=True)
    with torch.no_grad():
        for mean, new in pairs:
            mean.lerp_(new, 1 - _TEACHER_KEEPS)
        buffers = zip(learner.teacher.buffers(), learner.model.buffers(), strict=True)
        for old, now in buffers:
            old.copy_(now)


def _truth(learner: Learner, views: Views) -> PseudoLabel:
    return PseudoLabel(_given(views.masks), torch.ones(_given(views.masks).shape))


def _sure(confidence: Tensor, learner: Learner) -> Tensor:
    return (confidence >= learner.config.federate.confidence_threshold).float()


def _given(values: Tensor | None) -> Tensor:
    if values is None:
        raise ValueError("the method needs labels that the client's data lack")
    return values


#: By ``MethodTraits.target``; "none" has no unlabelled term.
TARGETS: Mapping[Target, TargetRule] = MappingProxyType(
    {
        "batch_norm": TargetRule(_unlabelled),
        "client": TargetRule(_own_prediction),
        "received": TargetRule(_received, prepare=_label_with_received),
        "mean_teacher": TargetRule(_teacher_prediction, follow=_teacher_follows),
        "sam": TargetRule(_as_fixed, prepare=_label_by_agreement),
        "sam_soft": TargetRule(_as_fixed, prepare=_label_by_agreement),
        "agreement": TargetRule(_as_fixed, prepare=_label_by_agreement),
        "truth": TargetRule(_truth),
    }
)
