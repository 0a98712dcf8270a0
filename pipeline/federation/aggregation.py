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
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from pipeline.config import AggregationName
from pipeline.federation.updates import Updates
from pipeline.segmentation.networks import State

#: By rule: n >= 2f + this. The others know no f.
_BEYOND_HOSTILE: Mapping[AggregationName, int] = MappingProxyType(
    {"trimmed_mean": 1, "krum": 3, "multi_krum": 3}
)


def fewest_updates(rule: AggregationName, byzantine: int) -> int:
    """Return how many updates ``rule`` needs to bear ``byzantine`` hostile ones among them."""
    return 2 * byzantine + _BEYOND_HOSTILE[rule] if rule in _BEYOND_HOSTILE else 1


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
        if new.is_floating_point() and not bool(torch.isfinite(new).all()):
            return f"'{name}' is not finite"
    return None


def update_norm(update: State, broadcast: State) -> float:
    """Return the Euclidean norm of what ``update`` changes in the broadcast's float entries."""
    changes = (
        update[name].double() - old.double()
        for name, old in broadcast.items()
        if old.is_floating_point()
    )
    return math.sqrt(sum(float(change.square().sum()) for change in changes))


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
    chosen: Sequence[str] = list(updates.weights)
    if rule == "fedavg":
        return _finish(updates, _mean(updates, updates.weights)), chosen
    cut = hostile if rule == "trimmed_mean" else (count - 1) // 2
    combined = {}
    if rule in ("krum", "multi_krum"):
        ranked = krum_order(updates, byzantine=hostile, trained=trained)
        chosen = ranked[: 1 if rule == "krum" else count - hostile]
        in_order = [client for client in updates.weights if client in chosen]
        combined = _mean(updates, dict.fromkeys(in_order, 1.0), trained)
    for name, old in updates.broadcast.items():
        if old.is_floating_point() and name not in combined:
            combined[name] = _trimmed_mean(updates, name, cut)
    return _finish(updates, combined), chosen


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
    sums = {
        name: torch.zeros_like(old, dtype=torch.float64)
        for name, old in updates.broadcast.items()
        if old.is_floating_point() and (names is None or name in names)
    }
    for client, weight in weights.items():
        update = updates.read(client)
        for name, total in sums.items():
            total += update[name].double() * weight
    return {name: total / sum(weights.values()) for name, total in sums.items()}


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
    return {
        name: combined[name].to(old.dtype) if name in combined else _largest(updates, name)
        for name, old in updates.broadcast.items()
    }


def _largest(updates: Updates, name: str) -> Tensor:
    old = updates.broadcast[name]
    parts = [block.amax(dim=0) for block in updates.blocks(name)]
    return torch.maximum(old, torch.cat(parts).reshape(old.shape)) if parts else old
