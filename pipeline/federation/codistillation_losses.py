"""Losses of federated distillation: HSSF's condensation and fusion, FedMD's digest.

HSSF is Ma et al., IEEE TMI 2024, doi:10.1109/TMI.2023.3348982; with the server's model G, a client
k, an image b and its labels y::

    RC   L_seg(z_G, y) + a mean_b 1[g*(b) > 0.75 and g*(b) > g_G(b)] KL(q*(b), q_G(b))
    RF   L_seg(z_k, y) + a mean_b 1[g_G(b) > g_k(b)] KL(q_G(b), q_k(b))

where q = softmax(z / 2), KL(p, q) is the mean over classes and pixels of p (log p - log q), g(b)
the share of b's pixels that are right, and * the client with the most. There is no T^2; a = 10.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

KL_WEIGHT = 10.0  # a, as in HSSF
CONDENSATION_MIN_GRADE = 0.75  # a best client no better than this teaches the server nothing
_TEMPERATURE = 2.0
_NEIGHBOURHOOD = 31  # pixels
_EDGE_WEIGHT = 5.0
_SMOOTH = 1.0  # weighted pixels; keeps IoU defined
_CHUNK = 32  # images at a time, for memory


@torch.no_grad()
def grades(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the share of pixels classified right, per image.

    Args:
        logits: (N, K+1, S, S) of any float dtype. labels: (N, S, S) integers in 0..K.

    Returns:
        (N,) float32 in [0, 1], on the logits' device; equal counts give equal grades.

    Raises:
        ValueError: the shapes do not fit.
    """
    found, expected = tuple(labels.shape), (len(logits), *logits.shape[2:])
    if found != expected:
        raise ValueError(f"labels have shape {found}, expected {expected}")
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
class GradedLogits:
    """The teacher of RC and RF: logits on D_p, and what they are worth image by image."""

    logits: Tensor  # (N, K+1, S, S) float16
    labels: Tensor  # (N, S, S) integers in 0..K
    grades: Tensor  # (N,) float32, ``grades`` of the logits
    min_grade: float = 0.0  # RF's; ``CONDENSATION_MIN_GRADE`` for RC
    kl_weight: float = KL_WEIGHT

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor, *, kl_weight: float = KL_WEIGHT) -> GradedLogits:
        """Grade ``logits`` for RF."""
        return cls(logits, labels, grades(logits, labels), kl_weight=kl_weight)

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
        divergence = (counts * _divergence(logits, taught)).mean()
        loss = segmentation + self.kl_weight * divergence
        terms = {"loss_seg": segmentation, "loss_kl": divergence, "counted": counts.mean()}
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
        _check_same_shape(logits, taught)
        return {"loss": F.l1_loss(logits, taught.to(logits.dtype))}


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return ``mean_{class,pixel} p (log p - log q)`` per image (B,), p the teacher's softmax."""
    _check_same_shape(student, teacher)
    student_log = F.log_softmax(student / _TEMPERATURE, dim=1)
    teacher_log = F.log_softmax(teacher.to(student.dtype) / _TEMPERATURE, dim=1)
    return (teacher_log.exp() * (teacher_log - student_log)).mean(dim=(1, 2, 3))


def _check_same_shape(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:  # one channel would broadcast in silence
        found, expected = tuple(teacher.shape[1:]), tuple(student.shape[1:])
        raise ValueError(f"logits have shape {found} per image, expected {expected}")


def _local_mean(values: Tensor) -> Tensor:
    """Return the mean over 31 x 31 pixels with zeros outside, rows first: ten times faster."""
    reach = _NEIGHBOURHOOD // 2
    rows = F.avg_pool2d(values, (_NEIGHBOURHOOD, 1), stride=1, padding=(reach, 0))
    return F.avg_pool2d(rows, (1, _NEIGHBOURHOOD), stride=1, padding=(0, reach))
