"""The contenders of ``stage_one.py``: what each does in its own process, timed from inside."""

from __future__ import annotations

import argparse
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pipeline.sam  # noqa: F401  (before segment_anything imports torchvision)

# isort: split
import numpy as np
import psutil
import safetensors.torch
import torch
from ceilings import synchronise
from numpy.typing import NDArray
from PIL import Image
from segment_anything import SamPredictor
from segment_anything.modeling import Sam
from segment_anything.modeling.image_encoder import Attention
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import Config, Frame
from pipeline.data.partition import Partition, ServerPart
from pipeline.disk import file_sha256
from pipeline.labelling.backoff import TeacherBackend
from pipeline.labelling.job import Job
from pipeline.labelling.worker import ChunkTask, label_chunks
from pipeline.params import parse_config
from pipeline.runtime import resolve_device
from pipeline.sam import teacher as teaching
from pipeline.sam.build import build_sam
from pipeline.sam.export import EXTERNAL_ABOVE, TeacherNetwork, about_model, trace, write_model
from pipeline.sam.frame import (
    fitted_hw,
    frame_hw,
    frame_patch,
    inside_image,
    to_client_frame,
    to_input_frame,
)
from pipeline.sam.onnx import OUTPUTS, OnnxTeacher
from pipeline.stores.label_store import LabelStore, RowKey
from pipeline.stores.teacher_card import TeacherCard

LABEL_SIZE = 256
STOCK_IMAGES = 2  # timed in each round, after one to warm up
IMAGE_HW = {"4:3": (900, 1200), "squares": (1200, 1200)}


# --------------------------------------------------------------------------- what all share


def build(teacher: str) -> Sam:
    """Return the SAM of ``variant`` or ``variant@input_size``."""
    variant, _, size = teacher.partition("@")
    return build_sam(variant, input_size=int(size) if size else None)


def make_inputs(folder: Path, variant: str, images: int) -> None:
    """Random weights, and photographs of nothing: smooth noise, as JPEG files."""
    torch.manual_seed(0)
    sam = build(variant)
    for name, parameter in sam.named_parameters():
        if "rel_pos" in name or "pos_embed" in name:  # zero at first, which would flatter
            torch.nn.init.normal_(parameter, std=0.1)
    state = {name: value.contiguous() for name, value in sam.state_dict().items()}
    safetensors.torch.save_file(state, folder / "sam.safetensors")
    rng = np.random.default_rng(0)
    for shape, image_hw in IMAGE_HW.items():
        (folder / shape).mkdir()
        for i in range(images):
            small = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
            picture = Image.fromarray(small).resize(image_hw[::-1], Image.Resampling.BICUBIC)
            picture.save(folder / shape / f"{i:04d}.jpg", quality=92)


def load_sam(folder: Path, variant: str, *, stock: bool) -> Sam:
    """Return the benchmark's SAM; with segment-anything's own attention where ``stock``."""
    sam = build(variant)
    sam.load_state_dict(safetensors.torch.load_file(folder / "sam.safetensors"))
    for block in getattr(sam.image_encoder, "blocks", ()) if stock else ():
        folded = block.attn
        attention = Attention(folded.qkv.in_features, folded.num_heads, use_rel_pos=False)
        attention.use_rel_pos = True
        for name in ("qkv", "proj", "rel_pos_h", "rel_pos_w"):
            setattr(attention, name, getattr(folded, name))
        block.attn, block.window_size = attention, folded.window_size
    return sam.eval().requires_grad_(False)


