"""SAM as it comes: which mask of many becomes the label, and what is refused."""

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
from dask_processes import thread_workers
from numpy.typing import NDArray
from teachers import content, on_workers
from torch import Tensor

from pipeline.config import Config, SamConfig
from pipeline.data.partition import load_partition
from pipeline.data.prepare import prepare
from pipeline.errors import ConfigError, IdentityError
from pipeline.labelling.precompute import precompute
from pipeline.params import parse_config
from pipeline.sam.build import decode_masks, no_mask
from pipeline.sam.checkpoints import build_base
from pipeline.sam.finetune import finetune
from pipeline.sam.point_decoder import PointDecoder, Prompted
from pipeline.sam.prompts import MULTIMASK, PointGrid, highest_rank, rank_masks
from pipeline.sam.teacher import Teacher, load_teacher
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


def teacher(prompter: PointGrid, precision: str = "fp32") -> Teacher:
    sam = build_base(SamConfig(), num_classes=MULTIMASK)
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


class Drawn:
    """A decoder whose masks and estimates are given for each point, in the order of the grid."""

    def __init__(self, logits: Tensor, iou: Tensor) -> None:
        self.logits, self.iou = logits, iou
        self.passes: list[Tensor] = []
        self.made: list[int] = []  # points whose masks were asked for

    def __call__(self, sam: object, embedding: Tensor) -> Drawn:
        return self

    def prompt(self, points: Tensor) -> Prompted:
        before = sum(map(len, self.passes))
        self.passes.append(points[:, 0])
        span = torch.arange(before, before + len(points))
        return Prompted(self.iou[span], span, span)

    def masks(self, prompted: Prompted, chosen: Tensor) -> Tensor:
        rows = prompted.image[chosen]
        self.made += rows.tolist()
        return self.logits[rows]


