"""Calibration of both sources of a label on D_p's calibration part, which nobody trains on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import AgreementConfig
from pipeline.federation.agreement import Calibration, Sources, logit

_INVERSE_TEMPERATURES = torch.logspace(-1.5, 0.7, 89, base=10.0)  # candidates for a_s and a_c
_BINS = 128  # of logits


def calibrate(
    sources: Sources, truth: Tensor, *, groups: Sequence[str], config: AgreementConfig
) -> Calibration:
    """Fit the three scalars on labelled images that neither source was trained on.

    The fit is crossed: the inverse temperatures of one half of the images serve to fit b on the
    other, so that their own fit does not flatter b, and the two results are averaged. A group is in
    one half only. With fewer than four images, or one group, nothing is fitted.

    Args:
        sources: what both say of N images. truth: (N, H, W) int64.
        groups: the group of each image, such as its patient or video.
    """
    halves = split_in_halves(groups)
    if len(groups) < 4 or not all(len(half) for half in halves):
        return Calibration()
    parts = [(sources.select(half), truth[half]) for half in halves]
    fits = [
        astuple(_fit_crossed(*fit, *rest, prior=config.foreground_prior))
        for fit, rest in (parts, parts[::-1])
    ]
    return Calibration(*(sum(values) / len(fits) for values in zip(*fits, strict=True)))


def _fit_crossed(
    fit: Sources, fit_truth: Tensor, rest: Sources, truth: Tensor, *, prior: float
) -> Calibration:
    """Fit the inverse temperatures on ``fit``, and the b that they leave on ``rest``."""
    fitted = Calibration(
        fit_inverse_temperature(fit.sam_probability, fit.sam_label, fit_truth),
        fit_inverse_temperature(fit.client_probability, fit.client_label, fit_truth),
    )
    s, c = rest.calibrated(fitted)
    h = rest.client_reliability()
    evidence = s - c * h + rest.foreground_log_odds(prior)
    sam_right, client_right = rest.sam_label == truth, rest.client_label == truth
    b = fit_conflict_log_odds(evidence, h, sam_right=sam_right, client_right=client_right)
    return replace(fitted, conflict_log_odds=b)


def split_in_halves(groups: Sequence[str]) -> list[Tensor]:
    """Return the rows of two halves of about equal size, int64 and ascending.

    Each group goes to the lighter half as a whole, the largest group first.
    """
    sizes = {group: groups.count(group) for group in dict.fromkeys(groups)}
    halves: list[list[int]] = [[], []]
    for group in sorted(sizes, key=lambda g: (-sizes[g], g)):
        lighter = min(halves, key=len)
        lighter += [row for row, own in enumerate(groups) if own == group]
    return [torch.tensor(sorted(half), dtype=torch.int64) for half in halves]


def fit_inverse_temperature(probability: Tensor, label: Tensor, truth: Tensor) -> float:
    """Return the ``a`` for which ``sigmoid(a logit(p))`` best predicts that the label is right.

    It minimises the mean negative log-likelihood, with a standard normal prior on ln(a).
    Predicted classes weigh equally, because background would drown the rest.

    Args:
        probability: (N, H, W) float32. label, truth: (N, H, W) int64.
    """
    logits = logit(probability).flatten()
    right = (label == truth).flatten()
    levels = torch.linspace(float(logits.min()), float(logits.max()) + 1e-6, _BINS + 1)
    centres = (levels[1:] + levels[:-1]) / 2
    # one count for every class, whether it was right, and bin
    cells = (label.flatten() * 2 + right) * _BINS + torch.bucketize(logits, levels[1:-1])
    counts = torch.bincount(cells, minlength=2 * _BINS * (int(label.max()) + 1))
    counts = counts.reshape(-1, 2, _BINS)
    present = counts[counts.sum(dim=(1, 2)) > 0]
    scaled = _INVERSE_TEMPERATURES[:, None] * centres
    loss = torch.zeros(len(_INVERSE_TEMPERATURES))
    for count in present:
        misses, hits = count.float()
        nll = -(hits * F.logsigmoid(scaled)).sum(1) - (misses * F.logsigmoid(-scaled)).sum(1)
        loss += nll / count.sum() / len(present)
    prior = torch.log(_INVERSE_TEMPERATURES).square() / 2 / len(probability)
    return float(_INVERSE_TEMPERATURES[(loss + prior).argmin()])


def fit_conflict_log_odds(
    evidence: Tensor, reliability: Tensor, *, sam_right: Tensor, client_right: Tensor
) -> float:
    """Return the ``b`` for which ``sigmoid(evidence + max(b, 0) + h min(b, 0))`` predicts best.

    What is predicted is whether SAM is right where exactly one of the two is. ``agree`` uses b in
    the same way: log-odds that favour the client count by its reliability h. Each image with
    conflicts weighs one, whatever its number of pixels, and b has a standard normal prior.

    Args:
        evidence, reliability: (N, H, W) float32. sam_right, client_right: (N, H, W) bool.
    """
    decided = sam_right ^ client_right
    if not decided.any():
        return 0.0
    per_image = decided.flatten(1).sum(dim=1)
    weight = (decided / per_image.clamp(min=1)[:, None, None])[decided].double()
    value, slope = evidence[decided].double(), reliability[decided].double()
    won = sam_right[decided].double()

    def loss(b: Tensor, slope: Tensor) -> Tensor:
        logits = value + slope * b
        data = (weight * (F.softplus(logits) - won * logits)).sum()
        return data + b.square() / 2

    # the two signs of b are two convex problems that meet at 0
    full = torch.ones_like(slope)
    above = _minimise(value, full, weight, won).clamp(min=0)
    below = _minimise(value, slope, weight, won).clamp(max=0)
    return float(above if loss(above, full) <= loss(below, slope) else below)


def _minimise(value: Tensor, slope: Tensor, weight: Tensor, won: Tensor) -> Tensor:
    """Return the b that minimises the loss of ``value + slope b``, by Newton's method."""
    b = torch.zeros((), dtype=torch.float64)
    for _ in range(50):
        chance = torch.sigmoid(value + slope * b)
        gradient = (weight * slope * (chance - won)).sum() + b
        curvature = (weight * slope.square() * chance * (1 - chance)).sum() + 1
        step = (gradient / curvature).clamp(-1, 1)
        b = b - step
        if abs(float(step)) < 1e-9:
            break
    return b
