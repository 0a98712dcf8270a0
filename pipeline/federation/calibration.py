"""Calibration of both sources of a label on D_p's calibration part, which nobody trains on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import AgreementConfig
from pipeline.federation.agreement import (
    PRIOR_GROUPS,
    Calibration,
    Sources,
    agree,
    expected_dice,
    foreground_dice,
    likeliest,
    logit,
    raised_for_dice,
    sam_calibrated,
    tempered,
    tempered_logit,
)

#: Images of the calibration part below which nothing is fitted on it.
FEWEST_TO_CALIBRATE = 4

_INVERSE_TEMPERATURES = torch.logspace(-1.5, 0.7, 89, base=10.0)  # candidates for a_s and a_c
_BIASES = torch.linspace(-3, 3, 121)  # candidates for b
_BINS = 128  # of logits
_PROMISES = ("sam_offset", "client_offset", "sam_empty", "client_empty")
_PRIOR_EMPTY = 1.0  # as many empty labels, half of them right


def calibrate(
    sources: Sources, truth: Tensor, *, groups: Sequence[str], config: AgreementConfig
) -> Calibration:
    """Fit what agreement knows of both sources, on images that neither was trained on.

    Temperatures and SAM's bias are fitted on all of them. What the sources then promise is compared
    with what they keep on each half of the images with the other half's temperatures and bias, so
    that their own fit does not flatter it, and so are the targets with the model alone. With fewer
    than four images nothing is fitted. Where there is one group alone the halves are of its images.

    Args:
        sources: what both say of N images. truth: (N, H, W) int64.
        groups: the group of each image, such as its patient or video.
    """
    if len(groups) < FEWEST_TO_CALIBRATE:
        return Calibration()
    halves = split_in_halves(groups)
    parts = [(sources.select(half), truth[half], [groups[i] for i in half]) for half in halves]
    fits = [_with_promises(_fit(*fit[:2]), rest) for fit, rest in (parts, parts[::-1])]
    promises = [{name: getattr(fit, name) for name in _PROMISES} for fit in fits]
    means = {name: sum(each[name] for each in promises) / len(promises) for name in _PROMISES}
    # what was seen of a half is used on the other one
    crossed = [replace(fit, **other) for fit, other in zip(fits, promises[::-1], strict=True)]
    return _with_guard(replace(_fit(sources, truth), **means), crossed, parts, config)


_Part = tuple[Sources, Tensor, list[str]]  # some images: both sources, their truth and their groups


def _fit(sources: Sources, truth: Tensor) -> Calibration:
    """Fit the inverse temperatures and SAM's bias."""
    a_s, a_c = (
        fit_inverse_temperature(*distribution.max(dim=1), truth)
        for distribution in (sources.sam, sources.client)
    )
    return Calibration(a_s, a_c, fit_bias(tempered(sources.sam, a_s), truth))


def _with_promises(fitted: Calibration, part: _Part) -> Calibration:
    """Add what the true Dice of ``part`` says of the expected one under ``fitted``."""
    sources, truth, groups = part
    client = tempered(sources.client, fitted.client_inverse_temperature)
    sam = sam_calibrated(sources.sam, fitted)
    label = raised_for_dice(sam, fitted.sam_empty).label
    sam_offset, sam_empty = _fit_promise(sam, label, truth, groups)
    client_offset, client_empty = _fit_promise(client, likeliest(client), truth, groups)
    return replace(
        fitted,
        sam_offset=sam_offset,
        client_offset=client_offset,
        sam_empty=sam_empty,
        client_empty=client_empty,
    )


def _fit_promise(
    distribution: Tensor, label: Tensor, truth: Tensor, groups: list[str]
) -> tuple[float, float]:
    """Return what true Dice has over the expected one, and how often an empty label is right."""
    dice = foreground_dice(label, truth)
    empty = ~(label > 0).flatten(1).any(dim=1)
    right = (float(dice[empty].sum()) + _PRIOR_EMPTY / 2) / (int(empty.sum()) + _PRIOR_EMPTY)
    found = [group for group, none in zip(groups, empty.tolist(), strict=True) if not none]
    gap = (dice - expected_dice(distribution, 0.0, label))[~empty]
    return shrunk_mean(gap, found), right


