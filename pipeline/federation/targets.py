"""The target of the unlabelled term, as a table of functions by ``MethodTraits.target``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import AgreementConfig, Config, Rule
from pipeline.federation.agreement import (
    Calibration,
    PseudoLabel,
    Sources,
    agree,
    count_agreement,
    spread,
)
from pipeline.federation.calibration import calibrate
from pipeline.federation.views import ClientData, PublicSet, Views
from pipeline.methods import METHODS, Target
from pipeline.segmentation.networks import normalise, predict_probabilities

_BATCH = 32  # images that are labelled at a time
_RULES_OF_SAM: Mapping[Target, Rule] = {"sam": "sam_only", "sam_soft": "sam_soft"}


@dataclass
class Learner:
    """A client's network in a round, and what agreement knows of it."""

    model: nn.Module
    config: Config
    calibration: Calibration
    counts: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def count(self, more: Mapping[str, float]) -> None:
        """Add what agreement or the audit counted of a batch."""
        for name, value in more.items():
            self.counts[name] += value

    def predict(self, images: Tensor) -> Tensor:
        """Return probabilities (B, K+1, S, S) on the weak view, in evaluation mode."""
        self.model.eval()
        with torch.inference_mode():
            probabilities: Tensor = self.model(normalise(images)).float().softmax(dim=1)
        return probabilities.clone()  # a normal tensor, which the loss may use


@dataclass(frozen=True)
class TargetRule:
    """How a method labels unlabelled images: once before the steps, and at each step.

    ``prepare`` is told the rows that the steps will draw.
    """

    label: Callable[[Learner, Views], PseudoLabel]
    prepare: Callable[[Learner, ClientData, Tensor], ClientData] = lambda learner, client, rows: (
        client
    )


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
    masks, confidences = _given(data.masks), _given(data.confidences)
    return spread(masks.long(), confidences.float() / 255, classes)


def measure_calibration(model: nn.Module, public: PublicSet, config: Config) -> Calibration:
    """Return both sources' calibration on D_p's calibration part, for the weights as they are.

    It is the identity for methods and rules that do not use it, and with ``agreement.calibrate``
    off.
    """
    rule = agreement_rule(config)
    uses = METHODS[config.federate.method].uses_sam and rule.rule in ("adaptive", "sam_soft")
    if not (uses and rule.calibrate):
        return Calibration()
    truth = _given(public.calibration.truth).long()
    sources = sources_of(model, public.calibration)
    return calibrate(sources, truth, groups=public.groups, config=rule)


def _label_by_agreement(learner: Learner, client: ClientData, rows: Tensor) -> ClientData:
    """Fix the targets for the round: SAM's labels against the received model's predictions."""
    rule = agreement_rule(learner.config)
    shape = (len(client.images), *client.images.shape[2:])
    classes = learner.config.data.num_classes
    target = torch.zeros((shape[0], classes, *shape[1:]), dtype=torch.uint8)
    weight = torch.zeros(shape, dtype=torch.uint8)
    for part in rows.split(_BATCH):
        sources = sources_of(learner.model, client.part(part))
        made = agree(sources, config=rule, calibration=learner.calibration)
        learner.count(count_agreement(sources, made))
        soft = made.target
        if soft.ndim == sources.same.ndim:  # classes
            soft = F.one_hot(soft, classes + 1).permute(0, 3, 1, 2)
        target[part] = (soft[:, 1:] * 255.0).round().to(torch.uint8)
        weight[part] = (made.weight * 255.0).round().to(torch.uint8)
    return replace(client, target=target, weight=weight)


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
        "client": TargetRule(_own_prediction),
        "received": TargetRule(_received, prepare=_label_with_received),
        "sam": TargetRule(_as_fixed, prepare=_label_by_agreement),
        "sam_soft": TargetRule(_as_fixed, prepare=_label_by_agreement),
        "agreement": TargetRule(_as_fixed, prepare=_label_by_agreement),
        "truth": TargetRule(_truth),
    }
)
