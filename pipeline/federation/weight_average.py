"""The mean of a model's weights over the last rounds, which is the model that a run ends with.

As in Izmailov et al., 2018, but over rounds, and with batch norm's statistics averaged likewise.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from pipeline.config import FederateConfig
from pipeline.stores.plain_data import Plain, State


@dataclass(frozen=True)
class WeightAverage(Plain):
    """A sum of weights over rounds; its size does not grow with them."""

    count: int = 0  # rounds
    sums: State = field(default_factory=dict)  # float64, of the float entries

    def after(self, number: int, weights: State, *, settings: FederateConfig) -> WeightAverage:
        """Return the average with the weights of round ``number``, if it is one of the last."""
        played = settings.played_rounds
        if settings.average_rounds == 1 or number <= played - settings.average_rounds:
            return self
        sums = {
            name: self.sums.get(name, 0) + value.to("cpu", torch.float64)
            for name, value in weights.items()
            if value.is_floating_point()
        }
        return WeightAverage(self.count + 1, sums)

    def mean(self, last: State) -> State:
        """Return the mean in the dtypes of ``last``, the weights of the last round.

        Integers, which are batch norm's counters, are those of ``last``, as is everything where
        there was no round to average.
        """
        if not self.count:
            return last
        floats = {name: (total / self.count).to(last[name]) for name, total in self.sums.items()}
        return last | floats
