"""A teacher on a timm backbone, fine-tuned whole: its adapter is all of it."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pipeline.sam  # noqa: F401  (before timm imports torchvision)

# isort: split
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from conftest import tiny_config

from pipeline.config import Config
from pipeline.data.images import load_labelled
from pipeline.data.partition import load_partition
from pipeline.data.prepare import prepare
from pipeline.disk import file_sha256
from pipeline.labelling.precompute import precompute
from pipeline.results.evaluate_teacher import evaluate_teacher
from pipeline.sam.finetune import finetune, make_teacher
from pipeline.sam.teacher import ADAPTER_FILE, Teacher, load_teacher
from pipeline.sam.transfer import export_teacher, import_teacher
from pipeline.stores.label_store import LabelStore
from pipeline.stores.pseudo_labels import PseudoLabels
from pipeline.stores.teacher_card import label_precision, load_card

BACKBONE = "test_resnet"
BASES = ["random", "checkpoint"]


def timm_config(root: Path, cache: Path, base: str, folder: Path) -> Config:
    sam: dict[str, Any] = {"variant": f"timm:{BACKBONE}", "input_size": 64, "device": "cpu"}
    if base == "checkpoint":
        path = folder / "backbone.safetensors"
        if not path.exists():
            torch.manual_seed(5)
            state = timm.create_model(BACKBONE, pretrained=False).state_dict()
            safetensors.torch.save_file(state, path)
        sam["checkpoint"] = str(path)
    # one batch, so that labels can be compared with what a teacher says to all images at once
    stage_one = {"device": "cpu", "precision": "fp32", "batch_size": 8}
    return tiny_config(root, cache, sam=sam, precompute=stage_one)


class Adapted:
    """A prepared cache whose teacher was fine-tuned, and that teacher as it was in memory."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder = config.cache.root / "teacher"
        prepare(config)
        self.card = finetune(config)
        self.teacher, _ = make_teacher(config, load_partition(config.cache.root / "partition.json"))

    def load(self) -> Teacher:
        partition = load_partition(self.config.cache.root / "partition.json")
        return load_teacher(self.config, partition)

    def adapter(self) -> dict[str, torch.Tensor]:
        return safetensors.torch.load_file(self.folder / ADAPTER_FILE)


@pytest.fixture(scope="module", params=BASES)
def adapted(
    request: pytest.FixtureRequest, tiny_images: Path, tmp_path_factory: pytest.TempPathFactory
) -> Adapted:
    folder = tmp_path_factory.mktemp("timm")
    config = timm_config(tiny_images, folder / "cache", request.param, folder)
    return Adapted(config)


def assert_equal(found: PseudoLabels, expected: PseudoLabels) -> None:
    for field in fields(PseudoLabels):
        name = field.name
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name


def test_the_card_says_what_it_is(adapted: Adapted) -> None:
    card, checkpoint = adapted.card, adapted.config.sam.checkpoint
    assert load_card(adapted.folder) == card
    assert card.variant == f"timm:{BACKBONE}"
    assert card.input_size == 64
    assert card.lora_rank is None
    assert card.base_sha256 == ("random" if checkpoint is None else file_sha256(checkpoint))
    assert card.adapter_sha256 == file_sha256(adapted.folder / ADAPTER_FILE)
    assert card.trained_parameters == card.parameters
    assert card.train_images + card.calibration_images <= 6
    assert 0 <= card.calibration_dice <= 1


def test_the_adapter_holds_the_batch_norms_statistics(adapted: Adapted) -> None:
    """They change while the backbone trains: a fresh one has mean 0, variance 1, no batches."""
    adapter = adapted.adapter()
    names = {n for n, _ in adapted.teacher.sam.image_encoder.backbone.named_buffers()}
    assert any(name.endswith("running_mean") for name in names)
    prefix = "image_encoder.backbone."
    assert {prefix + name for name in names} <= set(adapter)
    for name in names:
        value = adapter[prefix + name]
        if name.endswith("num_batches_tracked"):
            assert int(value) > 0
        elif name.endswith("running_mean"):
            assert float(value.abs().max()) > 0
    assert set(adapter) == set(adapted.teacher.sam.state_dict())


