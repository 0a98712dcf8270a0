"""One client's local update: a pure function of weights, data, labels and random streams.

    L = L_sup(f(x_p), y_p) + lambda_u room L_agree(f(strong(x)), target, w)
      + mu / 2 |w - w_0|^2

Every method takes the same number of optimiser steps on the same labelled batches, the methods
with an unlabelled term on the same unlabelled batches and views; only the target differs.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.federation.agreement import Calibration, PseudoLabel
from pipeline.federation.streams import Streams
from pipeline.federation.targets import TARGETS, Learner, shares_of
from pipeline.federation.views import (
    ClientData,
    PublicSet,
    Sampling,
    Views,
    draw_views,
    labelled_batch,
)
from pipeline.methods import METHODS
from pipeline.segmentation.losses import agreement_loss, supervised_loss
from pipeline.segmentation.networks import State, get_state, logits_of, normalise

MAX_GRADIENT_NORM = 5.0  # far above what training shows; stops a bad batch from wrecking a round
_LAST_RATE = 0.05  # of the learning rate, so that the last rounds still learn

Metrics = dict[str, float | None]


@dataclass(frozen=True)
class LocalTask:
    """What a client's update starts from, and how it goes on."""

    weights: State  # of the broadcast model, or the client's own
    calibration: Calibration  # of these weights (``measure_calibration``)
    learning_rate: float
    unlabelled_weight: float  # lambda_u of this round, after its ramp
    streams: Streams  # of the client in this round


@dataclass(frozen=True)
class LocalResult:
    """What a client's update ends with; its weights are sent only where clients are averaged."""

    weights: State
    metrics: Metrics


def audit(target: PseudoLabel, truth: Tensor) -> dict[str, float]:
    """Count the foreground of a batch's kept pixels in pseudo-label and truth (B, S, S) int64."""
    kept = target.weight > 0
    label = target.label
    found, true = (label > 0) & kept, (truth > 0) & kept
    overlap = int((found & (label == truth)).sum())
    return {"overlap": overlap, "foreground": int(found.sum()) + int(true.sum())}


def audited_dice(counts: Mapping[str, float]) -> float | None:
    """Return the Dice, pooled over a round, or None where no kept pixel is foreground in either."""
    total = counts.get("foreground")
    return 2 * counts["overlap"] / total if total else None


def local_update(
    model: nn.Module, public: PublicSet, client: ClientData, task: LocalTask, *, config: Config
) -> LocalResult:
    """Train ``model``, which holds the task's weights, on the client's and the public images."""
    settings, traits = config.federate, METHODS[config.federate.method]
    device = next(model.parameters()).device
    learner = Learner(model, config, task.calibration)
    rule = TARGETS.get(traits.target)
    steps = settings.local_steps if traits.trains else 0
    if rule is not None:
        # the same draws as those of the steps: who is not drawn in this round needs no target
        drawn = Sampling.unlabelled(task.streams, config, device)
        client = rule.prepare(learner, client, drawn.chosen(len(client.images), steps))
    optimizer = make_optimizer(model, task.learning_rate, settings.weight_decay)
    labelled = Sampling.labelled(task.streams, config, device)
    unlabelled = Sampling.unlabelled(task.streams, config, device)
    start = [each.detach().clone() for each in model.parameters()]
    sums: defaultdict[str, float] = defaultdict(float)
    with seeded(task.streams.word("dropout"), model):
        for _ in range(steps):
            images, truth = labelled_batch(public, labelled)
            pair = None
            if rule is not None:
                views = draw_views(client, unlabelled)
                pair = views, rule.label(learner, views)
                if views.truth is not None:
                    learner.count(audit(pair[1], views.truth))
            terms = losses(learner, task, (images, truth), pair)
            if settings.proximal_weight:
                terms["loss_prox"] = proximal_loss(model, start)
                terms["loss"] = terms["loss"] + settings.proximal_weight * terms["loss_prox"]
            terms["gradient_norm"] = optimiser_step(model, optimizer, terms["loss"])
            if rule is not None:
                rule.follow(learner)
            for name, value in terms.items():
                sums[name] += float(value.detach())
    metrics: Metrics = {name: value / steps for name, value in sums.items()}
    if traits.uses_sam:
        metrics |= shares_of(learner.counts)
    if traits.uses_agreement:
        metrics |= learner.calibration.numbers() | {"room": learner.room}
    if client.truth is not None:
        metrics["pseudo_label_dice"] = audited_dice(learner.counts)
    metrics["drift"] = _relative_change(model, task.weights)
    return LocalResult(get_state(model), metrics)


