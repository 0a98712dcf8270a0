"""Federated distillation between networks of different shapes, over the public set D_p.

Only logits on D_p cross the border, and a seed. HSSF (Ma et al., IEEE TMI 2024): the server's model
learns from the best client of each image (*Regularity Condensation*), then every client from the
server's model (*Regularity Fusion*). FedMD (Li & Wang 2019, arXiv:1910.03581) is the simpler
rival: every client learns the mean of all clients' logits. Their losses: ``codistillation_losses``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.federation.codistillation_losses import (
    CONDENSATION_MIN_GRADE,
    Consensus,
    GradedLogits,
)
from pipeline.federation.local_update import MAX_GRADIENT_NORM, seeded
from pipeline.segmentation.networks import normalise

_NOISE = 0.1  # standard deviation, in the networks' range -1..1
_NOISE_LIMIT = 2.0  # standard deviations
_FLOAT16_MAX = torch.finfo(torch.float16).max


def noised_public(images: Tensor, *, seed: int) -> Tensor:
    """Return D_p as every model sees it in one round, from nothing but ``seed``.

    ``x + clip(0.1 n, -0.2, 0.2)``, n standard normal, x in the networks' range -1..1. The noise is
    clipped, the sum is not: values reach -1.2..1.2. The draws are NumPy's, so that every client
    gets the same bytes: inside the clip its ziggurat takes them from tables, where torch's pass
    through a logarithm and a cosine that round otherwise on another processor.

    Args:
        images: (N, 3, S, S) uint8.

    Returns:
        (N, 3, S, S) float32 on the CPU.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    noised = normalise(images.cpu().float() / 255).contiguous()
    for image in noised:  # one at a time: the draws are float64
        draw = generator.standard_normal(tuple(image.shape)).clip(-_NOISE_LIMIT, _NOISE_LIMIT)
        image += torch.from_numpy(draw * _NOISE).float()
    return noised


@torch.no_grad()
def public_logits(model: nn.Module, inputs: Tensor, *, batch_size: int = 32) -> Tensor:
    """Return what a model sends: evaluation-mode logits, clamped to float16's finite range.

    Args:
        inputs: (N, 3, S, S) float32, from ``noised_public``.

    Returns:
        (N, K+1, S, S) float16 on the CPU, contiguous.

    Raises:
        ValueError: a logit is NaN or infinite before the clamp; the message names the image.
    """
    device = next(model.parameters()).device
    model.eval()
    parts: list[Tensor] = []
    for number, batch in enumerate(inputs.split(batch_size)):
        logits = model(_to_network(batch, device)).float()
        _check_finite(logits, first=number * batch_size)
        parts.append(logits.clamp(-_FLOAT16_MAX, _FLOAT16_MAX).half().cpu().contiguous())
    return torch.cat(parts)


# --------------------------------------------------------------------------- on the server


class BestClient:
    """Each image's best client, from logits added one client at a time.

    Memory does not grow with the number of clients. On equal grades the first client added stays,
    so add clients in a fixed order.
    """

    def __init__(self, labels: Tensor, *, num_classes: int) -> None:
        """Expect logits that ``labels`` (N, S, S), integers in 0..K = ``num_classes``, grade."""
        self._labels = labels
        self._shape = _logits_shape(labels, num_classes)
        self._best: GradedLogits | None = None

    def add(self, logits: Tensor) -> None:
        """Take over the images on which ``logits`` beat every client before.

        Args:
            logits: (N, K+1, S, S) float16, finite.

        Raises:
            ValueError: another shape or dtype, or a NaN or infinity; nothing was changed.
        """
        _check_logits(logits, self._shape)
        new = GradedLogits.of(logits, self._labels)
        if self._best is None:
            self._best = replace(new, logits=logits.clone(), min_grade=CONDENSATION_MIN_GRADE)
        better = new.grades > self._best.grades
        self._best.logits[better] = logits[better]
        self._best.grades[better] = new.grades[better]

    def result(self) -> GradedLogits:
        """Return RC's teacher, z* and g* of the clients so far; not a copy.

        Raises:
            ValueError: nothing was added.
        """
        if self._best is None:
            raise ValueError("no best client: no client sent usable logits")
        return self._best


