"""Rules of aggregation against numbers worked out by hand and Flower's, buffers included."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.config import AggregationName
from pipeline.federation.aggregation import aggregate, check_update, update_norms
from pipeline.federation.updates import Updates
from pipeline.segmentation.networks import State

KINDS: tuple[AggregationName, ...] = get_args(AggregationName)


def state(weight: float, mean: float, batches: int) -> State:
    return {
        "conv.weight": torch.tensor([[weight, 2 * weight]]),
        "norm.running_mean": torch.tensor([mean], dtype=torch.float16),
        "norm.num_batches_tracked": torch.tensor(batches),
    }


def waiting(folder: Path, updates: Sequence[State], weights: Sequence[float] = ()) -> Updates:
    """Put updates of a broadcast of zeros into files, all with weight 1 unless ``weights`` say."""
    broadcast = {name: torch.zeros_like(value) for name, value in updates[0].items()}
    files = Updates(folder / "updates", broadcast)
    for number, update in enumerate(updates):
        files.add(f"client_{number}", update, weights[number] if weights else 1)
    return files


class Combine:
    """All rules, with files in a folder of the test's own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.chosen: list[int] = []

    def __call__(
        self,
        kind: AggregationName,
        updates: Sequence[State],
        weights: Sequence[float] = (),
        *,
        byzantine: int = 0,
    ) -> State:
        """Return what ``kind`` makes of updates, whose ``norm.*`` entries nobody trains."""
        files = waiting(self._folder, updates, weights)
        trained = [name for name in updates[0] if not name.startswith("norm.")]
        combined, chosen = aggregate(files, kind, byzantine=byzantine, trained=trained)
        self.chosen = [int(name.removeprefix("client_")) for name in chosen]
        return combined


@pytest.fixture
def combine(tmp_path: Path) -> Combine:
    return Combine(tmp_path)


def test_fedavg_by_hand(combine: Combine) -> None:
    """(1*10 + 4*30) / 40 = 3.25; (2*10 + 6*30) / 40 = 5; counters take the maximum."""
    mean = combine("fedavg", [state(1.0, 2.0, 7), state(4.0, 6.0, 5)], [10, 30])
    assert mean["conv.weight"].tolist() == [[3.25, 6.5]]
    assert mean["norm.running_mean"].tolist() == [5.0]
    assert mean["norm.num_batches_tracked"].item() == 7
    assert [v.dtype for v in mean.values()] == [torch.float32, torch.float16, torch.int64]


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_network_combines_with_itself(combine: Combine, kind: AggregationName) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    combined = combine(kind, [network.state_dict()] * 3, [3, 5, 1])
    for name, value in network.state_dict().items():
        assert torch.equal(combined[name], value)


@pytest.mark.parametrize("kind", KINDS)
def test_neither_the_updates_nor_the_broadcast_are_changed(
    tmp_path: Path, kind: AggregationName
) -> None:
    values = [state(1.0, 2.0, 7), state(3.0, 2.0, 9), state(3.0, 2.0, 8)]
    files = waiting(tmp_path, values)
    combined, _ = aggregate(files, kind, byzantine=0, trained=["conv.weight"])
    assert combined["norm.num_batches_tracked"].item() == 9
    again, _ = aggregate(files, kind, byzantine=0, trained=["conv.weight"])
    assert all(torch.equal(value, again[name]) for name, value in combined.items())
    for kept, expected in ((files.broadcast, state(0.0, 0.0, 0)), (values[0], state(1.0, 2.0, 7))):
        assert all(torch.equal(value, expected[name]) for name, value in kept.items())


def test_small_weights_survive_many_clients(combine: Combine) -> None:
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
def test_an_update_is_held_against_the_broadcast(update: State, reason: str) -> None:
    """A client that sends something else must not make everyone after it wrong."""
    broadcast = {"x": torch.zeros(3)}
    assert check_update(update, broadcast) == reason
    assert check_update({"x": torch.ones(3)}, broadcast) is None