def _with_guard(
    fitted: Calibration, fits: list[Calibration], parts: list[_Part], config: AgreementConfig
) -> Calibration:
    """Add the Dice of targets and of the model alone by class, each half with the other's fit."""
    # the first fit is of the first half, for the second
    pairs = [(fit, part) for fit, part in zip(fits, parts[::-1], strict=True)]
    sources = [part[0] for _, part in pairs]
    truth = torch.cat([part[1] for _, part in pairs])
    groups = [group for _, part in pairs for group in part[2]]
    ours = torch.cat([agree(p[0], config=config, calibration=fit).label for fit, p in pairs])
    alone = torch.cat([both.client_label for both in sources])
    found = []
    for number in range(1, sources[0].sam.shape[1]):
        target, model = _class_dice(ours, truth, number), _class_dice(alone, truth, number)
        rows = (~(target.isnan() & model.isnan())).nonzero().flatten()  # somebody has the class
        # who leaves out a class that is not there is right
        target, model = target[rows].nan_to_num(1.0), model[rows].nan_to_num(1.0)
        gain = shrunk_mean(target - model, [groups[row] for row in rows])
        found.append((float(target.mean()), float(model.mean()), gain))
    dice, model_dice, gains = zip(*found, strict=True)
    return replace(fitted, target_dice=dice, model_dice=model_dice, target_gain=gains)


def _class_dice(label: Tensor, truth: Tensor, number: int) -> Tensor:
    """Return the Dice (N,) of a class; NaN for an image that has it in neither."""
    a, b = label == number, truth == number
    total = (a.sum(dim=(1, 2)) + b.sum(dim=(1, 2))).float()
    return 2 * (a & b).sum(dim=(1, 2)) / total  # 0 / 0 is NaN


def shrunk_mean(values: Tensor, groups: Sequence[str]) -> float:
    """Return the mean over groups, each of them counting one, and two more that say 0."""
    sums: dict[str, list[float]] = {}
    for group, value in zip(groups, values.tolist(), strict=True):
        sums.setdefault(group, []).append(value)
    means = [sum(own) / len(own) for own in sums.values()]
    return sum(means) / (len(means) + PRIOR_GROUPS)


def split_in_halves(groups: Sequence[str]) -> list[Tensor]:
    """Return the rows of two halves of about equal size, int64 and ascending.

    Each group goes to the lighter half as a whole, the largest group first. Where there is but one
    group its rows go to the halves in turn: a handful of numbers is fitted on a half, and fitting
    on one patient is better than not fitting.
    """
    sizes = {group: groups.count(group) for group in dict.fromkeys(groups)}
    if len(sizes) == 1:
        return [torch.arange(start, len(groups), 2) for start in (0, 1)]
    halves: list[list[int]] = [[], []]
    for group in sorted(sizes, key=lambda g: (-sizes[g], g)):
        lighter = min(halves, key=len)
        lighter += [row for row, own in enumerate(groups) if own == group]
    return [torch.tensor(sorted(half), dtype=torch.int64) for half in halves]


def fit_inverse_temperature(probability: Tensor, label: Tensor, truth: Tensor) -> float:
    """Return the ``a`` with which the likeliest class's log-odds best predict that it is right.

    They are used as in ``tempered_logit``. It minimises the mean negative log-likelihood, with a
    standard normal prior on ln(a). Predicted classes weigh equally, because background would drown
    the rest.

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
    scaled = tempered_logit(centres, _INVERSE_TEMPERATURES[:, None])
    loss = torch.zeros(len(_INVERSE_TEMPERATURES))
    for count in present:
        misses, hits = count.float()
        nll = -(hits * F.logsigmoid(scaled)).sum(1) - (misses * F.logsigmoid(-scaled)).sum(1)
        loss += nll / count.sum() / len(present)
    prior = torch.log(_INVERSE_TEMPERATURES).square() / 2 / len(probability)
    return float(_INVERSE_TEMPERATURES[(loss + prior).argmin()])


def fit_bias(distribution: Tensor, truth: Tensor) -> float:
    """Return the ``b`` for which ``sigmoid(logit(p) + b)`` best predicts foreground.

    p is the probability of any foreground. It minimises the mean negative log-likelihood, with a
    standard normal prior on b. Predicted foreground and background weigh equally.

    Args:
        distribution: (N, K+1, H, W). truth: (N, H, W) int64.
    """
    logits = logit(1 - distribution[:, 0]).flatten()
    levels = torch.linspace(float(logits.min()), float(logits.max()) + 1e-6, 2 * _BINS + 1)
    cells = (truth > 0).flatten() * 2 * _BINS + torch.bucketize(logits, levels[1:-1])
    counts = torch.bincount(cells, minlength=4 * _BINS).reshape(2, -1).float()
    shifted = (levels[1:] + levels[:-1]) / 2 + _BIASES[:, None]
    nll = -counts[1] * F.logsigmoid(shifted) - counts[0] * F.logsigmoid(-shifted)
    loss = torch.zeros(len(_BIASES))
    sides = (levels[1:] + levels[:-1] > 0, levels[1:] + levels[:-1] <= 0)
    present = [side for side in sides if counts[:, side].sum() > 0]
    for side in present:
        loss += nll[:, side].sum(1) / counts[:, side].sum() / len(present)
    prior = _BIASES.square() / 2 / len(distribution)
    return float(_BIASES[(loss + prior).argmin()])
