"""SAM as it comes: which mask of many becomes the label, where a box goes, and what is refused."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pipeline.sam  # noqa: F401  (before segment_anything imports torchvision)

# isort: split
import numpy as np
import pytest
import torch
from conftest import tiny_config
from numpy.typing import NDArray
from teachers import content, on_workers, thread_workers
from torch import Tensor, nn

from pipeline.config import Config, SamConfig
from pipeline.data.partition import load_partition
from pipeline.data.prepare import prepare
from pipeline.disk import file_sha256
from pipeline.errors import ConfigError, IdentityError, StageError
from pipeline.labelling.precompute import precompute
from pipeline.sam import prompts
from pipeline.sam.coarse import COARSE_FILE, COARSE_SIDE, build_coarse, coarse_log_odds
from pipeline.sam.finetune import finetune
from pipeline.sam.prompts import (
    CoarseBox,
    PointGrid,
    Prompter,
    boxes_around,
    rank_masks,
    two_class,
)
from pipeline.sam.teacher import Teacher, build_base, load_teacher
from pipeline.stores.label_store import LabelStore
from pipeline.stores.teacher_card import TeacherCard, load_card

CARD = TeacherCard(
    variant="vit_t",
    input_size=256,
    num_classes=1,
    prompt="points:1",
    lora_rank=None,
    base_sha256="b" * 64,
    adapter_sha256="none",
    parameters=1,
    trained_parameters=0,
    server_sha256="s" * 64,
    train_images=1,
    calibration_images=1,
    calibration_dice=0.0,
    seed=0,
)


def teacher(prompter: Prompter, precision: str = "fp32") -> Teacher:
    sam = build_base(SamConfig(), num_classes=prompts.MULTIMASK)
    return Teacher(sam, CARD, device="cpu", precision=precision, prompter=prompter)


def disc(height: int, width: int, row: int, col: int, radius: int) -> NDArray[np.bool_]:
    rows, cols = np.mgrid[:height, :width]
    inside: NDArray[np.bool_] = (rows - row) ** 2 + (cols - col) ** 2 <= radius**2
    return inside


def scene(blob: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """A bright blob on a dark ground, with a little noise."""
    noise = np.random.default_rng(0).integers(-4, 5, (*blob.shape, 3))
    colour = np.where(blob[:, :, None], (210, 190, 120), (50, 60, 80))
    return (colour + noise).astype(np.uint8)


def overlap(found: NDArray[Any], truth: NDArray[Any]) -> float:
    return float((found & truth).sum() / (found | truth).sum())


class Odds(nn.Module):
    """A coarse model that says ``odds`` (s, s) of any frame."""

    def __init__(self, odds: Tensor) -> None:
        super().__init__()
        self.odds = odds

    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[1:] == (3, COARSE_SIDE, COARSE_SIDE)
        logits = torch.stack([torch.zeros_like(self.odds), self.odds])
        return logits.expand(len(images), -1, -1, -1)


# --------------------------------------------------------------------------- points


def test_which_mask_is_the_label_by_hand() -> None:
    """Rows of a 100 x 50 image; 5.0 is sure foreground, -5.0 sure background."""
    logits = torch.full((6, 50, 100), -5.0)
    logits[0, 10:20, 10:20] = 5.0  # sure, predicted IoU above segment-anything's threshold
    logits[1, 10:20, 10:20] = 5.0
    logits[1, 10:20, 20:30] = 0.5  # a quarter of it hangs on the threshold
    logits[1, 20:30, 10:30] = 5.0
    logits[2] = 5.0  # the whole image
    logits[3] = 5.0
    logits[3, 20:30, 20:30] = -5.0  # its background
    # 4 is empty
    logits[5, 10:20, 10:20] = 5.0
    iou = torch.tensor([0.89, 0.95, 0.99, 0.98, 0.97, 0.80])
    assert rank_masks(logits, iou).tolist() == pytest.approx([1.89, 0.95 * 0.75, 0, 0, 0, 0.8])
    assert rank_masks(logits[2:5], iou[2:5]).tolist() == [0, 0, 0]


def test_a_mask_must_reach_all_four_sides_to_be_no_object() -> None:
    logits = torch.full((2, 64, 64), -5.0)
    logits[0, :, :40] = 5.0  # three sides
    logits[1, 1:63, 1:63] = 5.0  # within 20/1024 of each side
    assert rank_masks(logits, torch.tensor([0.9, 0.9])).tolist() == pytest.approx([1.9, 0.0])


@torch.no_grad()
def test_a_point_on_a_blob_gives_the_blob() -> None:
    blob = disc(120, 120, 60, 60, 30)
    labels = teacher(PointGrid(1)).label([scene(blob)], 64)  # the one point is the centre
    truth = disc(64, 64, 32, 32, 16)
    assert overlap(labels.masks[0] == 1, truth) > 0.7
    assert 0 < labels.predicted_iou[0] <= 1
    assert labels.confidences[0].min() >= 127  # of the predicted class, so never below a half


def test_the_best_of_many_points_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """144 points are 3 passes; the mask of the point next to (row 100, col 30) is the best."""
    passes: list[Tensor] = []

    def decode(sam: object, embeddings: Tensor, *, points: tuple[Tensor, Tensor]) -> Any:
        coords = points[0][:, 0]
        assert points[1].tolist() == [[1]] * len(coords)
        assert len(embeddings) == len(coords)
        passes.append(coords)
        logits = torch.full((len(coords), 4, 64, 64), -9.0)
        for mask, (x, y) in zip(logits, (coords / 4).long().tolist(), strict=True):
            mask[1:, y, x] = 9.0
        iou = 0.8 - (coords - torch.tensor([30.0, 100.0])).norm(dim=1) / 1000
        return logits, torch.stack([iou * 0 + 1, iou, iou / 2, iou / 3], dim=1)

    monkeypatch.setattr(prompts, "_decode", decode)
    # the image is 128 wide and 256 high
    logits, iou = PointGrid(12)(
        None,  # type: ignore[arg-type]
        torch.zeros(1, 8, 16, 16),
        torch.zeros(1, 3, 256, 256),
        torch.tensor([[256, 128]]),
    )
    assert [len(coords) for coords in passes] == [64, 64, 16]
    every = torch.cat(passes)
    assert torch.all(every > 0)
    assert every.max(dim=0).values.tolist() == pytest.approx([128 * 23 / 24, 256 * 23 / 24])
    best = min(every.tolist(), key=lambda p: math.dist(p, (30, 100)))
    assert (logits[0, 1] > 0).nonzero().tolist() == [[int(best[1] / 4), int(best[0] / 4)]]
    assert torch.equal(logits[0, 0], torch.zeros(64, 64))
    assert iou[0].tolist() == pytest.approx([0.8 - math.dist(best, (30, 100)) / 1000] * 2)


def test_nothing_found_is_background_at_even_odds(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(sam: object, embeddings: Tensor, *, points: Any) -> tuple[Tensor, Tensor]:
        return torch.full((len(embeddings), 4, 64, 64), 9.0), torch.ones(len(embeddings), 4)

    monkeypatch.setattr(prompts, "_decode", decode)
    labels = teacher(PointGrid(2)).label([scene(disc(50, 80, 25, 40, 9))], 32)
    assert not labels.masks.any()
    assert set(np.unique(labels.confidences)) <= {127, 128}  # one half of 255
    assert labels.predicted_iou.tolist() == [0]


def test_two_class_logits_are_a_sigmoid() -> None:
    z = torch.linspace(-6, 6, 12).reshape(1, 3, 4)
    logits, iou = two_class(z, torch.tensor([0.7]))
    assert torch.allclose(logits.softmax(dim=1)[:, 1], torch.sigmoid(z))
    assert iou.tolist() == pytest.approx(np.array([[0.7, 0.7]]))


# --------------------------------------------------------------------------- a box


def test_boxes_around_by_hand() -> None:
    odds = torch.full((3, 16, 16), -1.0)
    odds[0, 4:8, 3:10] = 2.0
    odds[0, 6, 12] = 0.5  # all of the foreground
    odds[1, 10:, :] = 2.0  # in the padding of an image 16 wide and 10 high
    odds[2, 9:, 2:4] = 2.0  # half in it
    valid_hw = torch.tensor([[16.0, 16.0], [10.0, 16.0], [10.0, 16.0]])
    boxes, found = boxes_around(odds, valid_hw)
    assert found.tolist() == [True, False, True]
    assert boxes[0].tolist() == [3, 4, 13, 8]
    assert boxes[2].tolist() == [2, 9, 4, 10]


def test_the_box_goes_to_sam_in_input_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Tensor] = []

    def decode(sam: object, embeddings: Tensor, *, boxes: Tensor) -> tuple[Tensor, Tensor]:
        given.append(boxes)
        tokens = torch.arange(4.0)
        logits = tokens[None, :, None, None].expand(len(boxes), -1, 64, 64) + 1
        return logits, (0.5 + tokens / 10).expand(len(boxes), -1)

    monkeypatch.setattr(prompts, "_decode", decode)
    odds = torch.full((COARSE_SIDE, COARSE_SIDE), -2.0)
    odds[10:20, 30:50] = 1.0
    valid_hw = torch.tensor([[256, 256], [16, 256]])  # the second image ends above the foreground
    logits, iou = CoarseBox(Odds(odds))(
        None,  # type: ignore[arg-type]
        torch.zeros(2, 8, 16, 16),
        torch.zeros(2, 3, 256, 256),
        valid_hw,
    )
    assert given[0][0].tolist() == [60, 20, 100, 40]
    assert torch.equal(logits[0, 1], torch.ones(64, 64))  # the unambiguous mask alone
    assert iou.tolist() == [[0.5, 0.5], [0.0, 0.0]]
    assert float(logits[1, 1].max()) <= 0
    assert float(logits[1, 1, 40, 40]) == pytest.approx(-2.0)


@torch.no_grad()
def test_a_box_around_a_blob_gives_the_blob() -> None:
    blob = disc(100, 200, 50, 140, 30)
    odds = torch.full((COARSE_SIDE, COARSE_SIDE), -3.0)
    odds[12:52, 70:110] = 3.0  # the longer side of the image is 128 px there
    labels = teacher(CoarseBox(Odds(odds))).label([scene(blob)], 64)
    rows, cols = np.mgrid[:64, :64] + 0.5
    truth = (rows * 100 / 64 - 50) ** 2 + (cols * 200 / 64 - 140) ** 2 <= 900
    assert overlap(labels.masks[0] == 1, truth) > 0.7


@torch.no_grad()
def test_half_precision_gives_nearly_the_same_masks() -> None:
    """Positions of prompts stay in fp32; one image of the two has no foreground for the box."""
    images = [scene(disc(120, 120, 60, 60, 30)), scene(disc(60, 120, 30, 60, 25))]
    odds = torch.full((COARSE_SIDE, COARSE_SIDE), -3.0)
    odds[70:96, 32:96] = 3.0  # below the second image
    for prompter in (PointGrid(2), CoarseBox(Odds(odds))):
        full, half = (
            teacher(prompter, precision).label(images, 64) for precision in ("fp32", "bf16")
        )
        assert (full.masks == half.masks).mean() > 0.97
        assert full.masks[0].any()


def test_an_empty_coarse_prediction_is_an_empty_label() -> None:
    odds = torch.full((COARSE_SIDE, COARSE_SIDE), -2.0)
    labels = teacher(CoarseBox(Odds(odds))).label([scene(disc(60, 60, 30, 30, 12))], 32)
    assert not labels.masks.any()
    assert set(np.unique(labels.confidences)) == {round(255 / (1 + math.exp(-2)))}
    assert labels.predicted_iou.tolist() == [0]


def test_the_coarse_models_odds() -> None:
    model = build_coarse(Config()).eval()
    frames = torch.randint(0, 256, (2, 3, 256, 256), dtype=torch.uint8)
    odds = coarse_log_odds(model, frames)
    assert odds.shape == (2, COARSE_SIDE, COARSE_SIDE)
    other_network = Config.model_validate({"model": {"encoder": "tu-mobilenetv3_large_100"}})
    again = coarse_log_odds(build_coarse(other_network).eval(), frames)
    assert torch.equal(again, odds)  # the client's network has no say


# --------------------------------------------------------------------------- the stages


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        (
            {"sam": {"prompt": "points", "variant": "timm:resnet18"}},
            "'points', but timm:resnet18 was never trained with prompts; only vit_* were",
        ),
        (
            {"sam": {"prompt": "box"}, "data": {"num_classes": 3}},
            "'box', but a prompt's mask has one class, data.num_classes is 3",
        ),
    ],
)
def test_who_cannot_be_prompted(tmp_path: Path, sections: dict[str, Any], why: str) -> None:
    config = tiny_config(tmp_path / "images", tmp_path / "cache", **sections)
    with pytest.raises(ConfigError) as caught:
        finetune(config)
    assert str(caught.value) == f"sam.prompt: found {why}; set it to none"
    assert not (tmp_path / "cache").exists()


def settings(images: Path, cache: Path, prompt: str, **sam: object) -> Config:
    sam = {"prompt": prompt, "points_per_side": 3, "device": "cpu"} | sam
    return tiny_config(images, cache, sam=sam, precompute={"device": "cpu"})


@pytest.fixture(scope="module")
def labelled(tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache that was labelled with a box, then with points."""
    cache = tmp_path_factory.mktemp("prompts") / "cache"
    prepare(settings(tiny_images, cache, "none"))
    for prompt in ("box", "points"):
        config = settings(tiny_images, cache, prompt)
        card = finetune(config)
        assert card == load_card(cache / "teacher")
        assert precompute(config, clients=["site_a"]).failed == []
    return cache


