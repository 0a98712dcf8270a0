"""Images to the teacher's device and labels back, and what float32 means there."""

from __future__ import annotations

import pipeline.sam  # noqa: F401  (before segment_anything imports torchvision)

# isort: split
import os

import numpy as np
import pytest
import torch
from teachers import make_card

from pipeline.cores import usable_cores
from pipeline.sam.build import build_sam
from pipeline.sam.device import Download, Image, Upload, page_locked, plain_float32
from pipeline.sam.frame import to_input_frame
from pipeline.sam.teacher import Teacher
from pipeline.stores.pseudo_labels import PseudoLabels

CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)
DEVICES = ["cpu", CUDA]


def images() -> list[Image]:
    """Return images of several shapes; the last one cannot be written to, as Pillow's."""
    rng = np.random.default_rng(0)
    shapes = ((64, 64), (48, 64), (64, 30), (90, 200))
    found = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    found[-1].flags.writeable = False
    return found


def teacher_on(device: str) -> Teacher:
    torch.manual_seed(0)
    sam = build_sam("timm:resnet10t", input_size=64, num_multimask=1)
    card = make_card(variant="timm:resnet10t")
    return Teacher(sam, card, device=device, precision="fp32")


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_is_the_same_on_every_device(device: str) -> None:
    pixels, valid_hw = Upload(torch.device(device))(images(), 64)
    expected, sizes = to_input_frame(images(), 64)
    assert pixels.device.type == valid_hw.device.type == device
    assert torch.equal(pixels.cpu(), expected)
    assert torch.equal(valid_hw.cpu(), sizes)


@pytest.mark.parametrize("device", DEVICES)
def test_labels_come_back_as_they_are(device: str) -> None:
    masks = torch.arange(8, dtype=torch.uint8, device=device).view(2, 2, 2)
    found = Download(
        {"masks": masks, "confidences": masks + 1, "predicted_iou": masks[:, 0, 0].float()},
        images=(),
    )
    labels = found.result()
    assert found.done()
    assert np.array_equal(labels.masks, np.arange(8).reshape(2, 2, 2))
    assert np.array_equal(labels.confidences, np.arange(1, 9).reshape(2, 2, 2))
    assert labels.predicted_iou.tolist() == [0.0, 4.0]


@pytest.mark.parametrize("device", DEVICES)
def test_staged_images_give_the_same_labels(device: str) -> None:
    teacher = teacher_on(device)
    plain: PseudoLabels = teacher.label(images(), 32)
    staged = teacher.begin([teacher.staged(image) for image in images()], 32).result()
    for name in ("masks", "confidences", "predicted_iou"):
        assert getattr(staged, name).tobytes() == getattr(plain, name).tobytes()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_staged_image_is_page_locked() -> None:
    (image, *_) = images()
    staged = page_locked(image)
    assert torch.from_numpy(staged).is_pinned()
    assert np.array_equal(staged, image)


def test_float32_is_no_tf32() -> None:
    """Neither while the teacher computes nor longer: other work in the process keeps its flags."""

    def flags() -> tuple[bool, bool]:
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    seen, before, teacher = [], flags(), teacher_on("cpu")
    teacher.sam.image_encoder.register_forward_hook(lambda *_: seen.append(flags()))
    teacher.label(images(), 32)
    assert before[0]  # torch's own default for convolutions
    assert (seen, flags()) == ([(False, False)], before)
    with pytest.raises(ZeroDivisionError), plain_float32():
        _ = 1 / 0
    assert flags() == before


def test_cores_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 2, 5}, raising=False)
    assert usable_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert usable_cores() == 7
