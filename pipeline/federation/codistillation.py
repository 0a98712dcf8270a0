"""Federated distillation between networks of different shapes, over the public set D_p.

Only logits on D_p cross the border, and a seed. HSSF (Ma et al., IEEE TMI 2024,
doi:10.1109/TMI.2023.3348982): the server's model G learns from the best client of each image
(*Regularity Condensation*), then every client k from G (*Regularity Fusion*). FedMD (Li & Wang
2019, arXiv:1910.03581) is the simpler rival: every client learns the mean of all clients' logits,
by the mean absolute difference. For an image b and its labels y::

    RC   L_seg(z_G, y) + a mean_b 1[g*(b) > 0.75 and g*(b) > g_G(b)] KL(q*(b), q_G(b))
    RF   L_seg(z_k, y) + a mean_b 1[g_G(b) > g_k(b)] KL(q_G(b), q_k(b))

where q = softmax(z / 2), KL(p, q) is the mean over classes and pixels of p (log p - log q), g(b)
the share of b's pixels that are right, and * the client with the most. There is no T^2; a = 10.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import FederateConfig
from pipeline.federation.local_update import make_optimizer, optimiser_step, seeded
from pipeline.federation.streams import Streams
from pipeline.segmentation.losses import divergence
from pipeline.segmentation.networks import logits_of, normalise

CONDENSATION_MIN_GRADE = 0.75  # a best client no better than this teaches the server nothing
_TEMPERATURE = 2.0
_NEIGHBOURHOOD = 31  # pixels
_EDGE_WEIGHT = 5.0
_SMOOTH = 1.0  # weighted pixels; keeps IoU defined
_CHUNK = 32  # images at a time, for memory
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
def public_logits(model: nn.Module, inputs: Tensor, *, batch_size: int = _CHUNK) -> Tensor:
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
        logits = logits_of(model, _to_network(batch, device))
        _check_finite(logits, first=number * batch_size)
        parts.append(logits.clamp(-_FLOAT16_MAX, _FLOAT16_MAX).half().cpu().contiguous())
    return torch.cat(parts)


# --------------------------------------------------------------------------- on the server


class BestClient:
    """Each image's best client, from logits added one client at a time: RC's teacher.

    Memory does not grow with the number of clients. On equal grades the first client added stays,
    so add clients in a fixed order.
    """

    def __init__(self, labels: Tensor, *, num_classes: int) -> None:
        """Expect logits that ``labels`` (N, S, S), integers in 0..K = ``num_classes``, grade."""
        logits = torch.zeros(_logits_shape(labels, num_classes), dtype=torch.float16)
        nobody = torch.full((len(labels),), -1.0)
        self._best = Teacher(logits, labels, nobody, min_grade=CONDENSATION_MIN_GRADE)

    def add(self, logits: Tensor) -> None:
        """Take over the images on which ``logits`` beat every client before.

        Args:
            logits: (N, K+1, S, S) float16, finite.

        Raises:
            ValueError: another shape or dtype, or a NaN or infinity; nothing was changed.
        """
        best = self._best
        _check_logits(logits, best.logits.shape)
        found = grades(logits, best.labels)
        better = found > best.grades
        best.logits[better] = logits[better]
        best.grades[better] = found[better]

    def result(self) -> Teacher:
        """Return z* and g* of the clients so far; not a copy."""
        return self._best


class MeanLogits:
    """FedMD's consensus, the mean of the clients' logits; used in the same way as ``BestClient``.

    Of the labels only the shape matters. Float sums depend on the clients' order.
    """

    def __init__(self, labels: Tensor, *, num_classes: int) -> None:
        self._sum, self._count = torch.zeros(_logits_shape(labels, num_classes)), 0

    def add(self, logits: Tensor) -> None:
        """Count ``logits``; else as ``BestClient.add``."""
        _check_logits(logits, self._sum.shape)
        self._sum += logits
        self._count += 1

    def result(self) -> Tensor:
        """Return the mean, summed in float32, as float16: it crosses the border too."""
        return (self._sum / self._count).half()


def _logits_shape(labels: Tensor, num_classes: int) -> tuple[int, ...]:
    return len(labels), num_classes + 1, *labels.shape[1:]


def _check_logits(logits: Tensor, shape: tuple[int, ...]) -> None:
    if logits.shape != shape:
        raise ValueError(f"logits have shape {tuple(logits.shape)}, expected {tuple(shape)}")
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


# --------------------------------------------------------------------------- losses


@torch.no_grad()
def grades(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the share of pixels classified right, per image.

    Args:
        logits: (N, K+1, S, S) of any float dtype. labels: (N, S, S) integers in 0..K.

    Returns:
        (N,) float32 in [0, 1], on the logits' device; equal counts give equal grades.
    """
    right = [
        (some.argmax(dim=1) == truth).sum(dim=(1, 2))
        for some, truth in zip(logits.split(_CHUNK), labels.split(_CHUNK), strict=True)
    ]
    return torch.cat(right) / labels[0].numel()


