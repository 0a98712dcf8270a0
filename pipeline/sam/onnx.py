"""The teacher on ONNX Runtime: the model that ``samfed export-onnx`` wrote, checked and run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config import Config, PrecomputeConfig
from pipeline.data.partition import Partition
from pipeline.errors import ConfigError, IdentityError, first_line
from pipeline.runtime import resolve_device
from pipeline.sam.device import Finished, Image
from pipeline.sam.frame import fit_longest_side, frame_patch, groups_of_frames, to_input_frame
from pipeline.sam.teacher import checked_card, to_arrays
from pipeline.sam.views import SizeHW, mean_of_views
from pipeline.stores.label_store import Identity, differences
from pipeline.stores.onnx_sidecar import AGAIN, About, read_sidecar
from pipeline.stores.pseudo_labels import PseudoLabels, join
from pipeline.stores.teacher_card import TeacherCard, label_precision

log = logging.getLogger("samfed.sam.onnx")

INPUTS = ("pixels", "valid_hw")
OUTPUTS = ("masks", "confidences", "predicted_iou")
MAPS = ("probabilities", "iou")  # what these come from, of every class; averaged over views
#: Raised when inputs, outputs or what lies between them change: older files are then refused.
MODEL_FORMAT = "4"

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_LOG_FATAL = 4  # of ONNX Runtime's levels 0..4: errors are raised, and need no second report


def model_path(cache: Path) -> Path:
    """Return where stage one looks for the model.

    Not in ``cache/teacher``, which is an output of ``finetune-sam``: a file more there, and DVC
    would fine-tune again.
    """
    return cache / "onnx" / "teacher.onnx"


def onnx_precision(asked: str, *, auto: str = "fp32") -> str:
    """Return the precision to export in, where ``auto`` is what that stands for.

    Raises:
        ConfigError: bf16, for which ONNX Runtime lacks kernels that a teacher needs, or int8.
    """
    if asked in ("bf16", "int8"):
        raise ConfigError(
            f"precompute.precision: {asked} is not offered by the onnx backend; use fp32 or, on "
            "CUDA, fp16"
        )
    return auto if asked == "auto" else asked


def auto_precision(variant: str, device: str) -> str:
    """Return fp16 where stage one runs on CUDA and it keeps the masks, else fp32.

    A provider for the CPU has few kernels for fp16.
    """
    on_cuda = resolve_device(device).type == "cuda"
    return label_precision(variant, "auto") or ("fp16" if on_cuda else "fp32")


def check_exportable(settings: Config) -> None:
    """Refuse a prompt, which only the torch backend can give.

    Raises:
        ConfigError: ``sam.prompt`` is not none.
    """
    if settings.sam.prompt != "none":
        raise ConfigError(
            f"sam.prompt: found '{settings.sam.prompt}', but only an adapted teacher, which needs "
            "no prompt, can be exported; set it to none or use precompute.backend=torch"
        )


def check_file(path: Path, card: TeacherCard, *, label_size: int, precision: str) -> str:
    """Refuse a file that is damaged, or of another teacher, label size or precision.

    Returns:
        the precision that it holds, which ``auto`` takes.

    Raises:
        StageError, CorruptStoreError: as ``read_sidecar``. IdentityError: says what differs.
        ConfigError: a precision that the file does not hold.
    """
    about = read_sidecar(path)
    held = about.precision
    if precision != "auto" and onnx_precision(precision) != held:
        raise ConfigError(
            f"precompute.precision: '{precision}' asked for, but {path} holds {held}; {AGAIN}"
        )
    differs: list[tuple[str, object, object]] = [("format", about.format, MODEL_FORMAT)]
    if about.format == MODEL_FORMAT:
        identity = card.identity(label_size=label_size, precision=precision)
        differs = differences(_identity(path, about), identity)
    for field, found, expected in differs:
        raise IdentityError(f"{path}: {field} is {found}, expected {expected}; {AGAIN}")
    return held


def _identity(path: Path, about: About) -> Identity:
    try:
        return Identity.model_validate(about.identity)
    except ValueError as error:
        raise IdentityError(f"{path}: identity of another samfed; {AGAIN}") from error


def check_model(settings: Config, card: TeacherCard) -> None:
    """Refuse, without loading it, a model that ``load_onnx_teacher`` would refuse anywhere.

    Raises:
        as ``load_onnx_teacher``, what concerns the device aside.
    """
    check_exportable(settings)
    size, precision = settings.data.image_size, settings.precompute.precision
    check_file(model_path(settings.cache.root), card, label_size=size, precision=precision)


class OnnxTeacher:
    """The exported teacher, with ``Teacher``'s ``card``, ``label`` and ``provenance``."""

    def __init__(
        self, path: Path, card: TeacherCard, *, label_size: int, device: str, precision: str
    ) -> None:
        """Check the file of ``samfed export-onnx`` at ``path`` and load it.

        Args:
            label_size: side of the labels in pixels, for which it must have been written.
            device: auto, cpu, cuda or cuda:N. precision: auto takes what the file holds.

        Raises:
            as ``check_file``. ConfigError: the device cannot be had.
        """
        self.card, self.label_size = card, label_size
        self.precision = check_file(path, card, label_size=label_size, precision=precision)
        self.session, self.device = start_session(path, device)
        self.views = 1  # of each image, whose mean its label is
        self.keeps_probabilities = False  # of every class, with the labels
        if self.precision == "fp16" and self.device.type != "cuda":
            raise ConfigError(
                f"precompute.precision: {path} holds fp16, which needs a CUDA device; run "
                "`samfed export-onnx --set precompute.precision=fp32`"
            )

    def tune(self, run: PrecomputeConfig) -> OnnxTeacher:
        """Run as many views, and keep what these settings ask for; return the teacher."""
        self.views = run.views
        self.keeps_probabilities = run.keeps_probabilities(self.card.num_classes)
        return self

    def provenance(self) -> dict[str, str]:
        """Return what computes the labels; recorded with them, no part of their identity."""
        return {
            "backend": "onnx",
            "provider": self.session.get_providers()[0],
            "precision": self.precision,
            "device": self.device.type,
            "onnxruntime": ort.__version__,
            "samfed": version("samfed"),
        }

    def staged(self, image: Image) -> Image:
        """Resize an image as ``label`` does; any thread may call it."""
        return fit_longest_side(image, self.card.input_size)

    def begin(self, images: Sequence[Image], size: int) -> Finished:
        """Label images as ``label`` does: ONNX Runtime returns when it is done."""
        return Finished(self.label(images, size))

    def label(self, images: Sequence[Image], size: int) -> PseudoLabels:
        """Label (H, W, 3) uint8 images of any sizes, in the client's frame ``size``.

        Raises:
            IdentityError: the model was exported for another size. MemoryError: the batch is too
            large for the device.
        """
        if size != self.label_size:
            raise IdentityError(f"the onnx model makes labels of {self.label_size} px, not {size}")
        groups = groups_of_frames(images, self.card.input_size, frame_patch(self.card))
        labels = join([self._one_frame([images[place] for place in group]) for group in groups])
        order = np.argsort([place for group in groups for place in group])
        arrays = {name: part[order] for name, part in vars(labels).items() if part is not None}
        return PseudoLabels(**arrays)

    def _one_frame(self, images: Sequence[Image]) -> PseudoLabels:
        """Label images that share a frame."""
        frames = to_input_frame(images, self.card.input_size, frame_patch(self.card))
        if self.views == 1 and not self.keeps_probabilities:
            return PseudoLabels(*self.run(*_rows(*frames)))
        size_hw = (self.label_size, self.label_size)
        seen = mean_of_views(self._one_view, *frames, size_hw, views=self.views)
        arrays = to_arrays(seen, views=self.views, probabilities=self.keeps_probabilities)
        return PseudoLabels(**{name: tensor.numpy() for name, tensor in arrays.items()})

    def _one_view(self, pixels: Tensor, valid_hw: Tensor, _: SizeHW) -> tuple[Tensor, Tensor]:
        """Return probabilities and IoU estimates in the square that the model was made for."""
        probabilities, iou = self.run(*_rows(pixels, valid_hw), names=MAPS)
        return torch.from_numpy(probabilities), torch.from_numpy(iou)

    def run(self, *inputs: NDArray[Any], names: Sequence[str] = OUTPUTS) -> list[NDArray[Any]]:
        """Run ``INPUTS`` to the outputs ``names``, bound to the device: one copy in and out."""
        device, index = self.device.type, self.device.index or 0
        binding = self.session.io_binding()
        for name, array in zip(INPUTS, inputs, strict=True):
            value = ort.OrtValue.ortvalue_from_numpy(array, device, index)
            binding.bind_ortvalue_input(name, value)
        for name in names:
            binding.bind_output(name, device, index)
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime has no error of its own for memory
            if "allocat" in str(error) or "bad_alloc" in str(error):
                raise MemoryError(first_line(error)) from error
            raise
        outputs: list[NDArray[Any]] = binding.copy_outputs_to_cpu()
        return outputs


