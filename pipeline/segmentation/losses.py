"""Segmentation losses: cross-entropy and soft Dice, plain and pixel-weighted."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = 255  # target value of a pixel that no loss counts
_SMOOTH = 1.0  # pixels; keeps Dice defined where a class is in neither


def dice_loss(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return 1 - soft Dice, over the batch's pixels together, mean of the foreground classes.

    ``1 - (sum(w (p + t - |p - t|)) + 1) / (sum(w (p + t)) + 1)``, which is least at p = t for soft
    targets too, unlike ``2 p t`` in the numerator (Wang et al., MICCAI 2023); for a target of
    classes both are the same.

    Args:
        logits: (B, K+1, H, W).
        target: (B, H, W) int64 in 0..K or ``IGNORE``, or (B, K+1, H, W) float distributions.
        weight: (B, H, W) float in [0, 1]; ones if None.
    """
    probability = logits.softmax(dim=1)[:, 1:]
    if target.ndim == logits.ndim:
        truth, valid = target[:, 1:].to(logits.dtype), torch.ones_like(logits[:, 0])
    else:
        valid = (target != IGNORE).to(logits.dtype)
        classes = torch.arange(1, logits.shape[1], device=logits.device)
        truth = (target[:, None] == classes[None, :, None, None]).to(logits.dtype)
    weight = (valid if weight is None else weight * valid)[:, None]
    axes = (0, 2, 3)
    total = probability + truth
    overlap = (weight * (total - (probability - truth).abs())).sum(dim=axes)
    return (1 - (overlap + _SMOOTH) / ((weight * total).sum(dim=axes) + _SMOOTH)).mean()


def supervised_loss(logits: Tensor, target: Tensor, *, dice_weight: float = 0.5) -> Tensor:
    """Return ``2 ((1 - a) CE + a Dice)`` with a = ``dice_weight``: CE + Dice at one half.

    Args:
        logits: (B, K+1, H, W). target: (B, H, W) int64 in 0..K or ``IGNORE``.
    """
    cross_entropy = F.cross_entropy(logits, target, ignore_index=IGNORE)
    return 2 * ((1 - dice_weight) * cross_entropy + dice_weight * dice_loss(logits, target))


def agreement_loss(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Return ``sum(w CE) / number of pixels`` plus the w-weighted Dice loss.

    Rejected pixels lower it, as in FixMatch.

    Args:
        logits: (B, K+1, H, W). weight: (B, H, W) float in [0, 1].
        target: (B, H, W) int64, or (B, K+1, H, W) float distributions.
    """
    cross_entropy = F.cross_entropy(logits, target, reduction="none")
    return (weight * cross_entropy).mean() + dice_loss(logits, target, weight)


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return KL's summands ``p (log p - log q)``, p and q the softmax at ``temperature``.

    Args:
        student, teacher: logits (B, K+1, H, W) behind q and p.
    """
    student_log = F.log_softmax(student / temperature, dim=1)
    teacher_log = F.log_softmax(teacher / temperature, dim=1)
    return teacher_log.exp() * (teacher_log - student_log)