def losses(
    learner: Learner,
    task: LocalTask,
    labelled: tuple[Tensor, Tensor],
    unlabelled: tuple[Views, PseudoLabel] | None,
) -> dict[str, Tensor]:
    """Return the loss and its terms for a step's batches.

    Labelled and strong images pass through the network together, so that batch norm sees both.
    """
    learner.model.train()
    images, truth = labelled
    batch = images if unlabelled is None else torch.cat([images, unlabelled[0].strong])
    logits, count = logits_of(learner.model, normalise(batch)), len(images)
    terms = {"loss_sup": supervised_loss(logits[:count], truth)}
    terms["loss_agree"] = logits.new_zeros(())
    total = terms["loss_sup"]
    if unlabelled is not None:
        target, weight = (part.to(logits.device) for part in unlabelled[1])
        terms["loss_agree"] = agreement_loss(logits[count:], target, weight.to(logits.dtype))
        total = total + task.unlabelled_weight * learner.room * terms["loss_agree"]
    return {"loss": total, **terms}


def proximal_loss(model: nn.Module, start: Iterable[Tensor]) -> Tensor:
    """Return FedProx's ``|w - w_0|^2 / 2`` over the trained parameters (Li et al., 2020)."""
    pairs = zip(model.parameters(), start, strict=True)
    return 0.5 * torch.stack([(new - old).square().sum() for new, old in pairs]).sum()


def optimiser_step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
    """Take one step down ``loss``; return the gradient's norm before clipping."""
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
    optimizer.step()
    return norm


def train_on_server(
    model: nn.Module,
    public: PublicSet,
    rates: Iterable[float],
    *,
    streams: Streams,
    config: Config,
) -> State:
    """Train ``model`` on D_p's training part alone, a step at each learning rate of ``rates``.

    It goes on from its present weights. Return what it ends with.
    """
    device, settings = next(model.parameters()).device, config.federate
    optimizer = make_optimizer(model, settings.learning_rate, settings.weight_decay)
    sampling = Sampling.labelled(streams, config, device)
    with seeded(streams.word("dropout"), model):
        model.train()
        for rate in rates:
            for group in optimizer.param_groups:
                group["lr"] = rate
            images, truth = labelled_batch(public, sampling)
            loss = supervised_loss(logits_of(model, normalise(images)), truth)
            optimiser_step(model, optimizer, loss)
    return get_state(model)


@contextmanager
def seeded(seed: int, model: nn.Module) -> Iterator[None]:
    """Seed torch's global generator, which dropout draws from, and put its state back after."""
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def cosine(step: int, total: int) -> float:
    """Return a cosine decay from 1 at step 0 towards 0.05 at ``total``."""
    decay = 0.5 * (1 + math.cos(math.pi * step / max(1, total)))
    return _LAST_RATE + (1 - _LAST_RATE) * decay


def make_optimizer(model: nn.Module, learning_rate: float, decay: float) -> torch.optim.AdamW:
    """Return AdamW; biases and normalisation layers do not decay."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate)


def _relative_change(model: nn.Module, before: State) -> float:
    """Return ``|w - w_0| / |w_0|`` over the trained parameters, Euclidean norms."""
    change = norm = 0.0
    for name, parameter in model.named_parameters():
        old = before[name].double()
        change += float((parameter.detach().cpu().double() - old).square().sum())
        norm += float(old.square().sum())
    return math.sqrt(change / norm) if norm else math.inf
