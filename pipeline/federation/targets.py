"""The target of the unlabelled term, as a table of functions by ``MethodTraits.target``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import Tensor, nn

from pipeline.config import AgreementConfig, Config
from pipeline.federation.agreement import (
    AgreementState,
    Calibration,
    PseudoLabel,
    Sources,
    agree,
    count_agreement,
    update_state,
)
from pipeline.federation.calibration import calibrate
from pipeline.federation.views import ClientData, PublicSet, Views
from pipeline.methods import METHODS, Target
from pipeline.segmentation.networks import normalise, predict_probabilities


@dataclass
class Learner:
    """A client's network in a round, and what agreement learns of it from step to step."""

    model: nn.Module
    config: Config
    state: AgreementState
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
    """How a method labels unlabelled images: once before the steps, and at each step."""

    label: Callable[[Learner, Views], PseudoLabel]
    prepare: Callable[[Learner, ClientData], ClientData] = lambda learner, client: client


def agreement_rule(config: Config) -> AgreementConfig:
    """Return the agreement that the method uses: SAM alone is a rule of its own."""
    if METHODS[config.federate.method].target == "sam":
        return config.agreement.model_copy(update={"rule": "sam_only"})
    return config.agreement


def sources_of(model: nn.Module, data: ClientData) -> Sources:
    """Return what SAM and ``model`` say of the images as they are."""
    masks, confidences = _given(data.masks), _given(data.confidences)
    probabilities = predict_probabilities(model, data.images)
    return Sources(masks.long(), confidences.float() / 255, probabilities)


def measure_calibration(model: nn.Module, public: PublicSet, config: Config) -> Calibration:
    """Return both sources' calibration on D_p's calibration part, for the weights as they are.

    It is the identity for methods and rules that do not use it, and with ``agreement.calibrate``
    off.
    """
    rule = config.agreement
    adapts = METHODS[config.federate.method].uses_agreement and rule.rule == "adaptive"
    if not (adapts and rule.calibrate):
        return Calibration()
    truth = _given(public.calibration.truth).long()
    sources = sources_of(model, public.calibration)
    return calibrate(sources, truth, groups=public.groups, config=rule)


def _agree(learner: Learner, views: Views) -> PseudoLabel:
    """Weigh SAM's label against the client's prediction, and learn from the batch."""
    rule = agreement_rule(learner.config)
    sources = Sources(_given(views.masks), _given(views.confidences), learner.predict(views.weak))
    target = agree(sources, config=rule, state=learner.state)
    learner.state = update_state(learner.state, sources, config=rule)
    learner.count(count_agreement(sources, target))
    return target


def _own_prediction(learner: Learner, views: Views) -> PseudoLabel:
    """Take the client's own label where it is sure (FixMatch)."""
    confidence, label = learner.predict(views.weak).max(dim=1)
    return PseudoLabel(label, _sure(confidence, learner))


def _label_with_received(learner: Learner, client: ClientData) -> ClientData:
    """Fix pseudo-labels of the received model for the round (SemiFL, Diao et al., 2022)."""
    parts = [predict_probabilities(learner.model, p).max(dim=1) for p in client.images.split(32)]
    confidences = torch.cat([part.values for part in parts])
    return replace(
        client,
        masks=torch.cat([part.indices for part in parts]).to(torch.uint8),
        confidences=(confidences * 255).round().to(torch.uint8),
    )


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
        "sam": TargetRule(_agree),
        "agreement": TargetRule(_agree),
        "truth": TargetRule(_truth),
    }
)