def search(drawn: Drawn, side: int, size_hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return what the grid makes of a drawn decoder: foreground logits and the estimate."""
    grid = PointGrid(side, decoder=drawn)
    logits, iou = grid(None, torch.zeros(1, 8, 16, 16), torch.tensor([size_hw]))
    assert torch.equal(logits[0, 0], torch.zeros(64, 64))
    return logits[0, 1], iou[0, 1]


def test_the_best_of_many_points_in_chunks() -> None:
    """144 points are 3 passes; the mask of the point next to (row 100, col 30) is the best."""
    centres = (torch.arange(12) + 0.5) / 12
    rows, cols = torch.meshgrid(centres * 256, centres * 128, indexing="ij")  # the image's size
    points = torch.stack([cols.flatten(), rows.flatten()], dim=1)
    logits = torch.full((144, 3, 64, 64), -9.0)
    for mask, (x, y) in zip(logits, (points / 4).long().tolist(), strict=True):
        mask[:, y, x] = 9.0
    iou = 0.8 - (points - torch.tensor([30.0, 100.0])).norm(dim=1) / 1000
    drawn = Drawn(logits, torch.stack([iou, iou / 2, iou / 3], dim=1))
    found, estimate = search(drawn, 12, (256, 128))
    assert [len(coords) for coords in drawn.passes] == [64, 64, 16]
    assert torch.allclose(torch.cat(drawn.passes), points)
    best = min(points.tolist(), key=lambda p: math.dist(p, (30, 100)))
    assert (found > 0).nonzero().tolist() == [[int(best[1] / 4), int(best[0] / 4)]]
    assert float(estimate) == pytest.approx(0.8 - math.dist(best, (30, 100)) / 1000)


@pytest.mark.parametrize("seed", range(4))
def test_points_without_a_chance_are_left_out_and_change_nothing(seed: int) -> None:
    """Against the best of all masks, whose estimates and stabilities have nothing in common."""
    rng = torch.Generator().manual_seed(seed)
    noise = torch.randn(100, 3, 16, 16, generator=rng) * torch.rand(100, 3, 1, 1, generator=rng) * 9
    logits = torch.nn.functional.interpolate(noise, scale_factor=4, mode="nearest")
    logits[:, :, :8] = -9  # none reaches all four sides
    iou = torch.rand(100, 3, generator=rng) ** 0.3
    drawn = Drawn(logits, iou)
    found, estimate = search(drawn, 10, (256, 200))
    rank = rank_masks(logits.flatten(0, 1)[:, :, :50], iou.flatten())
    assert (highest_rank(iou.flatten()) >= rank).all()
    best = int(rank.argmax())
    assert torch.equal(found, logits.flatten(0, 1)[best])
    assert estimate == iou.flatten()[best]
    assert 16 <= len(drawn.made) == len(set(drawn.made)) < 100


def test_nothing_found_is_background_at_even_odds() -> None:
    drawn = Drawn(torch.full((4, 3, 64, 64), 9.0), torch.ones(4, 3))
    labels = teacher(PointGrid(2, decoder=drawn)).label([scene(disc(50, 80, 25, 40, 9))], 32)
    assert not labels.masks.any()
    assert set(np.unique(labels.confidences)) <= {127, 128}  # one half of 255
    assert labels.predicted_iou.tolist() == [0]


def test_estimates_that_are_not_finite_are_no_background() -> None:
    """They would be the label of an image in which SAM finds nothing."""
    drawn = Drawn(torch.full((4, 3, 64, 64), 9.0), torch.full((4, 3), torch.nan))
    labels = teacher(PointGrid(2, decoder=drawn)).label([scene(disc(50, 80, 25, 40, 9))], 32)
    assert np.isnan(labels.predicted_iou).all()  # which stage one refuses


@torch.inference_mode()
@pytest.mark.parametrize("size_hw", [(16, 16), (12, 16)], ids=["square", "content"])
def test_many_prompts_of_one_image_decode_as_pairs_do(size_hw: tuple[int, int]) -> None:
    """Against the decoder with the image repeated for each prompt."""
    sam = build_base(SamConfig(), num_classes=MULTIMASK).eval()
    rng = torch.Generator().manual_seed(2)
    embedding = torch.randn(64, *size_hw, generator=rng)
    points = torch.rand(5, 1, 2, generator=rng) * 16 * min(size_hw)
    labels = torch.ones(5, 1)
    sparse, _ = sam.prompt_encoder(points=(points, labels), boxes=None, masks=None)
    repeated = embedding.expand(5, -1, -1, -1)
    expected, iou = decode_masks(sam, repeated, sparse, no_mask(sam, repeated))
    decoder = PointDecoder(sam, embedding)
    prompted = decoder.prompt(points)
    assert torch.allclose(prompted.iou, iou[:, 1:], atol=1e-5)
    chosen = torch.tensor([4, 0, 2])
    found = decoder.masks(prompted, chosen)
    assert expected.abs().max() > 5
    assert torch.allclose(found, expected[chosen, 1:], atol=1e-4)
    assert not torch.allclose(found[0], found[1], atol=1)


@torch.no_grad()
def test_half_precision_gives_nearly_the_same_masks() -> None:
    """The encoder computes in bfloat16; the positions of prompts stay in float32."""
    images = [scene(disc(120, 120, 60, 60, 30)), scene(disc(60, 120, 30, 60, 25))]
    full, half = (
        teacher(PointGrid(2), precision).label(images, 64) for precision in ("fp32", "bf16")
    )
    assert (full.masks == half.masks).mean() > 0.97
    assert full.masks[0].any()


# --------------------------------------------------------------------------- the stages


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        (
            {"sam": {"prompt": "points", "variant": "timm:resnet18"}},
            "'points', but timm:resnet18 was never trained with prompts; only vit_* and mobile_sam "
            "were",
        ),
        (
            {"sam": {"prompt": "points"}, "data": {"num_classes": 3}},
            "'points', but a prompt's mask has one class, data.num_classes is 3",
        ),
    ],
)
def test_who_cannot_be_prompted(tmp_path: Path, sections: dict[str, Any], why: str) -> None:
    config = tiny_config(tmp_path / "images", tmp_path / "cache", **sections)
    with pytest.raises(ConfigError) as caught:
        finetune(config)
    assert str(caught.value) == f"sam.prompt: found {why}; set it to none"
    assert not (tmp_path / "cache").exists()


def test_the_box_prompt_was_removed() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"sam": {"prompt": "box"}}, source="params.yaml")
    line = str(caught.value)
    assert line.startswith("params.yaml: sam.prompt: found 'box', ")
    assert "the box prompt was removed" in line
    assert "use none (adapted), or points" in line


def settings(images: Path, cache: Path, prompt: str, **sam: object) -> Config:
    sam = {"prompt": prompt, "points_per_side": 3, "device": "cpu"} | sam
    return tiny_config(images, cache, sam=sam, precompute={"device": "cpu"})


@pytest.fixture(scope="module")
def labelled(tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that was labelled with points."""
    cache = tmp_path_factory.mktemp("prompts") / "cache"
    prepare(settings(tiny_images, cache, "none"))
    config = settings(tiny_images, cache, "points")
    card = finetune(config)
    assert card == load_card(cache / "teacher")
    assert precompute(config, clients=["site_a"]).failed == []
    return cache


def test_points_need_no_training(labelled: Path, tiny_images: Path) -> None:
    card = load_card(labelled / "teacher")
    assert sorted(path.name for path in (labelled / "teacher").iterdir()) == ["card.json"]
    assert (card.prompt, card.adapter_sha256) == ("points:3", "none")
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


@pytest.mark.parametrize(
    ("prompt", "per_side", "wanted"),
    [("none", 3, "none"), ("points", 4, "points:4")],
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
