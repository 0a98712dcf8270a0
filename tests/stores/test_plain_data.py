"""Plain data as bytes, and back: requests, checkpoints and examples are made of it."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from pipeline.errors import CorruptStoreError
from pipeline.federation.examples import Example, load_examples, save_examples
from pipeline.stores.plain_data import Plain, State, from_bytes, load, save, to_bytes


@dataclass(frozen=True)
class Inner:
    rate: float
    names: tuple[str, ...]


@dataclass(frozen=True)
class Outer(Plain):
    weights: State | None
    inner: Inner
    metrics: dict[str, float | None]
    logits: Tensor


@dataclass(frozen=True)
class Other(Plain):
    logits: Tensor


def outer(weights: State | None) -> Outer:
    inner = Inner(0.1, ("a", "b"))
    metrics = {"loss": 1 / 3, "nan": math.nan, "none": None}
    return Outer(weights, inner, metrics, torch.arange(6).reshape(2, 3).t().half())


def test_what_is_read_is_what_was_written() -> None:
    shared = torch.ones(2, 3)
    weights = {"conv.weight": shared, "conv.copy": shared, "bn.count": torch.tensor(7)}
    found = from_bytes(to_bytes(outer(weights)), Outer)
    assert found.inner == outer(None).inner
    assert found.metrics["loss"] == 1 / 3
    assert math.isnan(found.metrics["nan"])
    assert found.metrics["none"] is None
    assert torch.equal(found.logits, outer(None).logits)
    assert found.logits.dtype == torch.float16
    assert list(found.weights) == sorted(weights)
    for name, value in weights.items():
        assert torch.equal(found.weights[name], value)
        assert found.weights[name].dtype == value.dtype
    assert from_bytes(to_bytes(outer(None)), Outer).weights is None
    assert to_bytes(outer(weights)) == to_bytes(outer(dict(reversed(weights.items()))))


def test_a_networks_weights_keep_their_names_for_any_reader() -> None:
    weights = {"conv.weight": torch.ones(2)}
    assert list(safetensors.torch.load(to_bytes(weights))) == ["conv.weight"]
    assert torch.equal(from_bytes(to_bytes(weights), State)["conv.weight"], torch.ones(2))


def test_what_is_not_plain_is_refused() -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        to_bytes({"path": Path("x")})
    with pytest.raises(ValueError, match="found dict, expected"):
        from_bytes(to_bytes({"metrics": 1}), Outer)
    with pytest.raises(ValueError, match="found Inner, expected"):
        from_bytes(to_bytes(outer(None).inner), Outer | Other)
    with pytest.raises(ValueError, match="rate"):
        from_bytes(to_bytes(Inner("fast", ())), Inner)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="damaged"):
        from_bytes(b"\x80\x04K\x01.", Outer)  # a pickle


@pytest.mark.parametrize("other", [{}, {"a": "text"}, {"a": []}, {"a": None}])
def test_a_tensor_without_a_place_is_refused(other: dict[str, Any]) -> None:
    """The digest fits: whoever may send a message can make such a one."""
    with pytest.raises(ValueError, match="damaged"):
        from_bytes(to_bytes({**other, "a/5": torch.zeros(2)}), State)


@pytest.mark.parametrize("said", [{"type": "Other"}, {"value": {}}, [], None, 7])
def test_a_message_of_another_form_is_refused(said: Any) -> None:
    text = json.dumps(said)
    metadata = {"content": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    with pytest.raises(ValueError, match="damaged"):
        from_bytes(safetensors.torch.save({}, {"samfed": json.dumps(metadata)}), Other)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    save(path, outer(None))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(CorruptStoreError) as caught:
        load(path, Outer)
    assert (
        str(caught.value)
        == f"{path}: damaged (sha256 differs); delete it and run `samfed federate`"
    )


def test_examples_of_an_older_run_have_no_target(tmp_path: Path) -> None:
    mask = np.zeros((4, 4), np.uint8)
    path = tmp_path / "examples.safetensors"
    old = {"caption": "a", "image": np.zeros((4, 4, 3), np.uint8), "truth": None, "sam": mask}
    save(path, [old | {"prediction": mask, "weight": mask.astype(np.float32)}])
    (found,) = load_examples(path)
    assert (found.caption, found.target) == ("a", None)


def test_examples_round_trip(tmp_path: Path) -> None:
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    mask, target = image[..., 0] % 2, image[..., 1].astype(np.float32) / 255
    whole = Example("server, image 1", image, mask, 1 - mask, mask, target)
    bare = Example("site_a, image 1", image, None, None, mask, None)
    save_examples(tmp_path / "examples.safetensors", [whole, bare])
    first, second = load_examples(tmp_path / "examples.safetensors")
    assert (first.caption, second.caption) == (whole.caption, bare.caption)
    assert second.truth is second.sam is second.target is None
    for name in ("image", "truth", "sam", "prediction", "target"):
        found, expected = getattr(first, name), getattr(whole, name)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
