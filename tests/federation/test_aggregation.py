"""FedAvg against numbers worked out by hand, buffers included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.federation.aggregation import CoordinateMedian, FedAvg, fedavg, first_not_finite


def state(weight: float, mean: float, batches: int) -> dict[str, torch.Tensor]:
    return {
        "conv.weight": torch.tensor([[weight, 2 * weight]]),
        "norm.running_mean": torch.tensor([mean], dtype=torch.float16),
        "norm.num_batches_tracked": torch.tensor(batches),
    }


def test_by_hand() -> None:
    """(1*10 + 4*30) / 40 = 3.25; (2*10 + 6*30) / 40 = 5; counters take the maximum."""
    mean = fedavg([(state(1.0, 2.0, 7), 10), (state(4.0, 6.0, 5), 30)])
    assert mean["conv.weight"].tolist() == [[3.25, 6.5]]
    assert mean["norm.running_mean"].tolist() == [5.0]
    assert mean["norm.num_batches_tracked"].item() == 7
    assert [v.dtype for v in mean.values()] == [torch.float32, torch.float16, torch.int64]


def test_a_whole_network_averages_with_itself() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    mean = fedavg([(network.state_dict(), 3), (network.state_dict(), 5)])
    for name, value in network.state_dict().items():
        assert torch.equal(mean[name], value)


def test_inputs_are_not_changed() -> None:
    first = state(1.0, 2.0, 7)
    fedavg([(first, 1), (state(3.0, 2.0, 9), 1)])
    assert first["conv.weight"].tolist() == [[1.0, 2.0]]
    assert first["norm.num_batches_tracked"].item() == 7


def test_small_weights_survive_many_clients() -> None:
    """float32 sums would lose the last bits; float64 accumulators keep them."""
    mean = FedAvg()
    for _ in range(1000):
        mean.add({"x": torch.tensor([0.1])}, 1)
    assert mean.result()["x"].item() == torch.tensor(0.1).item()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"x": torch.zeros(2)}, "'x' has shape (2,), expected (3,)"),
        ({"y": torch.zeros(3)}, "'x' is missing"),
        ({"x": torch.zeros(3), "y": torch.zeros(1)}, "'y' is unexpected"),
        (
            {"x": torch.zeros(3, dtype=torch.float64)},
            "'x' is torch.float64, expected torch.float32",
        ),
    ],
)
def test_structure_is_checked(other: dict[str, torch.Tensor], message: str) -> None:
    mean = FedAvg()
    mean.add({"x": torch.zeros(3)}, 1)
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared)
        mean.add(other, 1)
    assert str(error.value) == message


def test_nothing_to_average() -> None:
    with pytest.raises(ValueError, match="no client sent a usable update"):
        FedAvg().result()
    with pytest.raises(ValueError, match="not positive"):
        FedAvg().add({"x": torch.zeros(1)}, 0)


def test_not_finite_is_named() -> None:
    assert first_not_finite({"a": torch.ones(2), "n": torch.tensor(3)}) is None
    assert first_not_finite({"a": torch.ones(2), "b": torch.tensor([1.0, torch.nan])}) == "b"


def median(*states: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    combined = CoordinateMedian()
    for each in states:
        combined.add(each, 1)
    return combined.result()


def test_the_median_by_hand() -> None:
    """Of 1, 4, 9 it is 4; of 1, 4, 9, 6 it is (4 + 6) / 2 = 5; counters take the maximum."""
    three = [state(1.0, 2.0, 7), state(4.0, 6.0, 5), state(9.0, 4.0, 6)]
    odd = median(*three)
    assert odd["conv.weight"].tolist() == [[4.0, 8.0]]
    assert odd["norm.running_mean"].tolist() == [4.0]
    assert odd["norm.num_batches_tracked"].item() == 7
    assert [v.dtype for v in odd.values()] == [torch.float32, torch.float16, torch.int64]
    even = median(*three, state(6.0, 8.0, 1))
    assert even["conv.weight"].tolist() == [[5.0, 10.0]]
    assert even["norm.running_mean"].tolist() == [5.0]


def test_the_median_stays_where_most_clients_are() -> None:
    honest = [state(value, 0.0, 1) for value in (1.0, 1.1, 1.2)]
    wild = [state(value, 0.0, 1) for value in (1e30, -1e30)]
    found = median(honest[0], wild[0], honest[1], wild[1], honest[2])["conv.weight"][0, 0]
    assert 1.0 <= float(found) <= 1.2


def test_the_median_agrees_with_numpy_in_any_order() -> None:
    generator = torch.Generator().manual_seed(0)
    states = [{"x": torch.randn(3, 5, generator=generator)} for _ in range(6)]
    expected = np.median(np.stack([s["x"].numpy() for s in states]), axis=0)
    np.testing.assert_allclose(median(*states)["x"].numpy(), expected, rtol=1e-6)
    assert torch.equal(median(*states)["x"], median(*states[::-1])["x"])


def test_the_median_refuses_what_does_not_fit() -> None:
    combined = CoordinateMedian()
    with pytest.raises(ValueError, match="nothing to combine"):
        combined.result()
    combined.add(state(1.0, 2.0, 7), 1)
    with pytest.raises(ValueError, match="is missing"):
        combined.add({"conv.weight": torch.zeros(1, 2)}, 1)
    with pytest.raises(ValueError, match="not positive"):
        combined.add(state(1.0, 2.0, 7), 0)
