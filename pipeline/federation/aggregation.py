"""Aggregation of clients' weights on the server: their weighted mean, or what resists hostile ones.

* ``fedavg``: the mean, weighted by the clients' images (McMahan et al., 2017).
* ``median``: the median of each coordinate; of an even number the mean of the two middle values
  (Yin et al., 2018).
* ``trimmed_mean``: of each coordinate the mean without the f smallest and f largest values
  (Yin et al., 2018); n > 2f.
* ``krum``: the update nearest to its n - f - 2 nearest others, by the sum of squared Euclidean
  distances (Blanchard et al., 2017); n >= 2f + 3.
* ``multi_krum``: the mean of the n - f updates that Krum's scores rank first.

All but the first give every client the same weight, since its number of images is its own claim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.config import AggregationName
from pipeline.federation.updates import BLOCK, Updates
from pipeline.segmentation.networks import State
from pipeline.stores.plain_data import not_finite


def fewest_updates(rule: AggregationName, byzantine: int) -> int:
    """Return how many updates ``rule`` needs to bear ``byzantine`` hostile ones among them."""
    beyond = RULES[rule].beyond_hostile
    return 1 if beyond is None else 2 * byzantine + beyond


def check_update(update: State, broadcast: State) -> str | None:
    """Return why ``update`` cannot be used, naming the entry, or None if it can.

    It must have the names, shapes and dtypes of the broadcast weights, and finite values.
    """
    for name in sorted(broadcast.keys() | update.keys()):
        old, new = broadcast.get(name), update.get(name)
        if new is None or old is None:
            return f"'{name}' is {'missing' if new is None else 'unexpected'}"
        if new.shape != old.shape:
            return f"'{name}' has shape {tuple(new.shape)}, expected {tuple(old.shape)}"
        if new.dtype != old.dtype:
            return f"'{name}' is {new.dtype}, expected {old.dtype}"
    return not_finite(update)


def update_norms(update: State, broadcast: State, part: Collection[str]) -> tuple[float, float]:
    """Return the Euclidean norm of what ``update`` changes in the broadcast's float entries.

    Once in all of them, and once in those of ``part``.
    """
    floats = [name for name, old in broadcast.items() if old.is_floating_point()]
    inside = _squared_change(update, broadcast, list(part))
    outside = _squared_change(update, broadcast, [name for name in floats if name not in part])
    return math.sqrt(inside + outside), math.sqrt(inside)


def _squared_change(update: State, broadcast: State, names: Sequence[str]) -> float:
    if not names:
        return 0.0
    flat = (torch.cat([s[name].reshape(-1) for name in names]) for s in (update, broadcast))
    pairs = zip(*(each.split(BLOCK) for each in flat), strict=True)
    return sum(float((new.double() - old.double()).square().sum()) for new, old in pairs)


def aggregate(
    updates: Updates, rule: AggregationName, *, byzantine: int, trained: Collection[str]
) -> tuple[State, Sequence[str]]:
    """Return the combined weights, each entry in the dtype of the broadcast, and who is in them.

    Floats are combined in float64. Integers (batch norm's counters) take the maximum of the
    updates and the broadcast. Batch norm's running statistics are combined like parameters, except
    by Krum: a client whose parameters are chosen could send any statistics with them, so that
    these take their median over all clients.

    Args:
        byzantine: f; as many as the number of updates allows, where some were rejected before.
        trained: the names of the parameters, which Krum's distances are taken over.

    Raises:
        ValueError: there are fewer updates than the rule needs.
    """
    count, fewest = len(updates), fewest_updates(rule, 0)
    if count < fewest:
        raise ValueError(f"{rule}: found {count} usable updates, expected at least {fewest}")
    hostile = min(byzantine, (count - fewest) // 2)
    floats, chosen = RULES[rule].combine(updates, hostile, trained)
    return _finish(updates, floats), chosen


def krum_order(updates: Updates, *, byzantine: int, trained: Collection[str]) -> list[str]:
    """Return the clients from the lowest of Krum's scores to the highest, ties in their order."""
    distances, near = _squared_distances(updates, trained), len(updates) - byzantine - 2
    distances.fill_diagonal_(math.inf)  # nobody is their own neighbour
    scores = distances.sort(dim=1).values[:, :near].sum(dim=1)
    order = scores.sort(stable=True).indices.tolist()
    clients = list(updates.weights)
    return [clients[index] for index in order]


def _squared_distances(updates: Updates, trained: Collection[str]) -> Tensor:
    """Return (n, n) float64: differences are summed as they are, so that equal updates have 0."""
    count = len(updates)
    distances = torch.zeros(count, count, dtype=torch.float64)
    for name in trained:
        for block in updates.blocks(name):
            values = block.double()
            for index in range(count - 1):
                apart = (values[index + 1 :] - values[index]).square().sum(dim=1)
                distances[index, index + 1 :] += apart
    return distances + distances.T


def _mean(
    updates: Updates, weights: Mapping[str, float], names: Collection[str] | None = None
) -> State:
    """Return the weighted mean of the float entries (of ``names``), added in the clients' order."""
    means: State = {}
    for dtype in (each for each in updates.dtypes if each.is_floating_point):
        total = torch.zeros(updates.numbers_of(dtype), dtype=torch.float64)
        for client, weight in weights.items():
            values = updates.numbers(client, dtype).split(BLOCK)
            for part, value in zip(total.split(BLOCK), values, strict=True):
                part += value.double() * weight
        means |= updates.entries(dtype, total / sum(weights.values()))
    return {name: mean for name, mean in means.items() if names is None or name in names}


def _trimmed_mean(updates: Updates, name: str, cut: int) -> Tensor:
    """Return each coordinate's mean without ``cut`` values at each end: of 1 or 2, the median."""
    parts = [
        block.double().sort(dim=0).values[cut : len(updates) - cut].mean(dim=0)
        for block in updates.blocks(name)
    ]
    old = updates.broadcast[name]
    return (torch.cat(parts) if parts else old.double()).reshape(old.shape)


def _finish(updates: Updates, combined: State) -> State:
    """Return the combined floats in their dtypes, and the integers."""
    found = combined | _largest(updates)
    return {name: found[name].to(old.dtype) for name, old in updates.broadcast.items()}


def _largest(updates: Updates) -> State:
    """Return the maximum of each entry that is no float, over the updates and the broadcast."""
    largest: State = {}
    for dtype in (each for each in updates.dtypes if not each.is_floating_point):
        values = updates.flat(updates.broadcast, dtype)
        for client in updates.weights:
            values = torch.maximum(values, updates.numbers(client, dtype))
        largest |= updates.entries(dtype, values)
    return largest


# --------------------------------------------------------------------------- rules

#: Combined float entries, in float64, and whose updates are in them.
Combined = tuple[State, Sequence[str]]


class AggregationRule(NamedTuple):
    """How updates become one, of which some, and no more than so many, may be hostile."""

    combine: Callable[[Updates, int, Collection[str]], Combined]  # updates, hostile, trained
    beyond_hostile: int | None = None  # n >= 2f + this; None where the rule knows no f


def _fedavg(updates: Updates, hostile: int, trained: Collection[str]) -> Combined:
    return _mean(updates, updates.weights), list(updates.weights)


def _median(updates: Updates, hostile: int, trained: Collection[str]) -> Combined:
    return _by_coordinate(updates, _middle(updates)), list(updates.weights)


def _trimmed(updates: Updates, hostile: int, trained: Collection[str]) -> Combined:
    return _by_coordinate(updates, hostile), list(updates.weights)


def _krum(updates: Updates, hostile: int, trained: Collection[str], *, several: bool) -> Combined:
    ranked = krum_order(updates, byzantine=hostile, trained=trained)
    chosen = ranked[: len(updates) - hostile if several else 1]
    in_order = [client for client in updates.weights if client in chosen]
    statistics = _by_coordinate(updates, _middle(updates), without=trained)
    return statistics | _mean(updates, dict.fromkeys(in_order, 1.0), trained), chosen


def _by_coordinate(updates: Updates, cut: int, *, without: Collection[str] = ()) -> State:
    return {
        name: _trimmed_mean(updates, name, cut)
        for name, old in updates.broadcast.items()
        if old.is_floating_point() and name not in without
    }


def _middle(updates: Updates) -> int:
    """Return how many values at each end leave the median: the middle one, or two."""
    return (len(updates) - 1) // 2


RULES: Mapping[AggregationName, AggregationRule] = MappingProxyType(
    {
        "fedavg": AggregationRule(_fedavg),
        "median": AggregationRule(_median),
        "trimmed_mean": AggregationRule(_trimmed, 1),
        "krum": AggregationRule(partial(_krum, several=False), 3),
        "multi_krum": AggregationRule(partial(_krum, several=True), 3),
    }
)
