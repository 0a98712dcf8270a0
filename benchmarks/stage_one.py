"""Stage one against segment-anything as a user would call it: same images, weights and machine.

    python benchmarks/stage_one.py --variant vit_b --images 4 [--onnx] [--json]
    python benchmarks/stage_one.py --teachers --variant vit_b mobile_sam timm:resnet18@256

Several teachers, some with a ``sam.input_size`` behind an @, are set side by side at the end;
``--teachers`` measures nothing else.

Contenders, each in a process of its own: (a) a loop over ``SamPredictor`` in float32, (b) the same
under bfloat16 autocast, (c) samfed in torch, from image files to a finished label store, (d) samfed
in ONNX Runtime, (e) as (c) in int8, where the CPU has VNNI. Weights are random (speed does not
depend on them; masks would say nothing).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pipeline.sam  # noqa: F401  (before segment_anything imports torchvision)

# isort: split
import numpy as np
import safetensors.torch
import torch
from ceilings import measure_ceilings, synchronise
from PIL import Image
from segment_anything import SamPredictor
from segment_anything.modeling import Sam
from segment_anything.modeling.image_encoder import Attention
from stage_one_report import compare, show, show_teachers
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import Config
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
from pipeline.sam.frame import inside_image, to_client_frame, to_input_frame
from pipeline.sam.onnx import OUTPUTS, OnnxTeacher
from pipeline.stores.label_store import LabelStore, RowKey
from pipeline.stores.teacher_card import TeacherCard

STOCK = ("predictor_fp32", "predictor_bf16")
LABEL_SIZE = 256
IMAGE_HW = (900, 1200)


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
    (folder / "images").mkdir()
    for i in range(images):
        small = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize(IMAGE_HW[::-1], Image.Resampling.BICUBIC)
        picture.save(folder / "images" / f"{i:04d}.jpg", quality=92)


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
        block.attn = attention
    return sam.eval().requires_grad_(False)


def peak_mib(device: torch.device) -> float:
    """On a GPU what torch held at most, else the process's largest resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# --------------------------------------------------------------------------- (a), (b)


def run_predictor(folder: Path, options: argparse.Namespace, *, autocast: bool) -> dict[str, Any]:
    device = resolve_device(options.device)
    sam = load_sam(folder, options.variant, stock=True).to(device)
    predictor = SamPredictor(sam)
    files = sorted((folder / "images").iterdir())

    def predict(file: Path) -> np.ndarray[Any, Any]:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            predictor.set_image(np.asarray(Image.open(file).convert("RGB")))
        predictor.features = predictor.features.float()  # NumPy, its output, has no bfloat16
        masks, _, logits = predictor.predict(multimask_output=True)
        synchronise(device)
        assert len(masks) == 3
        return np.asarray(logits)

    logits = [predict(files[0])]  # warm
    began, busy = time.perf_counter(), time.process_time()
    logits += [predict(file) for file in files[1:]]
    wall, busy = time.perf_counter() - began, time.process_time() - busy
    np.save(folder / f"{options.child}.npy", np.stack(logits[:2]))
    count = len(files) - 1
    result = {
        "images_per_s": count / wall,
        "cpu_s_per_image": busy / count,
        "peak_mib": peak_mib(device),
    }
    if not autocast:
        size = sam.image_encoder.img_size
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            sam.image_encoder(torch.zeros(1, 3, size, size, device=device))
        result["flop_per_image"] = counter.get_total_flops()
    return result


# --------------------------------------------------------------------------- (c), (d)


