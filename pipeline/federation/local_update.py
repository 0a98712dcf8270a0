"""One client's local update: a pure function of weights, data, labels and a seed.

    L = L_sup(f(x_p), y_p) + lambda_u L_agree(f(strong(x)), target, w)
      + lambda_kd T^2 KL(G(x) || f(x))

Every method takes the same number of optimiser steps on the same labelled batches, the methods
with an unlabelled term on the same unlabelled batches and views; only the target differs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from pipeline.config import AgreementConfig, Config, FederateConfig
from pipeline.federation.agreement import (
    AgreementState,
    AgreementStatistics,
    Calibration,
    Sources,
    agree,
    update_state,
)
from pipeline.federation.calibration import calibrate
from pipeline.federation.views import ClientData, ServerData, Views, draw_views, labelled_batch
from pipeline.methods import METHODS
from pipeline.segmentation.losses import agreement_loss, distillation_loss, supervised_loss
from pipeline.segmentation.networks import State, get_state, normalise, predict_probabilities

MAX_GRADIENT_NORM = 5.0  # far above what training shows; stops a bad batch from wrecking a round
_LAST_RATE = 0.05  # of the learning rate, so that the last rounds still learn


@dataclass
class LocalResult:
    """What a client's round ends with; its weights are sent only where clients are averaged."""

    weights: State
    state: AgreementState
    images: int
    diagnostics: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class _Target:
    """What the unlabelled term trains towards."""

    label: Tensor  # (B, S, S) int64
    weight: Tensor  # (B, S, S) float32 in 0..1


@dataclass
class _Audit:
    """Dice of the kept pseudo-labels' foreground with the truth, pooled over a round's pixels."""

    overlap: int = 0
    total: int = 0

    def add(self, target: _Target, truth: Tensor) -> None:
        kept = target.weight > 0
        found, true = (target.label > 0) & kept, (truth > 0) & kept
        self.overlap += int((found & (target.label == truth)).sum())
        self.total += int(found.sum()) + int(true.sum())

    def dice(self) -> float | None:
        """None where no kept pixel is foreground in either."""
        return 2 * self.overlap / self.total if self.total else None


def local_update(
    model: nn.Module,
    weights: State,
    client: ClientData,
    server: ServerData,
    state: AgreementState,
    *,
    config: FederateConfig,
    agreement: AgreementConfig,
    learning_rate: float,
    unlabelled_weight: float,
    seed: int,
    distil: bool = True,
    broadcast: nn.Module | None = None,
) -> LocalResult:
    """Train ``weights`` for ``config.local_steps`` steps on the client's and the server's images.

    Args:
        model: a network of the right shape; its own weights are overwritten.
        weights: what the client starts from: the broadcast model, or its own.
        state: with the calibration of these weights (``measure_calibration``).
        unlabelled_weight: lambda_u of this round, after its ramp.
        distil: whether ``weights`` are a broadcast model, which the client distils from.
        broadcast: ``broadcast_model`` of these weights, where the caller has one; else a copy is
            made, which costs a sixth of a training step. One serves any number of clients.
    """
    device = next(model.parameters()).device
    model.load_state_dict(weights)
    # f = G at the first step only, so the broadcast model needs a copy of its own
    if not distil:
        broadcast = None
    elif broadcast is None:
        broadcast = broadcast_model(model, config)
    if config.method == "semifl":
        client = _label_itself(model, client)
    optimizer = make_optimizer(model, learning_rate, config.weight_decay)
    labelled = torch.Generator().manual_seed(seed)  # the same draws whatever the method
    unlabelled = torch.Generator().manual_seed(seed + 1)
    statistics, audit = AgreementStatistics(), _Audit()
    sums = dict.fromkeys(("loss", "loss_sup", "loss_agree", "loss_kd", "gradient_norm"), 0.0)
    with seeded(seed, model):
        for _ in range(config.local_steps):
            images, truth = labelled_batch(server, config.labelled_batch, labelled, device)
            views = target = None
            if config.method != "supervised":
                views = draw_views(client, config.unlabelled_batch, unlabelled, device)
                target, state, counted = _set_target(views, model, config, agreement, state)
                statistics.add(counted)
                if views.truth is not None:
                    audit.add(target, views.truth)
            terms = _losses(
                model, images, truth, views, target, broadcast, config, unlabelled_weight
            )
            optimizer.zero_grad()
            terms["loss"].backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
            optimizer.step()
            for name, value in terms.items():
                sums[name] += float(value.detach())
            sums["gradient_norm"] += float(norm)
    diagnostics: dict[str, float | None] = {k: v / config.local_steps for k, v in sums.items()}
    if METHODS[config.method].uses_sam:
        diagnostics |= statistics.summary()
    if METHODS[config.method].uses_agreement:
        diagnostics |= vars(state.calibration)
    if client.truth is not None and config.method != "supervised":
        diagnostics["pseudo_label_dice"] = audit.dice()
    diagnostics["drift"] = _relative_change(model, weights)
    return LocalResult(get_state(model), state, len(client.images), diagnostics)


