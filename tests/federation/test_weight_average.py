"""The model that a run ends with: the mean over its last rounds."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.config import FederateConfig
from pipeline.federation.weight_average import WeightAverage
from pipeline.stores.plain_data import State, from_bytes, to_bytes


def weights(value: float, count: int) -> State:
    return {
        "kernel": torch.tensor([value, 2 * value]),
        "norm.running_mean": torch.tensor([-value]),
        "norm.num_batches_tracked": torch.tensor(count),
    }


def averaged(**settings: Any) -> State:
    """Return what four rounds of weights 1, 2, 4 and 9 end with, kept as bytes between them."""
    average, last = WeightAverage(), weights(0, 0)
    for number, value in enumerate((1.0, 2.0, 4.0, 9.0), start=1):
        last = weights(value, number)
        average = average.after(number, last, settings=FederateConfig(rounds=4, **settings))
        average = from_bytes(to_bytes(average), WeightAverage)
    return average.mean(last)


def test_the_mean_by_hand() -> None:
    """Integers are the last round's, and a window that is longer than the run is all of it."""
    for rounds, mean in ((1, 9.0), (2, 6.5), (3, 5.0), (4, 4.0), (9, 4.0)):
        found = averaged(average_rounds=rounds)
        assert found["kernel"].tolist() == [mean, 2 * mean]
        assert found["kernel"].dtype == torch.float32
        assert found["norm.running_mean"].tolist() == [-mean]
        assert found["norm.num_batches_tracked"] == 4


def test_nothing_is_kept_before_the_last_rounds() -> None:
    settings = FederateConfig(rounds=4, average_rounds=2)
    early = WeightAverage().after(2, weights(1, 1), settings=settings)
    assert early == WeightAverage()
    one = early.after(3, weights(1, 1), settings=settings)
    both = one.after(4, weights(1, 2), settings=settings)
    assert [value.shape for value in both.sums.values()] == [v.shape for v in one.sums.values()]