def peak_mib(device: torch.device) -> float:
    """On a GPU what torch held at most, else the process's largest resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# --------------------------------------------------------------------------- (a), (b)


def run_predictor(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    device = resolve_device(options.device)
    predictor = SamPredictor(load_sam(folder, options.variant, stock=True).to(device))
    files = options.files[: STOCK_IMAGES + 1]

    def predict(file: Path, *, autocast: bool) -> NDArray[Any]:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            predictor.set_image(np.asarray(Image.open(file).convert("RGB")))
        predictor.features = predictor.features.float()  # NumPy, its output, has no bfloat16
        masks, _, logits = predictor.predict(multimask_output=True)
        synchronise(device)
        assert len(masks) == 3
        return np.asarray(logits)

    narrow = options.contender.precision == "bf16"
    logits = predict(files[0], autocast=narrow)  # warm
    began, busy = time.perf_counter(), time.process_time()
    for file in files[1:]:
        predict(file, autocast=narrow)
    wall, busy = time.perf_counter() - began, time.process_time() - busy
    result = {
        "images_per_s": STOCK_IMAGES / wall,
        "cpu_s_per_image": busy / STOCK_IMAGES,
        "peak_mib": peak_mib(device),
        "precision": options.contender.precision,
    }
    if options.first:
        exact = predict(files[0], autocast=False) if narrow else logits
        result["relative_error"] = relative_error(logits, exact)
        side = predictor.model.image_encoder.img_size
        result["flop_per_image"] = encoder_flop(folder, options.variant, (side, side))
    return result


def relative_error(found: NDArray[Any], exact: NDArray[Any]) -> float:
    found, exact = found.astype(np.float64), exact.astype(np.float64)
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def encoder_flop(folder: Path, variant: str, frame_hw: tuple[int, int]) -> int:
    """Return what segment-anything's own encoder multiplies and adds for an image.

    It is the same for all contenders, whatever they save or spend, so that shares of the ceiling
    compare like with like. (Products that are written in place would not be counted at all.)
    """
    encoder = load_sam(folder, variant, stock=True).image_encoder
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        encoder(torch.zeros(1, 3, *frame_hw))
    return int(counter.get_total_flops())


# --------------------------------------------------------------------------- samfed


def make_card(variant: str, input_size: int, frame: Frame = "pad") -> TeacherCard:
    return TeacherCard(
        variant=variant.partition("@")[0],
        frame=frame,
        input_size=input_size,
        num_classes=3,
        prompt="none",
        lora_rank=None,
        base_sha256="random",
        adapter_sha256="0" * 64,
        parameters=0,
        trained_parameters=0,
        server_sha256="0" * 64,
        train_images=0,
        calibration_images=0,
        calibration_dice=0.0,
        seed=0,
    )


def settings(folder: Path, options: argparse.Namespace) -> Config:
    raw = {
        "data": {"root": str(folder), "num_classes": 3, "image_size": LABEL_SIZE},
        "cache": {"root": str(folder / "cache")},
        "precompute": {"batch_size": options.batch_size, "device": options.device},
    }
    return parse_config(raw, source="benchmark")


@contextmanager
def timed(owner: Any, name: str, device: torch.device) -> Iterator[list[float]]:
    """Seconds of each call of ``owner.name``."""
    inner: Callable[..., Any] = getattr(owner, name)
    seconds: list[float] = []

    def outer(*args: Any, **kwargs: Any) -> Any:
        synchronise(device)
        began = time.perf_counter()
        result = inner(*args, **kwargs)
        synchronise(device)
        seconds.append(time.perf_counter() - began)
        return result

    setattr(owner, name, outer)
    try:
        yield seconds
    finally:
        setattr(owner, name, inner)


def label_all(
    config: Config, teacher: TeacherBackend, files: list[Path]
) -> tuple[float, dict[str, float]]:
    """Return seconds from image files to a finished label store, and what they are an image."""
    keys = [RowKey(file.stem, file_sha256(file)) for file in files]
    identity = teacher.card.identity(label_size=LABEL_SIZE, precision=config.precompute.precision)
    nothing = ServerPart(train=(), calibration=())
    partition = Partition(scheme="iid", seed=0, server=nothing, clients={}, images={})
    job = Job(config, partition, identity)
    owner = f"client{os.getpid()}"  # two workers have a store each
    store = LabelStore.create(job.path(owner), identity, keys)
    tasks = []
    for chunk in store.pending():
        rows = tuple(store.chunk_rows(chunk))
        named = tuple((str(files[row]), keys[row].sha256) for row in rows)
        tasks.append(ChunkTask(owner, chunk, rows, named))
    began, busy = time.perf_counter(), time.process_time()
    for result in label_chunks(job, teacher, tasks):
        store.mark_done(result.task.chunk, result.rows, result.provenance)
    wall, busy = time.perf_counter() - began, time.process_time() - busy
    return wall, {"images_per_s": len(files) / wall, "cpu_s_per_image": busy / len(files)}


def run_torch(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    device = resolve_device(options.device)
    contender = options.contender
    precision = options.precision if contender.precision == "auto" else contender.precision
    sam = load_sam(folder, options.variant, stock=False).to(device)
    card = make_card(options.variant, sam.image_encoder.img_size, contender.frame)
    image = np.asarray(Image.open(options.files[0]).convert("RGB"))
    result: dict[str, Any] = {}
    if options.first:
        exact = logits_of(sam, image, card, dtype=torch.float32)
        result["flop_per_image"] = encoder_flop(folder, options.variant, frame_of(image, card))
    teacher = teaching.Teacher(sam, card, device=options.device, precision=precision)
    if options.first:
        found = logits_of(teacher.sam, image, card, dtype=teacher.dtype)
        result["relative_error"] = relative_error(found, exact)
    teacher.label([image] * options.batch_size, LABEL_SIZE)  # warm, at the size that is timed
    wait_for_others(folder, options)
    before = resident_mib()
    with timed(teaching, "forward", device) as network:
        wall, speed = label_all(settings(folder, options), teacher, options.files)
    return {
        **result,
        **speed,
        "peak_mib": peak_mib(device),
        "grown_mib": resident_mib() - before,
        "precision": teacher.precision,
        "outside_network": 1 - sum(network) / wall,
    }


def frame_of(image: NDArray[np.uint8], card: TeacherCard) -> tuple[int, int]:
    side = card.input_size
    return frame_hw(fitted_hw(image, side), side, frame_patch(card))


@torch.inference_mode()
def logits_of(
    sam: Sam, image: NDArray[np.uint8], card: TeacherCard, *, dtype: torch.dtype
) -> NDArray[Any]:
    """Return the foreground's logits (1, K, h/4, w/4)."""
    pixels, valid_hw = to_input_frame([image], card.input_size, frame_patch(card))
    pixels, valid_hw = (part.to(sam.pixel_mean.device) for part in (pixels, valid_hw))
    inside = inside_image(valid_hw, pixels.shape[-2:])
    logits, _ = teaching.forward(sam, pixels, inside, dtype=dtype)
    return logits[:, 1:].cpu().numpy()