def test_the_loaded_teacher_is_the_fine_tuned_one(adapted: Adapted) -> None:
    config = adapted.config
    partition = load_partition(config.cache.root / "partition.json")
    items = list(load_labelled(config, partition, partition.server.calibration))
    images = [item.image for item in items]
    torch.manual_seed(123)  # what a random base would be drawn from
    loaded = adapted.load()
    for name, value in adapted.teacher.sam.state_dict().items():
        assert torch.equal(loaded.sam.state_dict()[name], value), name
    size = config.data.image_size
    assert_equal(loaded.label(images, size), adapted.teacher.label(images, size))


def test_the_stages_after_it_take_it(adapted: Adapted) -> None:
    config, cache = adapted.config, adapted.config.cache.root
    measured = evaluate_teacher(config).as_json()
    assert measured["variant"] == f"timm:{BACKBONE}"
    assert measured["n"] == adapted.card.calibration_images
    assert 0 <= measured["dice"] <= 1
    result = precompute(config)
    partition = load_partition(cache / "partition.json")
    assert result.failed == []
    assert result.labelled == len(partition.server.calibration) + sum(
        len(client.train) for client in partition.clients.values()
    )
    store = LabelStore(cache / "sam" / "server.zarr")
    assert store.identity == adapted.card.identity(
        label_size=config.data.image_size, precision="auto"
    )
    items = list(load_labelled(config, partition, partition.server.calibration))
    size = config.data.image_size
    assert len(items) <= config.precompute.batch_size
    assert_equal(store.read(), adapted.teacher.label([item.image for item in items], size))
    again = precompute(config)
    assert (again.labelled, again.already_labelled) == (0, result.labelled)


def test_labels_of_another_precision_are_made_anew(adapted: Adapted) -> None:
    """Precision moves the masks of a convolutional encoder; ``auto`` is fp32 there."""

    for asked, used in (("bf16", "bf16"), ("fp32", "fp32"), ("bf16", "bf16"), ("auto", "fp32")):
        stage_one = adapted.config.precompute.model_copy(update={"precision": asked})
        precompute(adapted.config.model_copy(update={"precompute": stage_one}))
        store = LabelStore(adapted.config.cache.root / "sam" / "server.zarr")
        assert store.identity.precision == used
        assert {made_by["precision"] for made_by in store.provenance()[0]} == {used}


@pytest.mark.parametrize(
    ("variant", "asked", "expected"),
    [
        ("vit_b", "bf16", None),
        ("vit_b", "int8", "int8"),
        ("vit_t", "auto", None),
        ("timm:resnet18", "auto", "fp32"),
        ("timm:resnet18", "fp32", "fp32"),
        ("timm:resnet18", "bf16", "bf16"),
    ],
)
def test_the_precision_that_labels_depend_on(
    variant: str, asked: str, expected: str | None
) -> None:
    assert label_precision(variant, asked) == expected


def test_fine_tuning_twice_gives_the_same_bytes(
    adapted: Adapted, tiny_images: Path, tmp_path: Path
) -> None:
    first = {path.name: path.read_bytes() for path in adapted.folder.iterdir()}
    again = adapted.config.model_copy(
        update={"cache": adapted.config.cache.model_copy(update={"root": tmp_path / "cache"})}
    )
    prepare(again)
    torch.manual_seed(77)  # what ran before must not matter
    assert finetune(again) == adapted.card
    second = {path.name: path.read_bytes() for path in (tmp_path / "cache" / "teacher").iterdir()}
    assert second == first


def test_a_site_needs_no_backbone(adapted: Adapted, tmp_path: Path) -> None:
    """The exported teacher is whole, whatever it began with."""
    file, root = tmp_path / "teacher.samfed", adapted.config.data.root
    export_teacher(adapted.config, file)
    site = timm_config(root, tmp_path / "cache", "random", tmp_path)
    prepare(site, owner="north")
    import_teacher(site, file)
    found = load_teacher(site, load_partition(site.cache.root / "partition.json"))
    for name, value in adapted.load().sam.state_dict().items():
        assert torch.equal(found.sam.state_dict()[name], value), name
