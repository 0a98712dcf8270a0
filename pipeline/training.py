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
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pipeline.agreement import (
    AgreementState,
    AgreementStatistics,
    Calibration,
    agree,
    calibrate,
    update_state,
)
from pipeline.augment import (
    LIGHT,
    STRONG,
    Geometry,
    change_appearance,
    random_affine,
    warp_images,
    warp_labels,
)
from pipeline.config import AGREEMENT_METHODS, SAM_METHODS, AgreementConfig, Config, FederateConfig
from pipeline.losses import agreement_loss, distillation_loss, supervised_loss
from pipeline.models import State, get_state, normalise, predict_probabilities

_MAX_GRADIENT_NORM = 5.0  # far above what training shows; stops a bad batch from wrecking a round
_LAST_RATE = 0.05  # of the learning rate, so that the last rounds still learn


@dataclass(frozen=True)
class ServerData:
    """D_p, which every client holds. Images (N, 3, S, S) uint8, labels (N, S, S) uint8.

    The calibration part carries the teacher's labels too where the method uses SAM.
    """

    images: Tensor
    labels: Tensor
    calibration_images: Tensor
    calibration_labels: Tensor
    calibration_groups: tuple[str, ...]
    calibration_masks: Tensor | None = None
    calibration_confidences: Tensor | None = None


@dataclass(frozen=True)
class ClientData:
    """A client's unlabelled images (N, 3, S, S) uint8 and what labels them, (N, S, S) uint8.

    ``masks`` and ``confidences`` come from the label cache (SAM methods); for ``oracle`` the masks
    are the truth. Both are None where the method uses neither.
    """

    name: str
    images: Tensor
    masks: Tensor | None = None
    confidences: Tensor | None = None


@dataclass
class LocalResult:
    """What a client sends back, and what it says of its round."""

    weights: State
    state: AgreementState
    images: int
    diagnostics: dict[str, float | None] = field(default_factory=dict)


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
) -> LocalResult:
    """Train ``weights`` for ``config.local_steps`` steps on the client's and the server's images.

    Args:
        model: a network of the right shape; its own weights are overwritten.
        weights: the broadcast model, which is also the distillation's teacher.
        unlabelled_weight: lambda_u of this round, after its ramp.
    """
    device = next(model.parameters()).device
    model.load_state_dict(weights)
    calibration = _measure(model, server, config, agreement)
    # f = G at the first step only, so the broadcast model needs a copy of its own
    broadcast = _copy(model) if _distils(config) else None
    optimizer = make_optimizer(model, learning_rate, config.weight_decay)
    labelled = torch.Generator().manual_seed(seed)  # the same draws whatever the method
    unlabelled = torch.Generator().manual_seed(seed + 1)
    statistics = AgreementStatistics()
    sums = dict.fromkeys(("loss", "loss_sup", "loss_agree", "loss_kd", "gradient_norm"), 0.0)
    with seeded(seed, model):
        for _ in range(config.local_steps):
            images, truth = labelled_batch(server, config.labelled_batch, labelled, device)
            views = None
            if config.method != "supervised":
                views = _draw_views(client, config.unlabelled_batch, unlabelled, device)
                views, state, counted = _set_target(
                    views, model, config, agreement, state, calibration
                )
                statistics.add(counted)
            terms = _losses(model, images, truth, views, broadcast, config, unlabelled_weight)
            optimizer.zero_grad()
            terms["loss"].backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), _MAX_GRADIENT_NORM)
            optimizer.step()
            for name, value in terms.items():
                sums[name] += float(value.detach())
            sums["gradient_norm"] += float(norm)
    diagnostics: dict[str, float | None] = {k: v / config.local_steps for k, v in sums.items()}
    if config.method in SAM_METHODS:
        diagnostics |= statistics.summary()
    return LocalResult(get_state(model), state, len(client.images), diagnostics)


def train_on_server(
    model: nn.Module,
    server: ServerData,
    *,
    config: FederateConfig,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> State:
    """Server start: ``config.start_steps`` steps of ``model`` on D_p's training part alone."""
    device = next(model.parameters()).device
    optimizer = make_optimizer(model, config.learning_rate, config.weight_decay)
    generator = torch.Generator().manual_seed(seed)
    with seeded(seed, model):
        model.train()
        for step in range(config.start_steps):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * cosine(step, config.start_steps)
            images, truth = labelled_batch(server, config.labelled_batch, generator, device)
            optimizer.zero_grad()
            loss = supervised_loss(model(normalise(images)), truth)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), _MAX_GRADIENT_NORM)
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


def labelled_batch(
    server: ServerData, size: int, generator: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor]:
    """An augmented labelled batch: images (B, 3, S, S) float 0..1, truth (B, S, S) int64."""
    chosen = _choose(len(server.images), size, generator)
    maps = random_affine(len(chosen), Geometry(), generator)
    images = warp_images(server.images[chosen].float() / 255, maps)
    images = change_appearance(images, STRONG, generator)
    truth = warp_labels(server.labels[chosen], maps).long()
    return images.to(device), truth.to(device)


