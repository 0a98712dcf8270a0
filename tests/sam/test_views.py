"""Flips and quarter turns of an image: seen by the teacher, put back exactly, and averaged."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pipeline.sam  # noqa: F401  (before segment_anything imports torchvision)

# isort: split
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from teachers import make_card
from torch import Tensor

from pipeline.config import PrecomputeConfig
from pipeline.errors import ConfigError, SamfedError
from pipeline.labelling.backoff import MemoryAwareTeacher
from pipeline.params import load_config
from pipeline.sam.build import build_sam
from pipeline.sam.frame import to_input_frame
from pipeline.sam.prompts import check_views
from pipeline.sam.teacher import Teacher
from pipeline.sam.views import VIEWS, View, foreground_dice, mean_of_views, seen_as, seen_back
from pipeline.segmentation.metrics import dice_score

Image = NDArray[np.uint8]
SIDE = 64


def noise(height: int, width: int, seed: int = 0) -> Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    rows, cols = np.arange(height) * 4 // height, np.arange(width) * 4 // width
    return coarse[rows[:, None], cols]


def turned(image: Image, view: View) -> Image:
    """Do to the file what a view does to the frame."""
    image = image.transpose(1, 0, 2) if view.transposed else image
    image = image[::-1] if view.upside_down else image
    return np.ascontiguousarray(image[:, ::-1] if view.mirrored else image)


def teacher(frame: str = "pad", **settings: object) -> Teacher:
    """A teacher of two classes that knows up from down and left from right."""
    torch.manual_seed(3)
    sam = build_sam("timm:test_resnet", input_size=SIDE, num_multimask=2)
    for parameter in sam.mask_decoder.parameters():
        parameter.data *= 3  # so that every class wins somewhere
    card = make_card(variant="timm:test_resnet", num_classes=2, frame=frame, input_size=SIDE)
    run = PrecomputeConfig.model_validate({"device": "cpu", "precision": "fp32", **settings})
    return Teacher(sam, card, device="cpu", precision="fp32").tune(run)


# --------------------------------------------------------------------------- the views


def test_the_views_are_the_eight_symmetries_of_a_square_flips_first() -> None:
    square = torch.arange(9).view(3, 3)
    found = [seen_back(view, square) for view in VIEWS]
    expected = [torch.rot90(each, turns) for each in (square, square.T) for turns in range(4)]
    assert torch.equal(found[0], square)
    assert torch.equal(found[1], square.flip(1))
    assert {tuple(each.flatten().tolist()) for each in found[:4]} == {
        tuple(each.flatten().tolist())
        for each in (square, square.flip(0), square.flip(1), square.flip(0, 1))
    }
    assert {tuple(each.flatten().tolist()) for each in found} == {
        tuple(each.flatten().tolist()) for each in expected
    }


@pytest.mark.parametrize("view", VIEWS, ids=str)
@pytest.mark.parametrize("patch", [None, 16], ids=["pad", "content"])
def test_a_view_is_the_frame_of_the_turned_file(view: View, patch: int | None) -> None:
    images = [noise(48, 64), noise(41, 64, 1)]  # of one frame either way, the second one padded
    frame = to_input_frame(images, SIDE, patch)
    pixels, valid_hw = seen_as(view, *frame)
    expected, sizes = to_input_frame([turned(image, view) for image in images], SIDE, patch)
    assert torch.equal(pixels, expected)
    assert torch.equal(valid_hw, sizes)


@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_a_map_of_a_view_goes_back_where_it_came_from(view: View) -> None:
    image = noise(48, 64)
    back = seen_back(view, torch.from_numpy(turned(image, view)).permute(2, 0, 1))
    assert torch.equal(back, torch.from_numpy(image).permute(2, 0, 1))


# --------------------------------------------------------------------------- their mean


def test_a_mean_by_hand() -> None:
    """The network sees the left half of whatever it is shown, surely, and the right one not."""

    def network(
        pixels: Tensor, valid_hw: Tensor, size_hw: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        seen.append((tuple(pixels.shape[-2:]), size_hw))
        foreground = torch.zeros(1, *size_hw)
        foreground[:, :, : size_hw[1] // 2] = 0.75
        return torch.stack([1 - foreground, foreground], dim=1), torch.full((1, 2), len(seen) / 8)

    seen: list[object] = []
    pixels, valid_hw = torch.zeros(1, 3, 16, 32, dtype=torch.uint8), torch.tensor([[16, 32]])
    one = mean_of_views(network, pixels, valid_hw, (2, 4), views=1)
    assert one.probabilities[0, 1].tolist() == [[0.75, 0.75, 0, 0]] * 2
    assert one.agreement.isnan().all()
    assert one.flip_dice.isnan().all()
    seen.clear()
    two = mean_of_views(network, pixels, valid_hw, (2, 4), views=2)
    assert two.probabilities[0, 1].tolist() == [[0.375] * 4] * 2  # background everywhere
    assert (two.agreement.tolist(), two.flip_dice.tolist()) == ([0.0], [0.0])
    assert two.iou.tolist() == [[3 / 16] * 2]
    seen.clear()
    eight = mean_of_views(network, pixels, valid_hw, (2, 4), views=8)
    assert eight.probabilities[0, 1].tolist() == [[0.375] * 4] * 2
    assert seen == [((16, 32), (2, 4))] * 4 + [((32, 16), (4, 2))] * 4


def test_dice_of_pairs_is_the_metrics() -> None:
    masks = np.random.default_rng(0).integers(0, 3, (6, 2, 5, 5), dtype=np.uint8)
    masks[0] = 0
    masks[1, 0], masks[2][masks[2] == 2] = 0, 0
    expected = [dice_score(*pair, num_classes=2) for pair in masks]
    one, other = torch.from_numpy(masks).unbind(1)
    found = foreground_dice(one, other, 2)
    assert found.tolist() == pytest.approx(expected)
    assert expected[0] == 1
    assert expected[1] == 0


@pytest.mark.parametrize(
    ("views", "frame", "size_hw"),
    [
        (2, "pad", (16, 16)),
        (4, "content", (16, 16)),
        (8, "pad", (16, 24)),
        (8, "content", (16, 16)),
    ],
)
def test_labels_turn_with_their_image(views: int, frame: str, size_hw: tuple[int, int]) -> None:
    """The mean over a group is the same whichever of its members the file is."""
    labeller = teacher(frame, views=views)
    image = noise(45, 64)
    expected, iou = labeller.probabilities([image], size_hw)
    plain, _ = teacher(frame).probabilities([image], size_hw)
    assert not torch.allclose(plain, expected, atol=1e-3)
    for view in VIEWS[:views]:
        asked = size_hw[::-1] if view.transposed else size_hw
        found, score = labeller.probabilities([turned(image, view)], asked)
        assert torch.allclose(seen_back(view, found), expected, atol=1e-5)
        assert torch.allclose(score, iou, atol=1e-5)


def test_images_of_several_frames_keep_their_places() -> None:
    labeller = teacher("content", views=8, probabilities=True)
    images = [noise(48, 64), noise(64, 40, 1), noise(48, 64, 2)]
    together = labeller.label(images, 16)
    for row, image in enumerate(images):
        alone = labeller.label([image], 16)
        for name, value in vars(alone).items():
            gap = np.abs(getattr(together, name)[row].astype(float) - value[0].astype(float))
            assert gap.max() <= 1.01 * (value.dtype == np.uint8) + 1e-4, name


def test_what_labels_of_views_hold() -> None:
    labeller = teacher(views=4, probabilities=True)
    images = [noise(64, 64, seed) for seed in range(3)]
    labels = labeller.label(images, 16)
    assert labels.probabilities is not None
    assert labels.probabilities.shape == (3, 3, 16, 16)
    assert np.array_equal(labels.probabilities.max(axis=1), labels.confidences)
    shown = np.take_along_axis(labels.probabilities, labels.masks[:, None].astype(int), 1)[:, 0]
    assert np.array_equal(shown, labels.confidences)
    assert labels.view_agreement is not None
    assert labels.flip_dice is not None
    one, views = teacher(), VIEWS[:4]
    masks = [one.label([turned(image, view) for image in images], 16).masks for view in views]
    back = [
        seen_back(view, torch.from_numpy(mask)).numpy()
        for view, mask in zip(views, masks, strict=True)
    ]
    for row in range(3):
        dice = [dice_score(mask[row], labels.masks[row], num_classes=2) for mask in back]
        assert labels.view_agreement[row] == pytest.approx(np.mean(dice), abs=1e-6)
        flat = [(mask[row] > 0).astype(np.uint8) for mask in back[:2]]
        assert labels.flip_dice[row] == pytest.approx(dice_score(*flat, num_classes=1), abs=1e-6)
    plain = teacher(probabilities=False).label(images, 16)
    assert (plain.view_agreement, plain.flip_dice, plain.probabilities) == (None, None, None)


# --------------------------------------------------------------------------- memory, prompts


def test_batches_shrink_under_views_too() -> None:
    """Views are passes of their own: memory that suffices for one suffices for all."""
    labeller, sizes = teacher(views=4), list[int]()
    images = [noise(64, 64, seed) for seed in range(4)]
    expected = labeller.label(images, 16)

    def hungry(module: object, given: Sequence[Tensor]) -> None:
        sizes.append(len(given[0]))
        if len(given[0]) > 2 or (len(sizes) == 7 and len(given[0]) == 2):
            raise torch.OutOfMemoryError("out of memory")

    labeller.sam.image_encoder.register_forward_pre_hook(hungry)
    patient = MemoryAwareTeacher(labeller, 4)
    found = patient.label(images, 16)
    assert sizes == [4, 2, 2, 2, 2, 2, 2] + [1] * 16  # the seventh ran out in a view of its own
    assert patient.provenance()["batch_size"] == "1"
    assert (found.masks != expected.masks).mean() < 0.01
    assert found.view_agreement is not None
    assert expected.view_agreement is not None
    assert np.allclose(found.view_agreement, expected.view_agreement, atol=0.05)
    labeller.sam.image_encoder.register_forward_pre_hook(lambda *_: hungry(None, [torch.zeros(3)]))
    with pytest.raises(SamfedError, match="memory does not suffice for one image"):
        patient.label(images[:1], 16)


def test_a_prompted_teacher_has_one_view() -> None:
    for views, prompt in product((1, 2), ("none", "points")):
        config = load_config(None, (f"precompute.views={views}", f"sam.prompt={prompt}"))
        if (views, prompt) != (2, "points"):
            check_views(config)
            continue
        with pytest.raises(ConfigError) as caught:
            check_views(config)
        assert str(caught.value) == (
            "precompute.views: found 2, but sam.prompt 'points' picks one mask of each view, "
            "perhaps of another object; set precompute.views to 1"
        )