def test_points_need_no_training(labelled: Path, tiny_images: Path) -> None:
    card = load_card(labelled / "teacher")
    assert sorted(path.name for path in (labelled / "teacher").iterdir()) == ["card.json"]
    assert (card.prompt, card.adapter_sha256, card.coarse_sha256) == ("points:3", "none", None)
    assert (card.lora_rank, card.trained_parameters) == (None, 0)
    store = LabelStore(labelled / "sam" / "site_a.zarr")
    assert store.identity.prompt == "points:3"
    assert store.done().all()


def test_points_on_a_dask_worker(labelled: Path, tiny_images: Path, tmp_path: Path) -> None:
    config = settings(tiny_images, tmp_path, "points")
    alone = config.precompute.model_copy(update={"threads": 1})
    config = config.model_copy(update={"precompute": alone})
    shutil.copytree(labelled / "teacher", tmp_path / "teacher")
    shutil.copy(labelled / "partition.json", tmp_path)
    precompute(config, clients=["site_a"])
    here = content(tmp_path / "sam")
    shutil.rmtree(tmp_path / "sam")
    with thread_workers() as workers:
        result = precompute(config, clients=["site_a"], cluster=on_workers(workers))
    assert (result.already_labelled, result.failed) == (0, [])
    assert content(tmp_path / "sam") == here


