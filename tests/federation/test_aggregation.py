"""FedAvg and the coordinate median against numbers worked out by hand, buffers included."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.federation.aggregation import (
    Aggregation,
    check_update,
    update_norm,
)
from pipeline.segmentation.networks import State

Kind = Literal["fedavg", "median"]


def state(weight: float, mean: float, batches: int) -> State:
    return {
        "conv.weight": torch.tensor([[weight, 2 * weight]]),
        "norm.running_mean": torch.tensor([mean], dtype=torch.float16),
        "norm.num_batches_tracked": torch.tensor(batches),
    }


KINDS: tuple[Kind, ...] = ("fedavg", "median")


def combine(kind: Kind, updates: Sequence[State], weights: Sequence[float] = ()) -> State:
    """Aggregate updates of a broadcast of zeros, all with weight 1 unless ``weights`` are given."""
    broadcast = {name: torch.zeros_like(value) for name, value in updates[0].items()}
    aggregation = Aggregation(broadcast, kind)
    for update, weight in zip(updates, weights or [1] * len(updates), strict=True):
        aggregation.add(update, weight)
    return aggregation.result()


def test_fedavg_by_hand() -> None:
    """(1*10 + 4*30) / 40 = 3.25; (2*10 + 6*30) / 40 = 5; counters take the maximum."""
    mean = combine("fedavg", [state(1.0, 2.0, 7), state(4.0, 6.0, 5)], [10, 30])
    assert mean["conv.weight"].tolist() == [[3.25, 6.5]]
    assert mean["norm.running_mean"].tolist() == [5.0]
    assert mean["norm.num_batches_tracked"].item() == 7
    assert [v.dtype for v in mean.values()] == [torch.float32, torch.float16, torch.int64]


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_network_combines_with_itself(kind: Kind) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    combined = combine(kind, [network.state_dict()] * 2, [3, 5])
    for name, value in network.state_dict().items():
        assert torch.equal(combined[name], value)


@pytest.mark.parametrize("kind", KINDS)
def test_neither_the_updates_nor_the_broadcast_are_changed(kind: Kind) -> None:
    broadcast, first = state(0.0, 0.0, 6), state(1.0, 2.0, 7)
    aggregation = Aggregation(broadcast, kind)
    for update in (first, state(3.0, 2.0, 9)):
        aggregation.add(update, 1)
    assert aggregation.result()["norm.num_batches_tracked"].item() == 9
    for kept, expected in ((broadcast, state(0.0, 0.0, 6)), (first, state(1.0, 2.0, 7))):
        assert all(torch.equal(value, expected[name]) for name, value in kept.items())


def test_small_weights_survive_many_clients() -> None:
    """float32 sums would lose the last bits; float64 accumulators keep them."""
    mean = combine("fedavg", [{"x": torch.tensor([0.1])}] * 1000)
    assert mean["x"].item() == torch.tensor(0.1).item()


@pytest.mark.parametrize(
    ("update", "reason"),
    [
        ({"x": torch.zeros(2)}, "'x' has shape (2,), expected (3,)"),
        ({"y": torch.zeros(3)}, "'x' is missing"),
        ({"x": torch.zeros(3), "y": torch.zeros(1)}, "'y' is unexpected"),
        ({"x": torch.zeros(3).double()}, "'x' is torch.float64, expected torch.float32"),
        ({"x": torch.tensor([0.0, torch.nan, 0.0])}, "'x' is not finite"),
        ({"x": torch.tensor([0.0, 0.0, -torch.inf])}, "'x' is not finite"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_update_too_is_held_against_the_broadcast(
    kind: Kind, update: State, reason: str
) -> None:
    """A client that sends something else must not make everyone after it wrong."""
    broadcast = {"x": torch.zeros(3)}
    assert check_update(update, broadcast) == reason
    aggregation = Aggregation(broadcast, kind)
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared)
        aggregation.add(update, 1)
    assert str(error.value) == reason
    assert check_update({"x": torch.ones(3)}, broadcast) is None
    aggregation.add({"x": torch.ones(3)}, 1)
    assert aggregation.result()["x"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_aggregate(kind: Kind) -> None:
    with pytest.raises(ValueError, match="no client sent a usable update"):
        Aggregation({"x": torch.zeros(1)}, kind).result()
    with pytest.raises(ValueError, match="weight 0 is not positive"):
        Aggregation({"x": torch.zeros(1)}, kind).add({"x": torch.zeros(1)}, 0)


def test_the_norm_of_an_update_is_of_its_change() -> None:
    """3, 4 and 12 make 13; counters do not count, and 1e30 squared is no infinity."""
    before, after = state(1.0, 2.0, 7), state(1.0, 14.0, 90)
    after["conv.weight"] = torch.tensor([[4.0, 6.0]])
    assert update_norm(after, before) == 13
    assert update_norm(before, before) == 0
    huge: Tensor = torch.full((4,), 1e30)
    assert math.isclose(update_norm({"x": huge}, {"x": torch.zeros(4)}), 2e30, rel_tol=1e-6)


def test_the_median_by_hand() -> None:
    """Of 1, 4, 9 it is 4; of 1, 4, 9, 6 it is (4 + 6) / 2 = 5; counters take the maximum."""
    three = [state(1.0, 2.0, 7), state(4.0, 6.0, 5), state(9.0, 4.0, 6)]
    odd = combine("median", three, [1, 100, 10_000])
    assert odd["conv.weight"].tolist() == [[4.0, 8.0]]
    assert odd["norm.running_mean"].tolist() == [4.0]
    assert odd["norm.num_batches_tracked"].item() == 7
    assert [v.dtype for v in odd.values()] == [torch.float32, torch.float16, torch.int64]
    even = combine("median", [*three, state(6.0, 8.0, 1)])
    assert even["conv.weight"].tolist() == [[5.0, 10.0]]
    assert even["norm.running_mean"].tolist() == [5.0]


def test_the_median_stays_where_most_clients_are() -> None:
    values = (1.0, 1e30, 1.1, -1e30, 1.2)
    found = combine("median", [state(value, 0.0, 1) for value in values])
    assert 1.0 <= float(found["conv.weight"][0, 0]) <= 1.2


def test_the_median_agrees_with_numpy_in_any_order() -> None:
    generator = torch.Generator().manual_seed(0)
    states = [{"x": torch.randn(3, 5, generator=generator)} for _ in range(6)]
    found = combine("median", states)["x"]
    expected = np.median(np.stack([s["x"].numpy() for s in states]), axis=0)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    assert torch.equal(found, combine("median", states[::-1])["x"])