def resident_mib() -> float:
    return float(psutil.Process().memory_info().rss / 2**20)


def wait_for_others(folder: Path, options: argparse.Namespace) -> None:
    """Begin when all workers are warm: each leaves a file and waits for the others'."""
    (folder / f"{options.child}-ready-{os.getpid()}").touch()
    while len([*folder.glob(f"{options.child}-ready-*")]) < options.contender.workers:
        time.sleep(0.05)


class WithLogits(TeacherNetwork):
    """The exported network with one output more, for its error; stage one never asks for it."""

    def forward(self, pixels: Tensor, valid_hw: Tensor) -> tuple[Tensor, ...]:
        pixels = pixels.permute(0, 3, 1, 2)
        inside = inside_image(valid_hw, pixels.shape[-2:])
        logits, iou = teaching.forward(self.sam, pixels, inside)
        frame = to_client_frame(logits, valid_hw, self.size_hw)
        return *teaching.to_labels(frame, iou), logits


def export_model(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    sam = load_sam(folder, options.variant, stock=False)
    card = make_card(options.variant, sam.image_encoder.img_size)
    network = WithLogits(sam, label_size=LABEL_SIZE, fp16=False)
    graph = trace(network, input_size=card.input_size, outputs=(*OUTPUTS, "logits"))
    identity = card.identity(label_size=LABEL_SIZE, precision="fp32")
    about = about_model(graph, identity, precision="fp32")
    write_model(folder / "teacher.onnx", graph, about, external_above=EXTERNAL_ABOVE)
    return {}


def run_onnx(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    size = build(options.variant).image_encoder.img_size
    card = make_card(options.variant, size)
    teacher = OnnxTeacher(
        folder / "teacher.onnx",
        card,
        label_size=LABEL_SIZE,
        device=options.device,
        precision="auto",
    )
    image = np.asarray(Image.open(options.files[0]).convert("RGB"))
    result: dict[str, Any] = {}
    if options.first:
        sam = load_sam(folder, options.variant, stock=False)
        exact = logits_of(sam, image, card, dtype=torch.float32)
        pixels, valid_hw = to_input_frame([image], size)
        feed = {"pixels": pixels.permute(0, 2, 3, 1).numpy(), "valid_hw": valid_hw.numpy()}
        found = teacher.session.run(["logits"], feed)[0][:, 1:]
        result["relative_error"] = relative_error(found, exact)
        result["flop_per_image"] = encoder_flop(folder, options.variant, frame_of(image, card))
        del sam
    teacher.label([image] * options.batch_size, LABEL_SIZE)  # warm, at the size that is timed
    before = resident_mib()
    with timed(teacher, "run", torch.device("cpu")) as network:  # which waits for its outputs
        wall, speed = label_all(settings(folder, options), teacher, options.files)
    return {
        **result,
        **speed,
        "peak_mib": peak_mib(torch.device("cpu")),
        "grown_mib": resident_mib() - before,
        "precision": teacher.precision,
        "provider": teacher.provenance()["provider"],
        "outside_network": 1 - sum(network) / wall,
    }