@pytest.mark.parametrize("kind", KINDS)
def test_too_little_to_aggregate(tmp_path: Path, kind: AggregationName) -> None:
    fewest = 3 if "krum" in kind else 1
    files = Updates(tmp_path / "updates", {"x": torch.zeros(1)})
    for number in range(fewest - 1):
        files.add(str(number), {"x": torch.zeros(1)}, 1)
    with pytest.raises(ValueError, match=f"found {fewest - 1} usable .* at least {fewest}"):
        aggregate(files, kind, byzantine=0, trained=["x"])
    with pytest.raises(ValueError, match="weight 0 is not positive"):
        files.add("last", {"x": torch.zeros(1)}, 0)


def test_the_norm_of_an_update_is_of_its_change() -> None:
    """3, 4 and 12 make 13; counters do not count, and 1e30 squared is no infinity."""
    before, after = state(1.0, 2.0, 7), state(1.0, 14.0, 90)
    after["conv.weight"] = torch.tensor([[4.0, 6.0]])
    assert update_norms(after, before, ["conv.weight"]) == (13, 5)
    assert update_norms(before, before, ()) == (0, 0)
    huge: Tensor = torch.full((4,), 1e30)
    norm, _ = update_norms({"x": huge}, {"x": torch.zeros(4)}, ())
    assert math.isclose(norm, 2e30, rel_tol=1e-6)


def test_the_median_by_hand(combine: Combine) -> None:
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


def test_the_median_stays_where_most_clients_are(combine: Combine) -> None:
    values = (1.0, 1e30, 1.1, -1e30, 1.2)
    found = combine("median", [state(value, 0.0, 1) for value in values])
    assert 1.0 <= float(found["conv.weight"][0, 0]) <= 1.2


def test_the_median_agrees_with_numpy_in_any_order(combine: Combine) -> None:
    generator = torch.Generator().manual_seed(0)
    states = [{"x": torch.randn(3, 5, generator=generator)} for _ in range(6)]
    found = combine("median", states)["x"]
    expected = np.median(np.stack([s["x"].numpy() for s in states]), axis=0)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    assert torch.equal(found, combine("median", states[::-1])["x"])


# ----------------------------------------------------------------------- hostile clients


def line(*values: float) -> list[State]:
    """Return updates of one parameter, and of a statistic that is ten times as large."""
    return [{"w": torch.tensor([float(v)]), "norm.mean": torch.tensor([10.0 * v])} for v in values]


def test_the_trimmed_mean_by_hand(combine: Combine) -> None:
    """Without 0 and 100 it is (1 + 2 + 6) / 3 = 3; without two at each end it is 2."""
    values = line(6, 100, 1, 0, 2)
    assert combine("trimmed_mean", values, byzantine=1)["w"].item() == 3
    assert combine("trimmed_mean", values, byzantine=1)["norm.mean"].item() == 30
    assert combine("trimmed_mean", values, byzantine=2)["w"].item() == 2
    assert combine("trimmed_mean", values, byzantine=0)["w"].item() == pytest.approx(21.8)


def test_krum_by_hand(combine: Combine) -> None:
    """n = 5, f = 1, so 2 neighbours: scores 5, 2, 5, 13, 96^2 + 97^2. Multi-Krum leaves 100 out.

    Statistics take their median, 20: with the chosen parameters anything might come.
    """
    values = line(0, 1, 2, 4, 100)
    assert combine("krum", values, byzantine=1) == {"w": 1, "norm.mean": 20}
    assert combine.chosen == [1]
    assert combine("multi_krum", values, [1, 2, 3, 4, 5], byzantine=1)["w"].item() == 7 / 4
    assert combine.chosen == [1, 0, 2, 3]


def test_krums_ties_go_by_the_order_of_the_clients(combine: Combine) -> None:
    combine("krum", line(3, 1, 1, 3, 1, 3, 2), byzantine=1)
    assert combine.chosen == [6]
    combine("multi_krum", line(3, 1, 1, 3, 1, 3), byzantine=1)
    assert combine.chosen == [0, 1, 2, 3, 4]


