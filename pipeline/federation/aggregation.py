"""Aggregation of clients' weights on the server: their weighted mean, or the coordinate median."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from pipeline.segmentation.networks import State


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


class Aggregation:
    """What combines a round's updates, added one at a time in the order of the clients.

    Floating-point entries (parameters and batch norm's running statistics) are combined in float64
    as ``kind`` says; integer entries (batch norm's counters) take the maximum of the updates and
    the broadcast.

    * ``fedavg``: the weighted mean (McMahan et al., 2017). Float sums depend on the clients' order;
      the memory it needs does not depend on their number.
    * ``median``: the median of each coordinate, whatever the weights (Yin et al., 2018). Up to half
      of the clients may send anything at all without moving an entry beyond what the others sent.
      Of an even number the two middle values are averaged. All updates are in memory at once.
    """

    def __init__(self, broadcast: State, kind: Literal["fedavg", "median"] = "fedavg") -> None:
        """Expect updates of ``broadcast``, the weights that every client started from."""
        self._broadcast, self._median, self._weight = broadcast, kind == "median", 0.0
        self._combined = {  # sums of floats, maxima of integers
            name: torch.zeros_like(old, dtype=torch.float64) if old.is_floating_point() else old
            for name, old in broadcast.items()
        }
        self._updates: list[State] = []  # for the median alone

    def add(self, update: State, weight: float) -> None:
        """Count ``update`` with ``weight`` > 0, such as the client's number of images.

        Raises:
            ValueError: ``check_update`` refuses the update, or the weight is not positive.
        """
        reason = check_update(update, self._broadcast)
        if reason is not None or not weight > 0:
            raise ValueError(reason or f"weight {weight} is not positive")
        self._weight += weight
        if self._median:
            self._updates.append({name: value.clone() for name, value in update.items()})
        for name, value in update.items():
            if not value.is_floating_point():
                self._combined[name] = torch.maximum(self._combined[name], value)
            elif not self._median:
                self._combined[name] += value.double() * weight

    def result(self) -> State:
        """Return the combined weights, each entry in the dtype of the broadcast.

        Raises:
            ValueError: nothing was added.
        """
        if not self._weight:
            raise ValueError("nothing to aggregate: no client sent a usable update")
        return {
            name: (self._floats(name) if old.is_floating_point() else self._combined[name]).to(
                old.dtype
            )
            for name, old in self._broadcast.items()
        }

    def _floats(self, name: str) -> Tensor:
        if not self._median:
            return self._combined[name] / self._weight
        values = torch.stack([update[name] for update in self._updates]).double()
        ordered, middle = values.sort(dim=0).values, len(values) // 2
        return (ordered[middle] + ordered[-middle - 1]) / 2