def _rows(pixels: Tensor, valid_hw: Tensor) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return a batch (B, 3, h, w) as the model takes it: rows of pixels, and the images' sizes."""
    return np.ascontiguousarray(pixels.permute(0, 2, 3, 1).numpy()), valid_hw.numpy()


def start_session(path: Path, name: str) -> tuple[ort.InferenceSession, torch.device]:
    """Open a session on the device ``name``; only ``auto`` may end on the CPU, and says so.

    Raises:
        ConfigError: CUDA was asked for and cannot be had, or the model cannot be run.
    """
    device = resolve_device(name)
    if device.type == "cuda":
        try:
            return _cuda_session(path, device.index or 0), device
        except ConfigError as error:
            if name != "auto":
                raise
            log.warning("%s", error)
            log.warning("precompute.device: auto found no usable CUDA; labelling on the CPU")
    return _session(path, [CPU]), torch.device("cpu")


def _cuda_session(path: Path, index: int) -> ort.InferenceSession:
    asked = f"precompute.device: cuda asked for, but onnxruntime {ort.__version__}"
    if CUDA not in ort.get_available_providers():
        raise ConfigError(
            f"{asked} is a build without it; install onnxruntime-gpu, or use precompute.device=cpu"
        )
    if hasattr(ort, "preload_dlls"):  # CUDA's libraries from packages of their own; since 1.21
        ort.preload_dlls()
    # cuDNN's exhaustive search picks algorithms by a stopwatch, and TF32 is not fp32
    options = {"device_id": index, "cudnn_conv_algo_search": "HEURISTIC", "use_tf32": 0}
    session = _whole_on_cuda(path, (CUDA, options))
    if session.get_providers()[0] != CUDA:  # it only logs that libraries are missing
        raise ConfigError(
            f"{asked} cannot load its CUDA provider; install the CUDA and cuDNN versions that it "
            "names above, or use precompute.device=cpu"
        )
    return session


