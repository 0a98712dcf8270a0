"""Federated distillation between networks of different shapes, over the public set D_p.

Only logits on D_p cross the border, and a seed. HSSF (Ma et al., IEEE TMI 2024): the server's model
learns from the best client of each image (*Regularity Condensation*), then every client from the
server's model (*Regularity Fusion*). FedMD (Li & Wang 2019, arXiv:1910.03581) is the simpler
rival: every client learns the mean of all clients' logits. Their losses: ``distillation_losses``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.federation.codistillation_losses import (
    KL_WEIGHT,
    DistillationTerms,
    condensation_loss,
    digest_loss,
    fusion_loss,
    grades,
)
from pipeline.federation.local_update import MAX_GRADIENT_NORM, seeded
from pipeline.segmentation.networks import normalise

_NOISE = 0.1  # standard deviation, in the networks' range -1..1
_NOISE_LIMIT = 2.0  # standard deviations
_FLOAT16_MAX = torch.finfo(torch.float16).max


# --------------------------------------------------------------------------- what crosses


def noised_public(images: Tensor, *, seed: int) -> Tensor:
    """D_p as every model sees it in one round, from nothing but ``seed``.

    ``x + clip(0.1 n, -0.2, 0.2)``, n standard normal, x in the networks' range -1..1. The noise is
    clipped, the sum is not: values reach -1.2..1.2.

    The draws are NumPy's: inside the clip its ziggurat takes them from tables, where torch's pass
    through a logarithm and a cosine that round otherwise on another processor. So every client gets
    the same bytes.

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
    """What a model sends: its logits in evaluation mode, clamped to float16's finite range.

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


def payload_bytes(logits: Tensor) -> int:
    """Bytes of ``logits`` on the wire, framing aside."""
    return logits.numel() * logits.element_size()


# --------------------------------------------------------------------------- on the server


@dataclass(frozen=True)
class GradedLogits:
    """A teacher on D_p: logits (N, K+1, S, S) float16 and the grade (N,) float32 of each image."""

    logits: Tensor
    grades: Tensor

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> GradedLogits:
        """Grade ``logits`` by ``labels`` (N, S, S)."""
        return cls(logits, grades(logits, labels))


class BestClient:
    """Each image's best client, from logits added one client at a time.

    Memory does not grow with the number of clients. On equal grades the first client added stays,
    so add clients in a fixed order.
    """

    def __init__(self, labels: Tensor, *, num_classes: int) -> None:
        """``labels``: (N, S, S) integers in 0..K, K = ``num_classes``."""
        self._labels = labels
        self._shape = (len(labels), num_classes + 1, *labels.shape[1:])
        self._best: GradedLogits | None = None

    def add(self, logits: Tensor) -> Tensor:
        """Take over the images on which ``logits`` beat every client before; their grades (N,).

        Args:
            logits: (N, K+1, S, S) float16, finite.

        Raises:
            ValueError: another shape or dtype, or a NaN or infinity; nothing was changed.
        """
        _check_logits(logits, self._shape)
        mine = grades(logits, self._labels)
        if self._best is None:
            self._best = GradedLogits(logits.clone(), mine.clone())
        else:
            better = mine > self._best.grades
            self._best.logits[better] = logits[better]
            self._best.grades[better] = mine[better]
        return mine

    def result(self) -> GradedLogits:
        """z* and g* of the clients so far; not a copy.

        Raises:
            ValueError: nothing was added.
        """
        if self._best is None:
            raise ValueError("no best client: no client sent usable logits")
        return self._best


class MeanLogits:
    """FedMD's consensus: the mean of the clients' logits, one client at a time.

    Add clients in a fixed order: float sums depend on it.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        """``shape``: (N, K+1, S, S) of every client's logits."""
        self._shape = tuple(shape)
        self._sum = torch.zeros(self._shape, dtype=torch.float32)
        self._count = 0

    def add(self, logits: Tensor) -> None:
        """Count ``logits``, (N, K+1, S, S) float16, finite.

        Raises:
            ValueError: another shape or dtype, or a NaN or infinity; nothing was changed.
        """
        _check_logits(logits, self._shape)
        self._sum += logits
        self._count += 1

    def result(self) -> Tensor:
        """The mean, summed in float32, as float16: it crosses the border too.

        Raises:
            ValueError: nothing was added.
        """
        if not self._count:
            raise ValueError("no consensus: no client sent usable logits")
        return (self._sum / self._count).half()


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

_BatchLoss = Callable[[Tensor, Tensor], dict[str, Tensor]]  # of a batch's logits and rows of D_p


