"""Pretraining of ``vit_t`` on generated scenes, at a tiny setting, and what the package ships."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pipeline.sam  # noqa: F401  (before segment_anything imports torchvision)

# isort: split
import numpy as np
import pytest
import torch

from pipeline.sam.build import build_sam
from pipeline.sam.checkpoints import EMBEDDED_WEIGHTS, load_state
from tools.pretrain_vit_t.__main__ import main
from tools.pretrain_vit_t.pretrain import boxes_of, pretrain, sample_points, validate
from tools.pretrain_vit_t.scenes import generate_scene


def test_scenes_are_deterministic_and_have_objects() -> None:
    image, regions = generate_scene(3, 5, size=128)
    again, regions_again = generate_scene(3, 5, size=128)
    other, _ = generate_scene(3, 6, size=128)
    assert np.array_equal(image, again)
    assert np.array_equal(regions, regions_again)
    assert not np.array_equal(image, other)
    assert image.shape == (128, 128, 3)
    assert len(regions) >= 1
    assert set(np.unique(regions)) <= {0.0, 1.0}
    assert (regions.sum(axis=(1, 2)) >= 80).all()


def test_boxes_and_points_lie_on_their_masks() -> None:
    masks = torch.zeros(2, 32, 32, dtype=torch.bool)
    masks[0, 4:12, 6:26] = True
    masks[1, 20:21, 3:4] = True
    generator = torch.Generator().manual_seed(0)
    points = sample_points(masks, 5, generator)
    for mask, coords in zip(masks, points.long(), strict=True):
        assert bool(mask[coords[:, 1], coords[:, 0]].all())
    boxes = boxes_of(masks, generator)
    expected = torch.tensor([[6.0, 4, 26, 12], [3, 20, 4, 21]])
    assert float((boxes - expected).abs().max()) <= 2.0  # a tenth of the longest side
    assert float((boxes[1] - expected[1]).abs().max()) <= 0.1


def test_shipped_weights_segment_unseen_scenes() -> None:
    """Far above what random weights reach (about 0.1): the shipped file is a trained one."""
    sam = build_sam("vit_t")
    state = load_state(EMBEDDED_WEIGHTS)
    sam.load_state_dict({name: value.float() for name, value in state.items()})
    assert EMBEDDED_WEIGHTS.stat().st_size <= 3_000_000
    assert validate(sam, seed=77, scenes=16) > 0.4


def test_the_command_line_trains_to_the_same_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = partial(validate, scenes=2)
    monkeypatch.setattr("tools.pretrain_vit_t.pretrain.validate", few)
    out = tmp_path / "vit_t.safetensors"
    main([str(out), "--steps", "1", "--seed", "3"])
    said = capsys.readouterr()
    assert said.out.startswith("IoU on unseen scenes 0.")
    assert said.out.endswith(f"; {out}\n")
    assert said.err.startswith("\rstep 1 of 1: loss ")
    assert set(load_state(out)) == set(build_sam("vit_t").state_dict())
    assert out.stat().st_size < 3_000_000
    again = tmp_path / "again.safetensors"
    pretrain(again, steps=1, seed=3)
    assert again.read_bytes() == out.read_bytes()