@dataclass(frozen=True)
class _Views:
    """Two views of an unlabelled batch with one geometry, and its labels under it."""

    weak: Tensor  # (B, 3, S, S) float 0..1
    strong: Tensor
    masks: Tensor | None  # (B, S, S) int64
    confidences: Tensor | None  # (B, S, S) float32 probabilities
    target: Tensor | None = None  # (B, S, S) int64
    weight: Tensor | None = None  # (B, S, S) float32


def _draw_views(
    client: ClientData, size: int, generator: torch.Generator, device: torch.device
) -> _Views:
    chosen = _choose(len(client.images), size, generator)
    maps = random_affine(len(chosen), Geometry(), generator)
    base = warp_images(client.images[chosen].float() / 255, maps)
    weak = change_appearance(base, LIGHT, generator)
    strong = change_appearance(base, STRONG, generator)
    masks = confidences = None
    if client.masks is not None:
        masks = warp_labels(client.masks[chosen], maps).long().to(device)
    if client.confidences is not None:
        # agreement never takes a probability as certain, so 0 and 255 may stand
        confidences = (warp_labels(client.confidences[chosen], maps).float() / 255).to(device)
    return _Views(weak.to(device), strong.to(device), masks, confidences)


def _choose(count: int, size: int, generator: torch.Generator) -> Tensor:
    """``size`` rows of ``count``, without repetition where there are enough."""
    rounds = -(-size // count)
    orders = [torch.randperm(count, generator=generator) for _ in range(rounds)]
    return torch.cat(orders)[:size]


def _set_target(
    views: _Views,
    model: nn.Module,
    config: FederateConfig,
    agreement: AgreementConfig,
    state: AgreementState,
    calibration: Calibration,
) -> tuple[_Views, AgreementState, AgreementStatistics]:
    """The method's target and weight for an unlabelled batch."""
    counted = AgreementStatistics()
    if config.method == "oracle":
        assert views.masks is not None
        target, weight = views.masks, torch.ones_like(views.masks, dtype=torch.float32)
        return _with_target(views, target, weight), state, counted
    model.eval()
    with torch.inference_mode():
        opinion = model(normalise(views.weak)).float().softmax(dim=1)
    opinion = opinion.clone()  # a normal tensor, which the loss may use
    if config.method == "fedavg_ssl":
        confidence, target = opinion.max(dim=1)
        weight = (confidence >= config.confidence_threshold).float()
        return _with_target(views, target, weight), state, counted
    assert views.masks is not None
    assert views.confidences is not None
    agreement = rule_of(config, agreement)
    result = agree(
        views.masks,
        views.confidences,
        opinion,
        config=agreement,
        state=state,
        calibration=calibration,
    )
    state = update_state(state, opinion, agreement)
    return _with_target(views, result.target, result.weight), state, result.statistics


def _with_target(views: _Views, target: Tensor, weight: Tensor) -> _Views:
    return _Views(views.weak, views.strong, views.masks, views.confidences, target, weight)


def _losses(
    model: nn.Module,
    images: Tensor,
    truth: Tensor,
    views: _Views | None,
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
    if views is not None:
        assert views.target is not None
        assert views.weight is not None
        terms["loss_agree"] = agreement_loss(logits[count:], views.target, views.weight)
        total = total + unlabelled_weight * terms["loss_agree"]
        if broadcast is not None:
            with torch.no_grad():
                taught = broadcast(normalise(views.weak)).float()
            terms["loss_kd"] = distillation_loss(
                logits[count:], taught, temperature=config.kd_temperature
            )
            total = total + config.kd_weight * terms["loss_kd"]
    return {"loss": total, **terms}


def _distils(config: FederateConfig) -> bool:
    return config.method in AGREEMENT_METHODS and config.kd_weight > 0


def rule_of(config: FederateConfig, agreement: AgreementConfig) -> AgreementConfig:
    """The agreement that the method uses: ``sam_only`` is a rule of its own."""
    if config.method == "sam_only":
        return agreement.model_copy(update={"rule": "sam_only"})
    return agreement


def measure_calibration(model: nn.Module, server: ServerData, config: Config) -> Calibration:
    """Both sources on D_p's calibration part, with the model's weights as they are."""
    return _measure(model, server, config.federate, config.agreement)


def _measure(
    model: nn.Module, server: ServerData, config: FederateConfig, agreement: AgreementConfig
) -> Calibration:
    if config.method not in AGREEMENT_METHODS or agreement.rule != "adaptive":
        return Calibration()
    assert server.calibration_masks is not None
    assert server.calibration_confidences is not None
    return calibrate(
        server.calibration_masks.long(),
        server.calibration_confidences.float() / 255,
        predict_probabilities(model, server.calibration_images),
        server.calibration_labels.long(),
        groups=server.calibration_groups,
    )


def _copy(model: nn.Module) -> nn.Module:
    """A frozen copy in evaluation mode."""
    frozen = copy.deepcopy(model).eval()
    return frozen.requires_grad_(False)