class MeanLogits:
    """FedMD's consensus, the mean of the clients' logits; used in the same way as ``BestClient``.

    Of the labels only the shape matters. Float sums depend on the clients' order.
    """

    def __init__(self, labels: Tensor, *, num_classes: int) -> None:
        self._sum = torch.zeros(_logits_shape(labels, num_classes))
        self._count = 0

    def add(self, logits: Tensor) -> None:
        """Count ``logits``; else as ``BestClient.add``."""
        _check_logits(logits, tuple(self._sum.shape))
        self._sum += logits
        self._count += 1

    def result(self) -> Tensor:
        """Return the mean, summed in float32, as float16: it crosses the border too.

        Raises:
            ValueError: nothing was added.
        """
        if not self._count:
            raise ValueError("no consensus: no client sent usable logits")
        return (self._sum / self._count).half()


def _logits_shape(labels: Tensor, num_classes: int) -> tuple[int, ...]:
    return len(labels), num_classes + 1, *labels.shape[1:]


def _check_logits(logits: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(logits.shape) != shape:
        raise ValueError(f"logits have shape {tuple(logits.shape)}, expected {shape}")
    if logits.dtype != torch.float16:
        raise ValueError(f"logits are {logits.dtype}, expected torch.float16")
    _check_finite(logits)


def _check_finite(logits: Tensor, *, first: int = 0) -> None:
    """Raise ValueError unless all is finite; ``first`` is the index of the batch's first image."""
    broken = ~torch.isfinite(logits).flatten(start_dim=1).all(dim=1)
    if bool(broken.any()):
        index = int(broken.nonzero()[0])
        kind = "NaN" if bool(torch.isnan(logits[index]).any()) else "infinity"
        raise ValueError(f"logits of public image {first + index} hold {kind}")


# --------------------------------------------------------------------------- training


@dataclass(frozen=True)
class PublicTraining:
    """How a model is trained on all of D_p."""

    inputs: Tensor  # (N, 3, S, S) float32, from ``noised_public``
    optimizer: torch.optim.Optimizer
    generator: torch.Generator  # on the CPU; shuffles the batches and seeds dropout
    epochs: int  # at least 1
    batch_size: int  # at least 2; a last image left alone joins the batch before it

    def batches(self) -> Iterator[Tensor]:
        """Yield the rows of shuffled batches, of every epoch.

        A last image left alone joins the batch before it, because batch norm cannot train on one
        image where a feature map has a single pixel.
        """
        count, size = len(self.inputs), self.batch_size
        if self.epochs < 1:
            raise ValueError(f"epochs is {self.epochs}, expected at least 1")
        if count < 2 or size < 2:
            raise ValueError(
                f"batches of {size} from {count} public images, expected at least 2 each"
            )
        for _ in range(self.epochs):
            *batches, last = torch.randperm(count, generator=self.generator).split(size)
            if len(last) == 1:
                last = torch.cat([batches.pop(), last])
            yield from (*batches, last)


def distil(
    model: nn.Module, teacher: GradedLogits | Consensus, *, training: PublicTraining
) -> dict[str, float]:
    """Train ``model`` on what ``teacher`` says of D_p: by RC, RF, or FedMD's digest.

    The model changes in place and is left in training mode. The same state of the generator gives
    the same weights.

    Returns:
        Means over images and epochs of the teacher's ``terms``.

    Raises:
        ValueError: the teacher does not fit the model's logits or is not finite, there are fewer
            than two images, or ``epochs`` or ``batch_size`` is too small.
    """
    count, optimizer = len(training.inputs), training.optimizer
    if len(teacher.logits) != count:
        raise ValueError(f"logits are of {len(teacher.logits)} public images, expected {count}")
    _check_finite(teacher.logits)
    device = next(model.parameters()).device
    sums: dict[str, float] = {}
    seed = int(torch.randint(2**31, (), generator=training.generator))
    with seeded(seed, model):
        model.train()
        for rows in training.batches():
            logits = model(_to_network(training.inputs[rows], device)).float()
            terms = teacher.terms(logits, rows)
            optimizer.zero_grad()
            terms["loss"].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
            optimizer.step()
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach()) * len(rows)
    return {name: value / (training.epochs * count) for name, value in sums.items()}


def _to_network(inputs: Tensor, device: torch.device) -> Tensor:
    return inputs.to(device).contiguous(memory_format=torch.channels_last)
