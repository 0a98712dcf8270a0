"""Weights in few bytes: numbers worked out by hand, error feedback, and whole runs."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from watched_engines import Watched, changed, models

from pipeline.config import Config
from pipeline.federation.client import PrivateState
from pipeline.federation.compression import (
    Packed,
    kernels_of,
    pack,
    pack_update,
    unpack,
    unpack_update,
)
from pipeline.federation.messages import AnyRequest, Reply
from pipeline.federation.server import federate
from pipeline.segmentation.networks import State
from pipeline.stores.plain_data import from_bytes, load, to_bytes


def counts(packed: Packed) -> list[int]:
    return list(memoryview(zlib.decompress(packed.kernels.numpy().tobytes())).cast("b"))


def state(*rows: list[float], bias: float = 0.1) -> State:
    return {"w": torch.tensor(rows), "b": torch.tensor([bias]), "n": torch.tensor(3)}


def test_int8_by_hand() -> None:
    """Root mean squares are 2 and 127 / 4: 2 / 32 = 1 / 16, but 127 / 4 / 32 < 127 / 127 = 1."""
    values = state([2.0, -2.0, 2.0, 2.0] * 4, [127.0, 1.4, *[0.0] * 14], [0.0] * 16)
    packed = pack(values, "int8", steps=32)
    assert packed.steps.tolist() == [1 / 16, 1.0, 0.0]
    assert counts(packed) == [32, -32, 32, 32] * 4 + [127, 1] + [0] * 30
    found = unpack(packed, values)
    assert found["w"].tolist() == [values["w"][0].tolist(), [127.0, 1.0, *[0.0] * 14], [0.0] * 16]
    assert found["b"].item() == values["b"].item()  # biases and counters are exact
    assert found["n"].item() == 3


def test_float16_keeps_to_its_range() -> None:
    values = state([1e9, -1e9, 1.0, 2049.0])
    assert unpack(pack(values, "float16", steps=1), values)["w"].tolist() == [
        [65504.0, -65504.0, 1.0, 2048.0]
    ]


def test_any_shape_and_size_comes_back() -> None:
    """The error is half a step: 1/32 of the root mean square, or 1/254 of the largest number."""
    torch.manual_seed(0)
    values = {
        name: torch.randn(shape) * scale
        for name, shape, scale in (("c", (5, 3, 3, 3), 1e-30), ("l", (7, 4), 1e20), ("v", (9,), 1))
    }
    found = unpack(pack(values, "int8", steps=16), values)
    assert kernels_of(values) == ["c", "l"]
    for name, value in values.items():
        assert found[name].dtype == torch.float32
        rows = value.reshape(len(value), -1).double()
        step = torch.maximum(rows.square().mean(1).sqrt() / 16, rows.abs().amax(1) / 127)
        error = (found[name].reshape(rows.shape) - rows).abs().amax(1)
        assert bool((error <= 0.501 * step).all())
    assert torch.equal(found["v"], values["v"])
    assert unpack(pack({"v": values["v"]}, "int8", steps=16), {"v": values["v"]}).keys() == {"v"}


def test_what_rounding_leaves_out_comes_with_the_next_update() -> None:
    """0.1 beside 8 is less than half a step (0.35), twice 0.1 is more; 0.3 less a step are left."""
    before, after = state([1.0, 1.0]), state([9.0, 1.1], bias=0.7)
    residual: State = {}
    sent, steps = [], []
    for _ in range(3):
        packed, residual = pack_update(after, before, residual, "int8")
        sent.append(unpack_update(packed, before)["w"][0, 1].item() - 1)
        steps.append(packed.steps.item())
        assert unpack_update(packed, before)["b"].item() == after["b"].item()
    assert steps[0] == pytest.approx((8.001 / 2) ** 0.5 * 8**0.5 / 16, abs=1e-3)
    assert sent == pytest.approx([0, steps[1], 0], abs=1e-6)
    assert residual["w"][0, 1].item() == pytest.approx(0.3 - steps[1], abs=1e-6)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kernels": torch.zeros(7, dtype=torch.uint8)}, "its kernels are damaged"),
        ({"kernels": torch.zeros(7).half()}, "it has 7 numbers in kernels of 1 rows, expected 2"),
        ({"steps": torch.zeros(2)}, "it has 2 numbers in kernels of 2 rows, expected 2 in 1"),
    ],
)
def test_packed_weights_that_do_not_fit(change: dict[str, Tensor], reason: str) -> None:
    values = state([1.0, 2.0])
    packed = pack(values, "int8", steps=16)
    with pytest.raises(ValueError, match=reason):
        unpack(replace(packed, **change), values)


def test_a_bomb_is_not_inflated() -> None:
    """A thousandth of its bytes would be gigabytes of zeros; three numbers are looked at."""
    values = state([1.0, 2.0])
    content = bytearray(zlib.compress(bytes(10**7)))
    bomb = replace(
        pack(values, "int8", steps=1), kernels=torch.frombuffer(content, dtype=torch.uint8)
    )
    with pytest.raises(ValueError, match="it has 3 numbers in kernels of 1 rows"):
        unpack(bomb, values)


# ----------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("kind", ["float16", "int8"])
def test_a_run_in_few_bytes_is_repeated_to_the_same_bytes(labelled: Config, kind: Any) -> None:
    """A server that lost its last checkpoint, and then dies in the round, gets the same updates."""
    robust = {"aggregation": "median", "server_optimizer": "fedavgm", "proximal_weight": 0.1}
    config = changed(labelled, kind, compression=kind, **(robust if kind == "int8" else {}))
    through = Watched(lambda request, reply: from_bytes(to_bytes(reply), Reply))
    run = federate(config, connect=through.connect)
    whole, weights = models(run), run.load_model()
    kernels = kernels_of(weights)
    numbers, rows = (sum(f(weights[name]) for name in kernels) for f in (torch.numel, len))
    most = sum(v.nbytes for name, v in weights.items() if name not in kernels)
    most += numbers + 4 * rows if kind == "int8" else 2 * numbers
    for client in (each for entry in run.history() for each in entry["clients"].values()):
        assert max(client["bytes_up"], client["bytes_down"]) <= most
    for request, _ in through.seen:
        assert to_bytes(from_bytes(to_bytes(request), AnyRequest)) == to_bytes(request)
    residual = load(run.private("site_b") / "round_0002.safetensors", PrivateState).residual
    assert sorted(residual) == kernels
    assert any(bool(value.any()) for value in residual.values())

    def crash(request: AnyRequest, reply: Reply) -> Reply:
        raise KeyboardInterrupt  # a client has answered, and nobody heard

    (run.path / "checkpoints" / "round_0002.safetensors").unlink()
    run.model_path.unlink()
    with pytest.raises(KeyboardInterrupt):
        federate(config, connect=Watched(crash).connect)
    assert models(federate(config)) == whole


def test_a_packed_update_that_does_not_fit_is_rejected_and_named(labelled: Config) -> None:
    def spoil(request: AnyRequest, reply: Reply) -> Reply:
        if not isinstance(reply.weights, Packed) or reply.client == "site_a":
            return reply
        change = {
            "site_b": {"kernels": reply.weights.kernels[:-9]},
            "site_c": {"others": {}},
            "site_d": {"steps": reply.weights.steps * torch.inf},
        }
        return replace(reply, weights=replace(reply.weights, **change[reply.client]))

    config = changed(labelled, "spoilt", rounds=1, compression="int8")
    run = federate(config, connect=Watched(spoil).connect)
    reasons = [
        w.split(": update rejected, ") for w in run.history()[0]["warnings"] if "reject" in w
    ]
    assert [client for client, _ in reasons] == ["site_b", "site_c", "site_d"]
    assert " numbers in kernels of " in reasons[0][1]
    assert reasons[1][1].endswith(" is missing")
    assert reasons[2][1].endswith(" is not finite")