def test_the_labels_of_a_box_name_its_coarse_model(
    labelled: Path, tiny_images: Path, tmp_path: Path
) -> None:
    (aside,) = (labelled / "archive" / "site_a").glob("*.zarr")
    store = LabelStore(aside)
    assert store.done().all()
    config = settings(tiny_images, tmp_path / "cache", "box")
    prepare(config)
    card = finetune(config)  # the same seed, so the same coarse model, bytes and all
    path = tmp_path / "cache" / "teacher" / COARSE_FILE
    assert card.coarse_sha256 == file_sha256(path)
    assert card.trained_parameters > 0
    assert store.identity == card.identity(label_size=32, precision="auto")
    assert store.identity.prompt == f"box:{card.coarse_sha256}"
    partition = load_partition(tmp_path / "cache" / "partition.json")
    assert load_teacher(config, partition).prompter is not None
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(IdentityError) as caught:
        load_teacher(config, partition)
    assert str(caught.value) == f"{path}: sha256 differs from its card; run `samfed finetune-sam`"
    path.unlink()
    with pytest.raises(StageError, match=r"coarse\.safetensors: not found; run `samfed finetune"):
        load_teacher(config, partition)


@pytest.mark.parametrize(
    ("prompt", "per_side", "wanted"),
    [("none", 3, "none"), ("box", 3, "box"), ("points", 4, "points:4")],
)
def test_a_card_of_another_prompt_is_refused(
    labelled: Path, tiny_images: Path, prompt: str, per_side: int, wanted: str
) -> None:
    config = settings(tiny_images, labelled, prompt, points_per_side=per_side)
    with pytest.raises(IdentityError) as caught:
        load_teacher(config, load_partition(labelled / "partition.json"))
    assert str(caught.value) == (
        f"{labelled / 'teacher'}: prompt is points:3, the settings ask for {wanted}; "
        "run `samfed finetune-sam`"
    )