def test_statistics_have_no_part_in_krums_distances(combine: Combine) -> None:
    values = line(0, 1, 2, 4, 100)
    values[1]["norm.mean"] += 1e6
    assert combine("krum", values, byzantine=1)["norm.mean"].item() == 40
    assert combine.chosen == [1]


def test_with_clients_rejected_as_many_hostile_ones_are_borne_as_the_others_allow(
    combine: Combine,
) -> None:
    """Of four updates Krum bears none and has two neighbours; the trimmed mean bears one."""
    values = line(0, 1, 2, 100)
    combine("krum", values, byzantine=2)
    assert combine.chosen == [1]
    assert combine("trimmed_mean", values, byzantine=2)["w"].item() == 1.5


def test_blocks_give_the_same_as_whole_entries(
    combine: Combine, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    states = [{"w": torch.randn(3, 5, generator=generator)} for _ in range(7)]
    whole = [combine(kind, states, byzantine=1)["w"] for kind in KINDS]
    monkeypatch.setattr("pipeline.federation.updates.BLOCK", 7 * 4)
    assert all(
        torch.equal(combine(kind, states, byzantine=1)["w"], before)
        for kind, before in zip(KINDS, whole, strict=True)
    )


#: Seven clients' two entries, the last two hostile.
X = [
    [[0.0, 0.3, -0.27], [-0.89, -0.45, -0.99]],
    [[0.06, 1.34, -0.49], [-0.62, 0.49, 0.36]],
    [[0.11, -0.93, -0.03], [0.7, -1.34, -0.46]],
    [[-1.9, -1.29, -1.84], [-0.24, -1.27, 0.27]],
    [[0.16, -0.19, -2.52], [-0.54, -0.05, 0.11]],
    [[-30.6, -9.6, -19.6], [-16.2, 21.2, -16.2]],
    [[-0.03, 0.88, -0.58], [-0.11, 0.11, 0.06]],
]
Y = [[-1.23, 0.08], [1.36, -1.55], [0.86, 0.12], [-0.64, 2.0], [0.76, -1.2], [0.07, 0.58]]
Y += [[8.81, 9.68]]


@pytest.mark.parametrize(
    ("kind", "byzantine", "x", "y"),
    [
        ("median", 0, [0.0, -0.19, -0.58, -0.54, -0.05, 0.06], [0.76, 0.12]),
        (
            "trimmed_mean",
            1,
            [-0.352, -0.246, -1.14, -0.48, -0.234, -0.202],
            [0.482, 0.316],
        ),
        (
            "trimmed_mean",
            2,
            [0.01, -0.2733333333, -0.97, -0.4666666667, -0.13, -0.0966666667],
            [0.5633333333, 0.26],
        ),
        ("krum", 1, [0.11, -0.93, -0.03, 0.7, -1.34, -0.46], [0.86, 0.12]),
        ("krum", 2, [0.16, -0.19, -2.52, -0.54, -0.05, 0.11], [0.76, -1.2]),
        (
            "multi_krum",
            1,
            [-0.2666666667, 0.0183333333, -0.955, -0.2833333333, -0.4183333333, -0.1083333333],
            [1.6533333333, 1.5216666667],
        ),
        (
            "multi_krum",
            2,
            [-0.314, -0.154, -1.03, -0.318, -0.524, -0.142],
            [0.222, -0.11],
        ),
    ],
)
def test_the_rules_agree_with_flowers(
    combine: Combine, kind: AggregationName, byzantine: int, x: list[float], y: list[float]
) -> None:
    """flwr 1.42.0's aggregate_median, _trimmed_avg (f / n cut) and _krum (to_keep n - f) say so."""
    states = [
        {"x": torch.tensor(a, dtype=torch.float64), "y": torch.tensor(b, dtype=torch.float64)}
        for a, b in zip(X, Y, strict=True)
    ]
    found = combine(kind, states, byzantine=byzantine)
    assert found["x"].flatten().tolist() == pytest.approx(x, abs=1e-9)
    assert found["y"].tolist() == pytest.approx(y, abs=1e-9)
