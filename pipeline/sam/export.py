"""``samfed export-onnx``: the whole adapted teacher as one ONNX model."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir
import torch
from segment_anything.modeling import Sam
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn

from pipeline import __version__
from pipeline.config import Config
from pipeline.data.partition import load_partition
from pipeline.disk import flush, flush_tree, write_json, writer_lock
from pipeline.errors import ConfigError
from pipeline.progress import Progress
from pipeline.sam.attention import for_any_frame
from pipeline.sam.frame import frame_patch, inside_image, to_client_frame
from pipeline.sam.onnx import (
    INPUTS,
    MAPS,
    MODEL_FORMAT,
    OUTPUTS,
    auto_precision,
    check_exportable,
    model_path,
    onnx_precision,
)
from pipeline.sam.teacher import forward, load_teacher, to_labels
from pipeline.stores.label_store import Identity
from pipeline.stores.onnx_sidecar import About, described, sidecar_path

#: With Attention as one operator: no attention matrix where the provider has a fused kernel.
OPSET = 23
#: Weights of more bytes go into a file of their own; protobuf ends at 2 GiB, and is held in memory.
EXTERNAL_ABOVE = 1 << 29
EXPORTING = "exporting the teacher"
_PLAINLY = {
    "device": "cpu",
    "precision": "fp32",
    "compile": False,
    "attention": "auto",
    "residual": "fp32",
}  # how the teacher is traced, whatever stage one would do


@dataclass(frozen=True)
class Export:
    """What ``export_teacher`` wrote."""

    model: str  # path
    weights: str | None  # path of the weights, where they are not in the model
    megabytes: float  # of both, 10^6 bytes
    precision: str
    label_size: int  # px
    opset: int

    def as_json(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return asdict(self)

    def text(self) -> str:
        """Return what ``samfed export-onnx`` prints."""
        size = f"{self.megabytes:.1f} MB, {self.precision}, labels of {self.label_size} px"
        return f"{size}; {self.model}"


class TeacherNetwork(nn.Module):
    """From padded pixels to what the label store holds, as one function of tensors."""

    def __init__(self, sam: Sam, *, label_size: int, fp16: bool) -> None:
        """Wrap ``sam``; with ``fp16``, its norms are given fp32 inputs, in place.

        Autocast on the CPU, where this is traced, would leave these in fp16 beside fp32 weights,
        and an ONNX operator takes one type.
        """
        super().__init__()
        self.sam = sam
        self.size_hw = (label_size, label_size)
        self.dtype = torch.float16 if fp16 else torch.float32
        for module in sam.modules() if fp16 else ():
            if isinstance(module, nn.LayerNorm | LayerNorm2d | nn.BatchNorm2d):
                module.register_forward_pre_hook(lambda _, args: (args[0].float(),))

    def forward(self, pixels: Tensor, valid_hw: Tensor) -> tuple[Tensor, ...]:
        """Label a batch.

        Args:
            pixels: (B, h, w, 3) uint8, padded. valid_hw: (B, 2) int64, height and width of the
                image in it (``to_input_frame`` makes both).

        Returns:
            masks (B, L, L) uint8, confidences (B, L, L) uint8, predicted_iou (B,) float32, and
            what these come from: probabilities (B, K+1, L, L) and iou (B, K+1) float32.
        """
        pixels = pixels.permute(0, 3, 1, 2)  # here, where the device does it
        inside = inside_image(valid_hw, pixels.shape[-2:])
        logits, iou = forward(self.sam, pixels, inside, dtype=self.dtype)
        probabilities, iou = to_client_frame(logits, valid_hw, self.size_hw), iou.float()
        return *to_labels(probabilities, iou), probabilities, iou


def export_teacher(
    settings: Config,
    out: Path | None = None,
    *,
    external_above: int = EXTERNAL_ABOVE,
    progress: Progress | None = None,
) -> Export:
    """Write the adapted teacher to ``out``; to where stage one looks for it if None.

    Args:
        external_above: weights of more bytes go into a file beside ``out``.

    Raises:
        StageError: not fine-tuned yet. ConfigError: a precision that ONNX Runtime does not have, or
        a prompt. LockedStoreError: another process exports.
    """
    check_exportable(settings)
    cache, label_size = settings.cache.root, settings.data.image_size
    run = settings.precompute
    auto = auto_precision(settings.sam.variant, run.device)
    precision = onnx_precision(run.precision, auto=auto)
    path = model_path(cache) if out is None else out
    show = progress or (lambda *_: None)
    show(EXPORTING, 0, 2)
    with writer_lock(cache / "locks" / "export-onnx.lock"):
        plain = run.model_copy(update=_PLAINLY)
        plainly = settings.model_copy(update={"precompute": plain})
        teacher = load_teacher(plainly, load_partition(cache / "partition.json"))
        network = TeacherNetwork(teacher.sam, label_size=label_size, fp16=precision == "fp16")
        patch = frame_patch(teacher.card)
        if patch is not None:
            for_any_frame(teacher.sam.image_encoder)
        model = trace(network, input_size=teacher.card.input_size, patch=patch)
        show(EXPORTING, 1, 2)
        identity = teacher.card.identity(label_size=label_size, precision=precision)
        about = about_model(model, identity, precision=precision)
        weights = write_model(path, model, about, external_above=external_above)
        show(EXPORTING, 2, 2)
    files = [path] if weights is None else [path, weights]
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    beside = None if weights is None else str(weights)
    return Export(str(path), beside, megabytes, precision, label_size, about.opset)


def about_model(model: onnx_ir.Model, identity: Identity, *, precision: str) -> About:
    """Return what the sidecar says of a model whose labels have this identity."""
    return About(
        format=MODEL_FORMAT,
        samfed=__version__,
        identity=identity.model_dump(),
        precision=precision,  # type: ignore[arg-type]  # checked there
        opset=model.opset_imports[""],
    )


def trace(
    network: nn.Module,
    *,
    input_size: int,
    patch: int | None = None,
    outputs: Sequence[str] = (*OUTPUTS, *MAPS),
) -> onnx_ir.Model:
    """Return ``network`` (of ``INPUTS``) as an ONNX graph with a free batch dimension.

    Args:
        patch: as ``frame_hw``'s; with one, height and width of the frame are free multiples of it,
        and the encoder must be ``for_any_frame``.

    Raises:
        ConfigError: torch's exporter cannot free them.
    """
    pixels = torch.zeros(2, input_size, input_size, 3, dtype=torch.uint8)
    valid_hw = torch.full((2, 2), input_size)
    named = dict(zip(INPUTS, (pixels, valid_hw), strict=True))
    if patch is None:
        return to_onnx(network, named, outputs=outputs, opset=OPSET)
    sides = (torch.export.Dim(name, min=1, max=input_size // patch) for name in ("rows", "cols"))
    free = {INPUTS[0]: {axis: patch * side for axis, side in enumerate(sides, start=1)}}
    try:
        return to_onnx(network, named, outputs=outputs, opset=OPSET, free=free)
    except torch.onnx.OnnxExporterError as error:
        raise ConfigError(
            "sam.frame: found 'content', but torch's exporter cannot leave the frame's shape open "
            f"for this sam.variant ({type(error).__name__}); use precompute.backend=torch, or set "
            "it to pad and adapt again"
        ) from error


@torch.no_grad()
def to_onnx(
    network: nn.Module,
    inputs: Mapping[str, Tensor],
    *,
    outputs: Sequence[str],
    opset: int,
    free: Mapping[str, Mapping[int, Any]] | None = None,
) -> onnx_ir.Model:
    """Return ``network`` on the CPU as an ONNX graph whose first dimension, the batch, is free.

    Args:
        inputs: an example of each, by name, of two rows: torch.export takes one for a constant.
        free: further dimensions of inputs that are free, as torch.export names them.
    """
    batch, more = torch.export.Dim("batch"), free or {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns of what it calls itself
        program = torch.onnx.export(
            network.eval().cpu(),
            tuple(inputs.values()),
            dynamo=True,
            verbose=False,
            opset_version=opset,
            input_names=list(inputs),
            output_names=outputs,
            dynamic_shapes=tuple({0: batch, **more.get(name, {})} for name in inputs),
        )
    if program is None:  # what the signature allows for the exporter that is not used here
        raise RuntimeError("torch.onnx.export returned no program")
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with the paths of this computer
    return program.model


def write_model(
    path: Path, model: onnx_ir.Model, about: About, *, external_above: int
) -> Path | None:
    """Write ``model`` to ``path`` and what it is beside it; the caller holds a lock.

    Weights of more than ``external_above`` bytes go into a file named by its content, so that the
    model that was there keeps its own. Nothing takes its place before all of the new one is on the
    disk, and the sidecar, which has the sha256 of the others, does so last.

    Returns:
        The file with the weights, if there is one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    building = path.with_name(f".{path.name}.building")
    shutil.rmtree(building, ignore_errors=True)  # a killed run's
    building.mkdir()
    try:
        weights = weights_name(path, model, above=external_above)
        _save(model, building / path.name, weights)
        names = [path.name] if weights is None else [weights, path.name]
        sidecar = sidecar_path(path).name
        write_json(building / sidecar, described(building, names, about).model_dump())
        flush_tree(building)
        for name in (*names, sidecar):
            os.replace(building / name, path.with_name(name))
            flush(path.parent)  # in this order, whenever the power goes
    finally:
        shutil.rmtree(building, ignore_errors=True)
    for other in path.parent.glob(f"{glob.escape(path.name)}.{'[0-9a-f]' * 16}.data"):
        if other.name != weights:
            other.unlink()
    return None if weights is None else path.with_name(weights)


def _save(model: onnx_ir.Model, file: Path, weights: str | None) -> None:
    """Write ``model``, its weights beside it if they have a name; an error says which file."""
    try:
        onnx_ir.save(model, file, external_data=weights)
    except OSError as error:  # a disk that is full while weights are written has no number
        reason = error.strerror or str(error)
        raise OSError(error.errno or errno.EIO, reason, str(file)) from error


def weights_name(path: Path, model: onnx_ir.Model, *, above: int) -> str | None:
    """Name the file for weights of more than ``above`` bytes by their content; None for fewer."""
    values = (value.const_value for value in model.graph.initializers.values())
    tensors = [tensor for tensor in values if tensor is not None]
    if sum(tensor.nbytes for tensor in tensors) <= above:
        return None
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.tobytes())
    return f"{path.name}.{digest.hexdigest()[:16]}.data"
