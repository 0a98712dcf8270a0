"""Labels are pinned: what changes them must raise ``LABEL_VERSION``, which makes them anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pipeline.sam  # noqa: F401  (before segment_anything imports torchvision)

# isort: split
import numpy as np
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray

from pipeline.config import Config
from pipeline.data.partition import load_partition
from pipeline.disk import file_sha256, write_json
from pipeline.sam.checkpoints import build_base
from pipeline.sam.lora import add_adapter
from pipeline.sam.teacher import ADAPTER_FILE, load_teacher
from pipeline.stores.label_store import LABEL_VERSION
from pipeline.stores.pseudo_labels import PseudoLabels
from pipeline.stores.teacher_card import CARD_FILE, load_card

#: ``version``; of each image ``mask``, a string of digits a row, and mean ``confidence`` (0..255)
#: and ``predicted_iou``.
GOLDEN: dict[str, Any] = json.loads(Path(__file__).with_name("golden_labels.json").read_text())
SIZES_HW = ((48, 72), (150, 60))
LABEL_SIZE = 32


def picture(height: int, width: int) -> NDArray[np.uint8]:
    """Draw a bright disc and a dark square on a gradient, in integers: the same everywhere."""
    rows, cols = np.mgrid[:height, :width]
    image = np.stack([90 + rows % 60, 60 + cols % 60, np.full_like(rows, 80)], axis=-1)
    radius = min(height, width) // 4
    image[(rows - height // 3) ** 2 + (cols - width // 2) ** 2 <= radius**2] = (220, 200, 120)
    image[-(height // 4) :, : width // 3] = (20, 30, 60)
    return image.astype(np.uint8)


def write_pinned_adapter(config: Config) -> None:
    """Put the shipped weights with pinned noise in the place of what one epoch has trained."""
    sam = build_base(config.sam, num_classes=config.data.num_classes)
    names = add_adapter(sam, config.sam.lora_rank)
    folder, generator = config.cache.root / "teacher", torch.Generator().manual_seed(4)
    state = {}
    for name in sorted(names):
        state[name] = value = sam.state_dict()[name]
        if name.startswith("image_encoder"):
            state[name] = 0.05 * torch.randn(value.shape, generator=generator)
        elif "hypernetworks" in name or "mask_tokens" in name:
            noise = torch.randn(value.shape, generator=generator)
            state[name] = value + value.std(correction=0) * noise
        if "hypernetworks_mlps.0.layers.2" in name:  # a background of logit 0, so that both win
            state[name] = torch.zeros_like(value)
    safetensors.torch.save_file(state, folder / ADAPTER_FILE)
    sha256 = file_sha256(folder / ADAPTER_FILE)
    card = load_card(folder).model_copy(update={"adapter_sha256": sha256})
    write_json(folder / CARD_FILE, card.model_dump())


@pytest.fixture
def labels(adapted: Config) -> PseudoLabels:
    """Labels as stage one makes them, in float32 on the CPU."""
    exact = adapted.precompute.model_copy(update={"device": "cpu", "precision": "fp32"})
    config = adapted.model_copy(update={"precompute": exact})
    write_pinned_adapter(config)
    teacher = load_teacher(config, load_partition(config.cache.root / "partition.json"))
    return teacher.label([picture(*size) for size in SIZES_HW], LABEL_SIZE)


def test_labels_are_those_of_this_version(labels: PseudoLabels) -> None:
    """The tolerance is what another CPU's order of operations may move, and no more."""
    advice = "labels have changed: raise LABEL_VERSION and write golden_labels.json anew"
    assert GOLDEN["version"] == LABEL_VERSION, "write golden_labels.json anew"
    expected = np.array([[list(row) for row in one["mask"]] for one in GOLDEN["images"]])
    assert 0.1 < (labels.masks > 0).mean() < 0.9  # else the comparison would say nothing
    assert (labels.masks.astype(str) == expected).mean() >= 0.999, advice
    for name, found, tolerance in (
        ("confidence", labels.confidences.mean(axis=(1, 2)), 0.2),  # of 255 levels
        ("predicted_iou", labels.predicted_iou, 1e-3),
    ):
        wanted = [one[name] for one in GOLDEN["images"]]
        assert found.tolist() == pytest.approx(wanted, abs=tolerance, rel=0), advice