def train_on_server(
    model: nn.Module,
    server: ServerData,
    *,
    config: FederateConfig,
    steps: int,
    rate: Callable[[int], float],
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> State:
    """``steps`` steps of ``model`` on D_p's training part alone, step i at ``rate(i)``."""
    device = next(model.parameters()).device
    optimizer = make_optimizer(model, config.learning_rate, config.weight_decay)
    generator = torch.Generator().manual_seed(seed)
    with seeded(seed, model):
        model.train()
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            images, truth = labelled_batch(server, config.labelled_batch, generator, device)
            optimizer.zero_grad()
            loss = supervised_loss(model(normalise(images)), truth)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
            optimizer.step()
            if progress is not None:
                progress(step + 1)
    return get_state(model)


@contextmanager
def seeded(seed: int, model: nn.Module) -> Iterator[None]:
    """Seed torch's global generator, which dropout draws from, and put its state back after."""
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def cosine(step: int, total: int) -> float:
    """Cosine decay from 1 at step 0 towards ``_LAST_RATE`` at ``total``."""
    decay = 0.5 * (1 + math.cos(math.pi * step / max(1, total)))
    return _LAST_RATE + (1 - _LAST_RATE) * decay


def make_optimizer(model: nn.Module, learning_rate: float, decay: float) -> torch.optim.AdamW:
    """AdamW; biases and normalisation layers do not decay."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate)


def _label_itself(model: nn.Module, client: ClientData) -> ClientData:
    """Pseudo-labels of the received model, fixed for the round (SemiFL, Diao et al., 2022)."""
    parts = [predict_probabilities(model, part).max(dim=1) for part in client.images.split(32)]
    confidences = torch.cat([part.values for part in parts])
    return replace(
        client,
        masks=torch.cat([part.indices for part in parts]).to(torch.uint8),
        confidences=(confidences * 255).round().to(torch.uint8),
    )


def _set_target(
    views: Views,
    model: nn.Module,
    config: FederateConfig,
    agreement: AgreementConfig,
    state: AgreementState,
) -> tuple[_Target, AgreementState, AgreementStatistics]:
    """The method's target for an unlabelled batch."""
    counted = AgreementStatistics()
    if config.method == "oracle":
        assert views.masks is not None
        return _Target(views.masks, torch.ones(views.masks.shape)), state, counted
    if config.method == "semifl":
        assert views.masks is not None
        assert views.confidences is not None
        weight = (views.confidences >= config.confidence_threshold).float()
        return _Target(views.masks, weight), state, counted
    model.eval()
    with torch.inference_mode():
        opinion = model(normalise(views.weak)).float().softmax(dim=1)
    opinion = opinion.clone()  # a normal tensor, which the loss may use
    if not METHODS[config.method].uses_sam:
        confidence, label = opinion.max(dim=1)
        weight = (confidence >= config.confidence_threshold).float()
        return _Target(label, weight), state, counted
    assert views.masks is not None
    assert views.confidences is not None
    rule = rule_of(config, agreement)
    sources = Sources(views.masks, views.confidences, opinion)
    result = agree(sources, config=rule, state=state)
    state = update_state(state, sources, config=rule)
    return _Target(result.target, result.weight), state, result.statistics


def _losses(
    model: nn.Module,
    images: Tensor,
    truth: Tensor,
    views: Views | None,
    target: _Target | None,
    broadcast: nn.Module | None,
    config: FederateConfig,
    unlabelled_weight: float,
) -> dict[str, Tensor]:
    """The loss and its terms; labelled and strong images pass together, so batch norm sees both."""
    model.train()
    batch = images if views is None else torch.cat([images, views.strong])
    logits = model(normalise(batch)).float()
    count = len(images)
    zero = logits.new_zeros(())
    terms = {
        "loss_sup": supervised_loss(logits[:count], truth),
        "loss_agree": zero,
        "loss_kd": zero,
    }
    total = terms["loss_sup"]
    if views is not None and target is not None:
        weight = target.weight.to(logits)
        terms["loss_agree"] = agreement_loss(logits[count:], target.label, weight)
        total = total + unlabelled_weight * terms["loss_agree"]
        if broadcast is not None:
            with torch.no_grad():
                taught = broadcast(normalise(views.weak)).float()
            terms["loss_kd"] = distillation_loss(
                logits[count:], taught, temperature=config.kd_temperature
            )
            total = total + config.kd_weight * terms["loss_kd"]
    return {"loss": total, **terms}


def broadcast_model(model: nn.Module, config: FederateConfig) -> nn.Module | None:
    """A frozen copy of ``model`` in evaluation mode, for clients to distil from, if they do."""
    if not METHODS[config.method].distils_broadcast or config.kd_weight == 0:
        return None
    return copy.deepcopy(model).eval().requires_grad_(False)


def rule_of(config: FederateConfig, agreement: AgreementConfig) -> AgreementConfig:
    """The agreement that the method uses: ``sam_only`` is a rule of its own."""
    if config.method == "sam_only":
        return agreement.model_copy(update={"rule": "sam_only"})
    return agreement


def measure_calibration(model: nn.Module, server: ServerData, config: Config) -> Calibration:
    """Both sources on D_p's calibration part, with the model's weights as they are.

    The identity for methods and rules that do not ask for it, and with ``agreement.calibrate`` off.
    """
    rule = config.agreement
    adapts = METHODS[config.federate.method].uses_agreement and rule.rule == "adaptive"
    if not (adapts and rule.calibrate):
        return Calibration()
    assert server.calibration_masks is not None
    assert server.calibration_confidences is not None
    sources = Sources(
        server.calibration_masks.long(),
        server.calibration_confidences.float() / 255,
        predict_probabilities(model, server.calibration_images),
    )
    truth = server.calibration_labels.long()
    return calibrate(sources, truth, groups=server.calibration_groups, config=rule)


def _relative_change(model: nn.Module, before: State) -> float:
    """``|w - w_0| / |w_0|`` over the trained parameters, Euclidean norms."""
    change = norm = 0.0
    for name, parameter in model.named_parameters():
        old = before[name].double()
        change += float((parameter.detach().cpu().double() - old).square().sum())
        norm += float(old.square().sum())
    return math.sqrt(change / norm) if norm else math.inf
