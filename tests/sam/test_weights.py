"""Weights are loaded whole or not at all: no name may be missing, left over or of another shape."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pipeline.sam  # noqa: F401  (before segment_anything imports torchvision)

# isort: split
import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor

from pipeline.config import Config, SamConfig
from pipeline.data.partition import load_partition
from pipeline.disk import file_sha256, write_json
from pipeline.errors import ConfigError, DataError, IdentityError
from pipeline.sam.build import TimmImageEncoder
from pipeline.sam.checkpoints import (
    EMBEDDED_WEIGHTS,
    base_checkpoint,
    build_base,
    load_state,
)
from pipeline.sam.teacher import ADAPTER_FILE, load_teacher
from pipeline.stores.teacher_card import CARD_FILE, load_card

State = dict[str, Tensor]
LAST = "mask_decoder.transformer.norm_final_attn.weight"


def rename_all(state: State) -> State:
    return {f"model.{name}": value for name, value in state.items()}


def drop_one(state: State) -> State:
    return {name: value for name, value in state.items() if name != LAST}


def add_one(state: State) -> State:
    return {**state, "head.weight": state[LAST].clone()}


def reshape_one(state: State) -> State:
    return {**state, LAST: state[LAST][:-1].clone()}


CHANGES = [
    (rename_all, "'{first}' is missing (in all: {all} missing, {all} not expected, 0 of"),
    (drop_one, f"'{LAST}' is missing (in all: 1 missing, 0 not expected, 0 of another shape)"),
    (add_one, "'head.weight' is not expected (in all: 0 missing, 1 not expected, 0 of"),
    (reshape_one, f"'{LAST}' is of another shape (in all: 0 missing, 0 not expected, 1 of"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_an_adapter_that_does_not_fit(
    adapted: Config, change: Callable[[State], State], message: str
) -> None:
    """Its sha256 is the card's, as where another version of the code wrote both."""
    folder = adapted.cache.root / "teacher"
    state = safetensors.torch.load_file(folder / ADAPTER_FILE)
    safetensors.torch.save_file(change(state), folder / ADAPTER_FILE)
    sha256 = file_sha256(folder / ADAPTER_FILE)
    card = load_card(folder).model_copy(update={"adapter_sha256": sha256})
    write_json(folder / CARD_FILE, card.model_dump())
    with pytest.raises(IdentityError) as caught:
        load_teacher(adapted, load_partition(adapted.cache.root / "partition.json"))
    line = str(caught.value)
    first = re.escape(message).replace(re.escape("{first}"), r"[\w.]+")
    assert re.search(first.replace(re.escape("{all}"), str(len(state))), line), line
    assert line.startswith(f"{folder / ADAPTER_FILE}: '")
    assert line.endswith("; run `samfed finetune-sam` again")


@pytest.mark.parametrize(("change", "message"), CHANGES[1:])
def test_a_checkpoint_that_does_not_fit(
    tmp_path: Path, change: Callable[[State], State], message: str
) -> None:
    path = tmp_path / "vit_t.safetensors"
    safetensors.torch.save_file(change(load_state(EMBEDDED_WEIGHTS)), path)
    with pytest.raises(DataError) as caught:
        build_base(SamConfig(checkpoint=path), num_classes=4)
    assert message in str(caught.value)
    assert str(caught.value).endswith("; expected the weights of the model that sam.variant names")


def test_a_checkpoint_without_a_decoder(tmp_path: Path) -> None:
    path = tmp_path / "vit_t.safetensors"
    safetensors.torch.save_file(rename_all(load_state(EMBEDDED_WEIGHTS)), path)
    with pytest.raises(DataError, match="no mask decoder in it; expected a SAM checkpoint"):
        build_base(SamConfig(checkpoint=path), num_classes=1)


def test_a_backbones_classifier_is_not_needed(tmp_path: Path) -> None:
    """A timm checkpoint holds more than the feature maps need, but never less."""
    path, name = tmp_path / "backbone.safetensors", "mobilenetv3_small_050"
    config = SamConfig(variant=f"timm:{name}", checkpoint=path, input_size=64)
    state = timm.create_model(name, pretrained=False).state_dict()
    safetensors.torch.save_file(state, path)
    build_base(config, num_classes=1)
    safetensors.torch.save_file({k: v for k, v in state.items() if k != "bn1.bias"}, path)
    with pytest.raises(DataError, match=r"'bn1\.bias' is missing \(in all: 1 missing, 0 not exp"):
        build_base(config, num_classes=1)


def test_pretrained_tokens_are_dealt_to_classes() -> None:
    """Five tokens (K = 4) from four pretrained ones: the fifth is the first again."""
    sam = build_base(SamConfig(), num_classes=4)
    tokens = sam.mask_decoder.mask_tokens.weight
    assert tokens.shape[0] == 5
    assert torch.equal(tokens[4], tokens[0])
    first, last = (sam.mask_decoder.output_hypernetworks_mlps[i] for i in (0, 4))
    assert torch.equal(first.layers[0].weight, last.layers[0].weight)


def test_checkpoints_never_execute_code(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "exploded",))  # type: ignore[return-value]

    path = tmp_path / "bomb.pth"
    torch.save({"weight": Bomb()}, path)
    with pytest.raises(DataError, match="not a readable checkpoint"):
        load_state(path)
    assert not (tmp_path / "exploded").exists()


def test_official_checkpoints_are_pinned(tmp_path: Path) -> None:
    path = tmp_path / "sam_vit_b.pth"
    path.write_bytes(b"not it")
    with pytest.raises(DataError, match=r"the official vit_b checkpoint's is ec2df6273261\.\.\."):
        base_checkpoint(SamConfig(variant="vit_b", checkpoint=path))


@pytest.mark.parametrize(
    ("state", "found"),
    [
        ({"state_dict": {"weight": torch.zeros(1)}}, "'state_dict' holds a dict"),
        ({"weight": torch.zeros(1), "epoch": 3}, "'epoch' holds a int"),
        ({0: torch.zeros(1)}, "0 holds a Tensor"),
        ([torch.zeros(1)], "holds a list"),
        (torch.zeros(1), "holds a Tensor"),
    ],
)
def test_a_checkpoint_of_anything_but_named_tensors(
    tmp_path: Path, state: object, found: str
) -> None:
    path = tmp_path / "x.pth"
    torch.save(state, path)
    with pytest.raises(DataError) as caught:
        load_state(path)
    assert str(caught.value) == (
        f"{path}: {found}; expected tensors by name; save the model's own state_dict()"
    )
    torch.save({"weight": torch.ones(2)}, path)
    assert load_state(path)["weight"].tolist() == [1, 1]


@pytest.mark.parametrize("keep", [0, 4, 40, -3])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_damaged_checkpoint(tmp_path: Path, suffix: str, keep: int) -> None:
    path = tmp_path / f"x.{suffix}"
    if suffix == "pth":
        torch.save({"weight": torch.ones(20)}, path)
    else:
        safetensors.torch.save_file({"weight": torch.ones(20)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError) as caught:
        load_state(path)
    assert str(caught.value).startswith(f"{path}: not a readable checkpoint (")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("message", "shown"),
    [("first line\n  second line", "first line"), ("", "RuntimeError"), ("\n\n x\ny", "x")],
)
def test_a_timm_error_of_many_lines(
    monkeypatch: pytest.MonkeyPatch, message: str, shown: str
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(ConfigError) as caught:
        TimmImageEncoder("nothing", img_size=64, out_channels=8)
    assert str(caught.value) == (
        f"sam.variant: 'timm:nothing' is no timm model with feature maps ({shown}); "
        "see timm.list_models()"
    )
