"""Weights are loaded whole or not at all: no name may be missing, left over or of another shape."""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from pipeline.sam.build import TimmImageEncoder, build_sam
from pipeline.sam.checkpoints import (
    EMBEDDED_WEIGHTS,
    base_checkpoint,
    build_base,
    load_state,
    note_unofficial,
)
from pipeline.sam.teacher import ADAPTER_FILE, load_teacher
from pipeline.stores.teacher_card import CARD_FILE, load_card

State = dict[str, Tensor]
LAST = "mask_decoder.transformer.norm_final_attn.weight"


def rename_all(state: State) -> State:
    return {f"net.{name}": value for name, value in state.items()}


def drop_one(state: State) -> State:
    return {name: value for name, value in state.items() if name != LAST}


def add_one(state: State) -> State:
    return {**state, "head.weight": state[LAST].clone()}


def reshape_one(state: State) -> State:
    return {**state, LAST: state[LAST][:-1].clone()}


THREE = r"\('[\w.]+', '[\w.]+', '[\w.]+', \.\.\.\)"
CHANGES = [
    (rename_all, rf"{{all}} missing {THREE}, {{all}} not expected {THREE}"),
    (drop_one, rf"1 missing \('{LAST}'\)"),
    (add_one, r"1 not expected \('head.weight'\)"),
    (reshape_one, rf"1 of another shape \('{LAST}'\)"),
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
    message = message.replace("{all}", str(len(state)))
    start, end = re.escape(f"{folder / ADAPTER_FILE}: "), "; run `samfed finetune-sam` again"
    assert re.fullmatch(start + message + end, str(caught.value))


@pytest.mark.parametrize(("change", "message"), CHANGES[1:])
def test_a_checkpoint_that_does_not_fit(
    tmp_path: Path, change: Callable[[State], State], message: str
) -> None:
    path = tmp_path / "vit_t.safetensors"
    safetensors.torch.save_file(change(load_state(EMBEDDED_WEIGHTS)), path)
    with pytest.raises(DataError) as caught:
        build_base(SamConfig(checkpoint=path), num_classes=4)
    end = "; expected the tensors of vit_t, all of them and no others"
    assert re.fullmatch(re.escape(f"{path}: ") + message + end, str(caught.value))


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
    with pytest.raises(DataError, match=rf": 1 missing \(.bn1\.bias.\); expected timm:{name}$"):
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


@pytest.mark.parametrize("variant", ["vit_b", "vit_l", "vit_h", "mobile_sam"])
def test_what_a_checkpoint_of_another_variant_looks_like(tmp_path: Path, variant: str) -> None:
    """By the width and depth of its encoder, which says more than a list of missing names."""
    with torch.device("meta"):
        state = build_sam(variant).state_dict()
    nothing = {name: torch.empty((len(value), 0)) for name, value in state.items() if value.ndim}
    torch.save(nothing, tmp_path / "sam.pth")
    with pytest.raises(DataError, match=f"; expected vit_t, found what looks like {variant}$"):
        build_base(SamConfig(checkpoint=tmp_path / "sam.pth"), num_classes=3)


@pytest.mark.parametrize(
    ("wrap", "suffix"),
    [
        (lambda state: {"model": state, "epoch": 3, "optimizer": {"state": {}}}, "pth"),
        (lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}}, "pt"),
        (lambda state: {"model_state": {f"sam.{k}": v for k, v in state.items()}}, "pt"),
        (lambda state: {f"module.sam.{k}": v for k, v in state.items()}, "safetensors"),
    ],
    ids=["model", "state_dict and module", "model_state and sam", "module and sam"],
)
def test_weights_as_people_have_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, wrap: Callable[[State], Any], suffix: str
) -> None:
    """Fine-tuned elsewhere, wrapped by a training run: loaded, and known by their sha256."""
    path, state = tmp_path / f"medsam.{suffix}", load_state(EMBEDDED_WEIGHTS)
    state[LAST] = state[LAST] + 1
    if suffix == "safetensors":
        safetensors.torch.save_file(wrap(state), path)
    else:
        torch.save(wrap(state), path)
    config = SamConfig(checkpoint=path)
    sam = build_base(config, num_classes=3)
    assert torch.equal(sam.state_dict()[LAST], state[LAST])
    assert base_checkpoint(config) == (path, file_sha256(path))


def test_a_checkpoint_that_is_not_the_official_one_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "samfed")
    path = tmp_path / "medsam_vit_b.pth"
    path.write_bytes(b"weights")
    note_unofficial(SamConfig(variant="vit_b", checkpoint=path))
    assert caplog.messages == [
        f"{path}: not the official vit_b checkpoint (sha256 {file_sha256(path)[:12]}...); used as "
        "it is, and named by its sha256 in the card"
    ]
    note_unofficial(SamConfig())  # the embedded one
    assert len(caplog.messages) == 1


def test_a_checkpoint_with_values_that_are_not_finite(tmp_path: Path) -> None:
    path, state = tmp_path / "sam.safetensors", load_state(EMBEDDED_WEIGHTS)
    state[LAST] = torch.full_like(state[LAST], float("nan"))
    safetensors.torch.save_file(state, path)
    with pytest.raises(DataError) as caught:
        load_state(path)
    assert str(caught.value) == (
        f"{path}: '{LAST}' is not finite; the training that wrote it has diverged"
    )


def test_a_checkpoint_that_cannot_be_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sam.pth"
    path.write_bytes(b"weights")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError, match="Permission denied"):
        load_state(path)


@pytest.mark.parametrize(
    ("state", "found"),
    [
        ({"net": {"weight": torch.zeros(1)}}, "'net' holds a dict"),
        ({"state_dict": {"weight": 1}}, "'weight' holds a int"),
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