def condense(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    best: GradedLogits,
    *,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    batch_size: int,
    kl_weight: float = KL_WEIGHT,
    generator: torch.Generator,
) -> dict[str, float]:
    """Regularity Condensation: train the server's model on all of D_p, ``epochs`` times.

    ``model`` changes in place and is left in training mode. ``generator`` (on the CPU) shuffles the
    batches and seeds dropout: the same state of it gives the same weights.

    Args:
        inputs: (N, 3, S, S) float32, from ``noised_public``. labels: (N, S, S) integers in 0..K.
        best: ``BestClient.result()``.
        batch_size: at least 2; a last image left alone joins the batch before it.

    Returns:
        Means over images and epochs of ``DistillationTerms``, by name.

    Raises:
        ValueError: ``best`` does not fit the model's logits or is not finite, fewer than two
            images, ``batch_size`` < 2, or ``epochs`` < 1.
    """
    return _train(
        model,
        inputs,
        _with_teacher(condensation_loss, labels, best, kl_weight),
        teacher=best.logits,
        optimizer=optimizer,
        epochs=epochs,
        batch_size=batch_size,
        generator=generator,
    )


def fuse(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    server: GradedLogits,
    *,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    batch_size: int,
    kl_weight: float = KL_WEIGHT,
    generator: torch.Generator,
) -> dict[str, float]:
    """Regularity Fusion: train a client's model on all of D_p; else as ``condense``.

    Args:
        server: the server's logits after RC, which stay as they are, and their grades:
            ``GradedLogits.of(logits, labels)``.
    """
    return _train(
        model,
        inputs,
        _with_teacher(fusion_loss, labels, server, kl_weight),
        teacher=server.logits,
        optimizer=optimizer,
        epochs=epochs,
        batch_size=batch_size,
        generator=generator,
    )


def digest(
    model: nn.Module,
    inputs: Tensor,
    consensus: Tensor,
    *,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    batch_size: int,
    generator: torch.Generator,
) -> dict[str, float]:
    """FedMD's digest: train a client's model towards the consensus, without labels.

    Args:
        consensus: (N, K+1, S, S), from ``MeanLogits``. The others as in ``condense``.

    Returns:
        The mean ``loss``.
    """

    def terms(logits: Tensor, rows: Tensor) -> dict[str, Tensor]:
        return {"loss": digest_loss(logits, consensus[rows].to(logits.device))}

    return _train(
        model,
        inputs,
        terms,
        teacher=consensus,
        optimizer=optimizer,
        epochs=epochs,
        batch_size=batch_size,
        generator=generator,
    )


def _with_teacher(
    loss: Callable[..., DistillationTerms], labels: Tensor, teacher: GradedLogits, kl_weight: float
) -> _BatchLoss:
    def terms(logits: Tensor, rows: Tensor) -> dict[str, Tensor]:
        some = (labels[rows].long(), teacher.logits[rows], teacher.grades[rows])
        return loss(logits, *(t.to(logits.device) for t in some), kl_weight=kl_weight)._asdict()

    return terms


def _train(
    model: nn.Module,
    inputs: Tensor,
    batch_loss: _BatchLoss,
    *,
    teacher: Tensor,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    batch_size: int,
    generator: torch.Generator,
) -> dict[str, float]:
    """Train on all of D_p in shuffled batches; the mean of each of ``batch_loss``'s values."""
    if epochs < 1:
        raise ValueError(f"epochs is {epochs}, expected at least 1")
    if len(teacher) != len(inputs):
        raise ValueError(f"logits are of {len(teacher)} public images, expected {len(inputs)}")
    _check_finite(teacher)
    device = next(model.parameters()).device
    sums: dict[str, float] = {}
    seed = int(torch.randint(2**31, (), generator=generator))
    with seeded(seed, model):
        model.train()
        for _ in range(epochs):
            for rows in _batches(len(inputs), batch_size, generator):
                logits = model(_to_network(inputs[rows], device)).float()
                terms = batch_loss(logits, rows)
                optimizer.zero_grad()
                terms["loss"].backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
                optimizer.step()
                for name, value in terms.items():
                    sums[name] = sums.get(name, 0.0) + float(value.detach()) * len(rows)
    return {name: value / (epochs * len(inputs)) for name, value in sums.items()}


def _batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Shuffled rows in batches of ``size``, the last one of at least two.

    Batch norm cannot train on one image where a feature map has a single pixel.
    """
    if count < 2 or size < 2:
        raise ValueError(f"batches of {size} from {count} public images, expected at least 2 each")
    batches = list(torch.randperm(count, generator=generator).split(size))
    if len(batches[-1]) == 1:
        batches[-2:] = [torch.cat(batches[-2:])]
    yield from batches


def _to_network(inputs: Tensor, device: torch.device) -> Tensor:
    return inputs.to(device).contiguous(memory_format=torch.channels_last)
