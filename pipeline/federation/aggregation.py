"""Combining clients' state dicts on the server: the weighted mean, or the coordinate median."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

State = dict[str, Tensor]


class Aggregate(Protocol):
    """What combines updates, one at a time, in the order of the clients."""

    def add(self, state: State, weight: float) -> None:
        """Count ``state`` with ``weight`` > 0."""

    def result(self) -> State:
        """The combined state, each entry in the dtype that came in."""


class FedAvg:
    """Weighted mean of state dicts, one at a time: memory does not grow with their number.

    McMahan et al., 2017, over the whole state dict: floating-point entries (parameters and batch
    norm's running statistics) are averaged in float64; integer entries (batch norm's counters)
    take the maximum. Add clients in a fixed order: float sums depend on it.
    """

    def __init__(self) -> None:
        self._sums: State = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._weight = 0.0

    def add(self, state: State, weight: float) -> None:
        """Count ``state`` with ``weight`` > 0, e.g. the client's number of images.

        Raises:
            ValueError: the entries, shapes or dtypes differ from the first one's, or bad weight.
        """
        if not weight > 0:
            raise ValueError(f"weight {weight} is not positive")
        if not self._sums:
            self._dtypes = {name: value.dtype for name, value in state.items()}
            self._sums = {name: _start(value) for name, value in state.items()}
        check_like(state, self._sums, self._dtypes)
        for name, value in state.items():
            if value.is_floating_point():
                self._sums[name] += value.double() * weight
            else:
                self._sums[name] = torch.maximum(self._sums[name], value)
        self._weight += weight

    def result(self) -> State:
        """The mean, each entry in the dtype that came in.

        Raises:
            ValueError: nothing was added.
        """
        if not self._sums:
            raise ValueError("nothing to average: no client sent a usable update")
        return {
            name: (value / self._weight if value.is_floating_point() else value).to(
                self._dtypes[name]
            )
            for name, value in self._sums.items()
        }


class CoordinateMedian:
    """Median of each entry's values, whatever the clients' weights (Yin et al., 2018).

    Up to half of the clients may send anything at all without moving an entry beyond what the
    others sent. Of an even number the two middle values are averaged; integer entries take the
    maximum, as in ``FedAvg``. All updates are in memory at once.
    """

    def __init__(self) -> None:
        self._states: list[State] = []

    def add(self, state: State, weight: float) -> None:
        """Count ``state``; ``weight`` is checked, but does not matter.

        Raises:
            ValueError: the entries, shapes or dtypes differ from the first one's, or bad weight.
        """
        if not weight > 0:
            raise ValueError(f"weight {weight} is not positive")
        first = self._states[0] if self._states else state
        check_like(state, first, {name: value.dtype for name, value in first.items()})
        self._states.append({name: value.clone() for name, value in state.items()})

    def result(self) -> State:
        """The median, each entry in the dtype that came in.

        Raises:
            ValueError: nothing was added.
        """
        if not self._states:
            raise ValueError("nothing to combine: no client sent a usable update")
        return {name: self._median(name) for name in self._states[0]}

    def _median(self, name: str) -> Tensor:
        values = torch.stack([state[name] for state in self._states])
        if not values.is_floating_point():
            return values.amax(dim=0)
        ordered = values.double().sort(dim=0).values
        middle = len(ordered) // 2
        median = (ordered[middle] + ordered[-middle - 1]) / 2
        return median.to(values.dtype)


def fedavg(updates: Iterable[tuple[State, float]]) -> State:
    """``FedAvg`` of (state, weight) pairs."""
    mean = FedAvg()
    for state, weight in updates:
        mean.add(state, weight)
    return mean.result()


def check_like(state: State, shapes: State, dtypes: dict[str, torch.dtype]) -> None:
    """Raise ValueError, naming the entry, unless ``state`` has these names, shapes and dtypes."""
    for name in sorted(shapes.keys() ^ state.keys()):
        where = "is missing" if name in shapes else "is unexpected"
        raise ValueError(f"'{name}' {where}")
    for name, value in state.items():
        if value.shape != shapes[name].shape:
            raise ValueError(
                f"'{name}' has shape {tuple(value.shape)}, expected {tuple(shapes[name].shape)}"
            )
        if value.dtype != dtypes[name]:
            raise ValueError(f"'{name}' is {value.dtype}, expected {dtypes[name]}")


def first_not_finite(state: State) -> str | None:
    """Name of the first entry with a NaN or an infinity, or None."""
    for name, value in state.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            return name
    return None


def _start(value: Tensor) -> Tensor:
    if value.is_floating_point():
        return torch.zeros_like(value, dtype=torch.float64)
    return value.clone()
