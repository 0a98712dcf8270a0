"""Aggregation of clients' weights on the server: their weighted mean, or the coordinate median."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

State = dict[str, Tensor]


class Aggregation(ABC):
    """What combines the updates of one round, added one at a time in the order of the clients.

    Integer entries (batch norm's counters) take the maximum of the updates and of ``broadcast``,
    the weights that every client started from.
    """

    def __init__(self, broadcast: State) -> None:
        self._broadcast = broadcast
        self._weight = 0.0

    def add(self, update: State, weight: float) -> None:
        """Count ``update`` with ``weight`` > 0, such as the client's number of images.

        Raises:
            ValueError: ``check_update`` refuses the update, or the weight is not positive.
        """
        if not weight > 0:
            raise ValueError(f"weight {weight} is not positive")
        reason = check_update(update, self._broadcast)
        if reason is not None:
            raise ValueError(reason)
        self._accumulate(update, weight)
        self._weight += weight

    def result(self) -> State:
        """Return the combined weights, each entry in the dtype of the broadcast.

        Raises:
            ValueError: nothing was added.
        """
        if not self._weight:
            raise ValueError("nothing to aggregate: no client sent a usable update")
        return {name: self._combined(name).to(old.dtype) for name, old in self._broadcast.items()}

    @abstractmethod
    def _accumulate(self, update: State, weight: float) -> None:
        """Count a checked update."""

    @abstractmethod
    def _combined(self, name: str) -> Tensor:
        """Return one entry of the result."""


class FedAvg(Aggregation):
    """Weighted mean of the updates, whose number does not change the memory it needs.

    McMahan et al., 2017, over the whole state dict: floating-point entries (parameters and batch
    norm's running statistics) are averaged in float64. Float sums depend on the clients' order.
    """

    def __init__(self, broadcast: State) -> None:
        super().__init__(broadcast)
        self._sums = {
            name: torch.zeros_like(old, dtype=torch.float64) if old.is_floating_point() else old
            for name, old in broadcast.items()
        }

    def _accumulate(self, update: State, weight: float) -> None:
        for name, value in update.items():
            if value.is_floating_point():
                self._sums[name] += value.double() * weight
            else:
                self._sums[name] = torch.maximum(self._sums[name], value)

    def _combined(self, name: str) -> Tensor:
        value = self._sums[name]
        return value / self._weight if value.is_floating_point() else value


class CoordinateMedian(Aggregation):
    """Median of each entry's values, whatever the clients' weights (Yin et al., 2018).

    Up to half of the clients may send anything at all without moving an entry beyond what the
    others sent. Of an even number the two middle values are averaged. All updates are in memory
    at once.
    """

    def __init__(self, broadcast: State) -> None:
        super().__init__(broadcast)
        self._updates: list[State] = []

    def _accumulate(self, update: State, weight: float) -> None:
        self._updates.append({name: value.clone() for name, value in update.items()})

    def _combined(self, name: str) -> Tensor:
        values = torch.stack([update[name] for update in self._updates])
        if not values.is_floating_point():
            return torch.maximum(values.amax(dim=0), self._broadcast[name])
        ordered = values.double().sort(dim=0).values
        middle = len(ordered) // 2
        return (ordered[middle] + ordered[-middle - 1]) / 2


AGGREGATIONS: Mapping[Literal["fedavg", "median"], type[Aggregation]] = MappingProxyType(
    {"fedavg": FedAvg, "median": CoordinateMedian}
)


def check_update(update: State, broadcast: State) -> str | None:
    """Return why ``update`` cannot be used, naming the entry, or None if it can.

    It must have the names, shapes and dtypes of the broadcast weights, and finite values.
    """
    if unmatched := sorted(broadcast.keys() ^ update.keys()):
        return f"'{unmatched[0]}' is {'missing' if unmatched[0] in broadcast else 'unexpected'}"
    for name, value in update.items():
        expected = broadcast[name]
        if value.shape != expected.shape:
            return f"'{name}' has shape {tuple(value.shape)}, expected {tuple(expected.shape)}"
        if value.dtype != expected.dtype:
            return f"'{name}' is {value.dtype}, expected {expected.dtype}"
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
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