def make_card(variant: str, input_size: int) -> TeacherCard:
    return TeacherCard(
        variant=variant.partition("@")[0],
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
    """Seconds from image files to a finished label store, and what they are an image."""
    keys = [RowKey(file.stem, file_sha256(file)) for file in files]
    identity = teacher.card.identity(label_size=LABEL_SIZE, precision=config.precompute.precision)
    nothing = ServerPart(train=(), calibration=())
    partition = Partition(scheme="iid", seed=0, server=nothing, clients={}, images={})
    job = Job(config, partition, identity)
    store = LabelStore.create(job.path("client"), identity, keys)
    tasks = []
    for chunk in store.pending():
        rows = tuple(store.chunk_rows(chunk))
        named = tuple((f"images/{files[row].name}", keys[row].sha256) for row in rows)
        tasks.append(ChunkTask("client", chunk, rows, named))
    began, busy = time.perf_counter(), time.process_time()
    for result in label_chunks(job, teacher, tasks):
        store.mark_done(result.task.chunk, result.rows, result.provenance)
    wall, busy = time.perf_counter() - began, time.process_time() - busy
    return wall, {"images_per_s": len(files) / wall, "cpu_s_per_image": busy / len(files)}


def run_torch(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    device = resolve_device(options.device)
    sam = load_sam(folder, options.variant, stock=False)
    card = make_card(options.variant, sam.image_encoder.img_size)
    teacher = teaching.Teacher(sam, card, device=options.device, precision=options.precision)
    files = sorted((folder / "images").iterdir())
    first = [np.asarray(Image.open(file).convert("RGB")) for file in files[:2]]
    with torch.inference_mode():
        pixels, valid_hw = (part.to(device) for part in to_input_frame(first, card.input_size))
        inside = inside_image(valid_hw, pixels.shape[-2:])
        parts = [
            teaching.forward(teacher.sam, pixels[i : i + 1], inside[i : i + 1], dtype=teacher.dtype)
            for i in range(2)
        ]
    logits = torch.cat([part[:, 1:].cpu() for part, _ in parts])
    np.save(folder / f"{options.child}.npy", logits.numpy())
    config = settings(folder, options)
    teacher.label(first[:1] * options.batch_size, LABEL_SIZE)  # warm, at the size that is timed
    with timed(teaching, "forward", device) as network:
        wall, speed = label_all(config, teacher, files)
    return {
        **speed,
        "peak_mib": peak_mib(device),
        "precision": teacher.precision,
        "outside_network": 1 - sum(network) / wall,
    }


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
    teacher = OnnxTeacher(
        folder / "teacher.onnx",
        make_card(options.variant, size),
        label_size=LABEL_SIZE,
        device=options.device,
        precision="auto",
    )
    files = sorted((folder / "images").iterdir())
    first = [np.asarray(Image.open(file).convert("RGB")) for file in files[:2]]
    parts = []
    for image in first:
        pixels, valid_hw = to_input_frame([image], size)
        feed = {"pixels": pixels.permute(0, 2, 3, 1).numpy(), "valid_hw": valid_hw.numpy()}
        parts.append(teacher.session.run(["logits"], feed)[0][:, 1:])
    np.save(folder / f"{options.child}.npy", np.concatenate(parts))
    teacher.label(first[:1] * options.batch_size, LABEL_SIZE)  # warm, at the size that is timed
    with timed(teacher, "run", torch.device("cpu")) as network:  # which waits for its outputs
        wall, speed = label_all(settings(folder, options), teacher, files)
    return {
        **speed,
        "peak_mib": peak_mib(torch.device("cpu")),
        "precision": teacher.precision,
        "provider": teacher.provenance()["provider"],
        "outside_network": 1 - sum(network) / wall,
    }


# --------------------------------------------------------------------------- the run


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", nargs="+", default=["vit_b"], metavar="VARIANT[@SIZE]")
    parser.add_argument("--images", type=int, default=5, help="at least 3")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--onnx", action="store_true", help="also (d); the export takes minutes")
    parser.add_argument("--teachers", action="store_true", help="(c) alone, for each variant")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_child(options: argparse.Namespace) -> dict[str, Any]:
    if options.child == "samfed_int8":
        options.precision = "int8"
        return run_torch(options.folder, options)
    runs = {"samfed_torch": run_torch, "export": export_model, "samfed_onnx": run_onnx}
    if options.child in runs:
        return runs[options.child](options.folder, options)
    return run_predictor(options.folder, options, autocast=options.child == "predictor_bf16")


def measure(options: argparse.Namespace, teacher: str) -> dict[str, dict[str, Any]]:
    """Run every contender with this teacher, each in a process of its own."""
    results: dict[str, dict[str, Any]] = {}
    children = ["samfed_torch"] if options.teachers else [*STOCK, "samfed_torch"]
    children += ["samfed_int8"] if "int8" in options.ceilings and "timm:" not in teacher else []
    children += ["export", "samfed_onnx"] if options.onnx else []
    with tempfile.TemporaryDirectory() as name:
        make_inputs(Path(name), teacher, options.images)
        for child in children:
            more = ["--variant", teacher, "--child", child, "--folder", name]
            command = [sys.executable, *sys.argv, *more]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ)
            if child != "export":
                results[child] = json.loads(done.stdout)
        if not options.teachers:
            compare(Path(name), results, options.ceilings)
    return results


def main() -> None:
    options = arguments()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.child:
        (options.variant,) = options.variant
        print(json.dumps(run_child(options)))
        return
    device = resolve_device(options.device)
    ceilings = options.ceilings = {} if options.teachers else measure_ceilings(device)
    results = {teacher: measure(options, teacher) for teacher in options.variant}
    if options.json:
        report = {"device": str(device), "ceilings_flop_per_s": ceilings, "results": results}
        print(json.dumps(report, indent=1))
        return
    if not options.teachers:
        show(results, ceilings)
    show_teachers({teacher: of["samfed_torch"] for teacher, of in results.items()})


if __name__ == "__main__":
    main()