def structure_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return HSSF's L_seg: cross-entropy plus weighted IoU, mean over images.

    ``CE + 1 - (sum(w p y) + 1) / (sum(w (p + y - p y)) + 1)``, ``w = 1 + 5 |avgpool31(y) - y|``

    with y the one-hot target, p = sigmoid(logits), and the sums over an image's channels and pixels
    together, as in HSSF's code. Outside the image y counts as 0 in every channel. F3Net and PraNet,
    where the loss comes from, weigh the cross-entropy by w too; HSSF does not.

    Args:
        logits: (B, K+1, H, W). target: (B, H, W) int64 in 0..K.
    """
    truth = F.one_hot(target, logits.shape[1]).movedim(-1, 1).to(logits.dtype)
    weight = 1 + _EDGE_WEIGHT * (_local_mean(truth) - truth).abs()
    probability = logits.sigmoid()
    axes = (1, 2, 3)
    overlap = (weight * probability * truth).sum(dim=axes)
    union = (weight * (probability + truth)).sum(dim=axes) - overlap
    iou = (overlap + _SMOOTH) / (union + _SMOOTH)
    return F.cross_entropy(logits, target) + (1 - iou).mean()


@dataclass(frozen=True)
class Teacher:
    """Logits on D_p, and what they are worth image by image: RC's and RF's teacher."""

    logits: Tensor  # (N, K+1, S, S) float16
    labels: Tensor  # (N, S, S) integers in 0..K
    grades: Tensor  # (N,) float32, ``grades`` of the logits
    min_grade: float = 0.0  # RF's; ``CONDENSATION_MIN_GRADE`` for RC
    kl_weight: float = 10.0  # a, as in HSSF

    def terms(self, logits: Tensor, rows: Tensor) -> dict[str, Tensor]:
        """Return the loss of a batch of D_p and its parts, scalars.

        An image counts where the teacher's grade is above ``min_grade`` and above the learner's,
        which is that of ``logits`` as they are: it stops counting once the learner is as good.

        Args:
            logits: the learner's, (B, K+1, H, W) float32. rows: (B,) int64, the images' rows.

        Returns:
            ``loss`` = ``loss_seg + kl_weight * loss_kl``; ``loss_kl`` is a mean over all images, of
            which those that do not count add 0; ``counted`` is the share of those that do.
        """
        labels = self.labels[rows].long().to(logits.device)
        taught, marks = self.logits[rows].to(logits.device), self.grades[rows].to(logits.device)
        counts = ((marks > self.min_grade) & (marks > grades(logits, labels))).to(logits.dtype)
        segmentation = structure_loss(logits, labels)
        summands = divergence(logits, taught.to(logits.dtype), _TEMPERATURE)
        kl = (counts * summands.mean(dim=(1, 2, 3))).mean()
        loss = segmentation + self.kl_weight * kl
        terms = {"loss_seg": segmentation, "loss_kl": kl, "counted": counts.mean()}
        return {"loss": loss, **terms}


@dataclass(frozen=True)
class Consensus:
    """The teacher of FedMD: the clients' mean logits (N, K+1, S, S) on D_p, without labels."""

    logits: Tensor

    def terms(self, logits: Tensor, rows: Tensor) -> dict[str, Tensor]:
        """Return the mean absolute difference, as in FedMD's authors' code, as ``loss``.

        Args:
            logits: the learner's, (B, K+1, H, W) float32. rows: (B,) int64, the images' rows.
        """
        taught = self.logits[rows].to(logits.device)
        return {"loss": F.l1_loss(logits, taught.to(logits.dtype))}


def _local_mean(values: Tensor) -> Tensor:
    """Return the mean over 31 x 31 pixels with zeros outside, rows first: ten times faster."""
    reach = _NEIGHBOURHOOD // 2
    rows = F.avg_pool2d(values, (_NEIGHBOURHOOD, 1), stride=1, padding=(reach, 0))
    return F.avg_pool2d(rows, (1, _NEIGHBOURHOOD), stride=1, padding=(0, reach))


# --------------------------------------------------------------------------- training


def distil(
    model: nn.Module,
    teacher: Teacher | Consensus,
    inputs: Tensor,
    *,
    learning_rate: float,
    streams: Streams,
    settings: FederateConfig,
) -> dict[str, float]:
    """Train ``model`` on what ``teacher`` says of D_p: by RC, RF, or FedMD's digest.

    It takes ``fusion_epochs`` passes over batches of ``labelled_batch`` images. The model changes
    in place and is left in training mode. The same streams give the same weights.

    Args:
        inputs: (N, 3, S, S) float32 with N > 1, from ``noised_public``.

    Returns:
        Means over images and epochs of the teacher's ``terms``.
    """
    device = next(model.parameters()).device
    optimizer = make_optimizer(model, learning_rate, settings.weight_decay)
    rng = streams.rng("fusion rows")
    sums: dict[str, float] = {}
    with seeded(streams.word("fusion dropout"), model):
        model.train()
        for _ in range(settings.fusion_epochs):
            for rows in _batches(len(inputs), settings.labelled_batch, rng):
                logits = logits_of(model, _to_network(inputs[rows], device))
                terms = teacher.terms(logits, rows)
                optimiser_step(model, optimizer, terms["loss"])
                for name, value in terms.items():
                    sums[name] = sums.get(name, 0.0) + float(value.detach()) * len(rows)
    return {name: value / (settings.fusion_epochs * len(inputs)) for name, value in sums.items()}


def _batches(count: int, size: int, rng: np.random.Generator) -> Iterator[Tensor]:
    """Yield the rows of shuffled batches.

    A last image left alone joins the batch before it, because batch norm cannot train on one
    image where a feature map has a single pixel.
    """
    *batches, last = torch.from_numpy(rng.permutation(count)).split(size)
    if len(last) == 1:
        last = torch.cat([batches.pop(), last])
    yield from (*batches, last)


def _to_network(inputs: Tensor, device: torch.device) -> Tensor:
    return inputs.to(device).contiguous(memory_format=torch.channels_last)