def _whole_on_cuda(path: Path, cuda: Any) -> ort.InferenceSession:
    """Open a session, and say so where CUDA does not run every node of the model."""
    try:
        return _session(path, [cuda], only=True)
    except ConfigError as error:
        if "fallback" not in str(error):
            raise
        session = _session(path, [cuda, CPU])
        if session.get_providers()[0] == CUDA:
            log.warning(
                "%s: onnxruntime %s runs some of its nodes on the CPU, which costs copies between "
                "them and the GPU; another version may not, or use precompute.backend=torch",
                path,
                ort.__version__,
            )
        return session


def _session(path: Path, providers: list[Any], *, only: bool = False) -> ort.InferenceSession:
    """Open a session on the providers; with ``only`` refuse nodes that none of them runs."""
    options = ort.SessionOptions()
    if only:  # else what a provider lacks goes to the CPU without a word
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options.intra_op_num_threads = torch.get_num_threads()  # threads are pinned in one place
    options.use_deterministic_compute = True
    options.log_severity_level = _LOG_FATAL
    try:
        # else it prints to stdout and goes on with another provider
        return ort.InferenceSession(path, options, providers=providers, enable_fallback=0)
    except Exception as error:  # its errors share no base class but Exception
        raise ConfigError(
            f"{path}: onnxruntime {ort.__version__} cannot run it ({first_line(error)}); "
            "use precompute.backend=torch or another precompute.device"
        ) from error


def load_onnx_teacher(settings: Config, partition: Partition) -> OnnxTeacher:
    """Load the exported teacher, as ``precompute`` asks for it.

    Raises:
        StageError: not fine-tuned or not exported yet. IdentityError: the card is not what
        params.yaml asks for, or the model is of another teacher. ConfigError: see ``OnnxTeacher``.
    """
    check_exportable(settings)
    return OnnxTeacher(
        model_path(settings.cache.root),
        checked_card(settings, partition),
        label_size=settings.data.image_size,
        device=settings.precompute.device,
        precision=settings.precompute.precision,
    ).tune(settings.precompute)
