"""An exported model on ONNX Runtime; this module and all that it imports need no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from pipeline.data.images import resize_image
from pipeline.errors import ConfigError, CorruptStoreError, first_line
from pipeline.inference.model import Outputs, Pixels
from pipeline.segmentation.model_spec import parse_spec
from pipeline.stores.onnx_sidecar import sidecar_path
from pipeline.stores.sealed_onnx import checked_properties

SPEC_KEY = "samfed.model"
INPUT = "pixels"  # (B, H, W, 3) uint8 RGB
OUTPUTS = ("mask", "probabilities", "distance")
_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_LOG_FATAL = 4  # of ONNX Runtime's levels 0..4: errors are raised, and need no second report
_AGAIN = "get it again, or run `samfed export`"


class OnnxModel:
    """A network with its preprocessing and temperature in one file."""

    def __init__(self, path: Path, *, device: str) -> None:
        """Check every byte of the file, and load it.

        Args:
            device: auto, cpu or cuda; ``auto`` is CUDA where ONNX Runtime has it.

        Raises:
            CorruptStoreError, FormatError: it is damaged, no export of a run's model, or of another
            version. ConfigError: it cannot be run on the device.
        """
        is_teacher = sidecar_path(path).is_file()
        properties = {} if is_teacher else checked_properties(path, advice=_AGAIN)
        if SPEC_KEY not in properties:
            raise CorruptStoreError(f"{path}: no model of a run (a teacher?); {_AGAIN}")
        self.spec = parse_spec(properties[SPEC_KEY], source=str(path))
        self.num_classes, self.grey = self.spec.num_classes, self.spec.grey
        self.class_names = self.spec.class_names
        self.digest, self.threshold = self.spec.digest, self.spec.likeness.threshold
        self._session = _session(path, device)

    def frame(self, image: Pixels) -> Pixels:
        """Squash an image (H, W, 3) uint8 to the network's square, so that a batch is one array.

        The model would do it too; a second time it changes nothing.
        """
        return resize_image(image, self.spec.image_size)

    def predict(self, frames: Sequence[Pixels]) -> Outputs:
        """Predict frames (S, S, 3) uint8, all in one batch."""
        inputs = {INPUT: np.stack(frames)}
        probabilities, found = self._session.run(list(OUTPUTS[1:]), inputs)
        return Outputs(probabilities, found.astype(np.float64))


def _session(path: Path, device: str) -> ort.InferenceSession:
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device: found '{device}', expected auto, cpu or cuda for ONNX")
    ort.set_default_logger_severity(_LOG_FATAL)  # `auto` may find CUDA's libraries missing
    options = ort.SessionOptions()
    options.log_severity_level = _LOG_FATAL
    wanted: list[Any] = [_CPU]
    if device == "cuda" or (device == "auto" and _CUDA in ort.get_available_providers()):
        wanted = [(_CUDA, {"use_tf32": 0}), _CPU]
    try:
        session = ort.InferenceSession(path, options, providers=wanted)
    except Exception as error:  # its errors share no base class but Exception
        raise ConfigError(
            f"{path}: onnxruntime {ort.__version__} cannot run it ({first_line(error)}); "
            "install a newer onnxruntime"
        ) from error
    if device == "cuda" and session.get_providers()[0] != _CUDA:
        raise ConfigError(
            f"--device: cuda asked for, but onnxruntime {ort.__version__} cannot load it; "
            "install onnxruntime-gpu with its CUDA libraries, or use --device cpu"
        )
    return session
