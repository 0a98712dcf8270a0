"""``samfed export``: a finished model as files that need no samfed, or no torch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.disk import file_sha256, write_bytes
from pipeline.errors import ConfigError
from pipeline.federation.runs import RunFolder
from pipeline.inference.card import model_card
from pipeline.inference.loading import MODEL_FILE, Choice, find_model, load_model
from pipeline.inference.onnx_model import INPUT, OUTPUTS, SPEC_KEY
from pipeline.inference.torch_model import NetworkModel
from pipeline.sam.export import to_onnx
from pipeline.segmentation.likeness import distances, logits_and_features
from pipeline.segmentation.networks import normalise
from pipeline.stores.plain_data import to_bytes
from pipeline.stores.sealed_onnx import sealed

#: Resize knows axes and anti-aliasing since 18.
OPSET = 18
ONNX_FILE, SPEC_FILE, CARD_FILE = "model.onnx", "model.json", "README.md"
_FRAMES, _PROBABILITIES = "frames", "square_probabilities"


@dataclass(frozen=True)
class Export:
    """What ``export_model`` wrote."""

    files: dict[str, str]  # sha256 by path

    def as_json(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return {"files": self.files}

    def text(self) -> str:
        """Return a line for each file."""
        return "\n".join(f"{digest[:16]}  {path}" for path, digest in self.files.items())


class ExportedNetwork(nn.Module):
    """From frames to probabilities and distances, as one function of tensors."""

    def __init__(self, model: NetworkModel) -> None:
        super().__init__()
        self.network, self.temperature = model.network, model.spec.temperature
        likeness = model.spec.likeness
        self.mean, self.whitening = torch.tensor(likeness.mean), torch.tensor(likeness.whitening)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Predict frames (B, 3, S, S) float32 in 0..255."""
        logits, features = logits_and_features(self.network, normalise(frames / 255))
        probabilities = (logits / self.temperature).softmax(dim=1)
        return probabilities, distances(features, self.mean, self.whitening)


def export_model(config: Config, choice: Choice, out: Path | None = None) -> Export:
    """Write ``model.onnx``, ``model.safetensors`` with ``model.json``, and the model card.

    Args:
        out: a folder; the run's ``export`` if None.

    Raises:
        as ``load_model``. ConfigError: it is no network of a run.
    """
    model = load_model(config, choice)
    if not isinstance(model, NetworkModel):
        raise ConfigError(
            f"{choice.model}: only a run's network is exported; for SAM use `samfed export-onnx`"
        )
    path = find_model(config, choice.model)
    run = RunFolder(path) if path.is_dir() else None
    out = out or path / "export"
    weights = to_bytes(model.network.state_dict())
    spec = model.spec.model_copy(update={"weights_sha256": hashlib.sha256(weights).hexdigest()})
    card, graph = model_card(spec, run), _graph(model).SerializeToString()
    write_bytes(out / MODEL_FILE, weights)
    spec.write(out / SPEC_FILE)
    write_bytes(out / ONNX_FILE, sealed(graph, {SPEC_KEY: spec.model_dump_json()}))
    write_bytes(out / CARD_FILE, card.encode())
    names = (ONNX_FILE, MODEL_FILE, SPEC_FILE, CARD_FILE)
    return Export({str(out / name): file_sha256(out / name) for name in names})


def _trace(model: NetworkModel) -> onnx.ModelProto:
    """Return the network of ``_FRAMES`` as an ONNX model with a free batch dimension."""
    size = model.spec.image_size
    frames = {_FRAMES: torch.zeros(2, 3, size, size)}
    outputs = (_PROBABILITIES, OUTPUTS[2])
    found = to_onnx(ExportedNetwork(model), frames, outputs=outputs, opset=OPSET)
    return onnx_ir.to_proto(found)


def _graph(model: NetworkModel) -> onnx.ModelProto:
    """Return the network with what comes before and after it: images (B, H, W, 3) of any size.

    Resized as Pillow does it, bilinear and anti-aliased, to whole grey levels; the probabilities
    are resized back alike, and the mask is the likeliest class.
    """
    spec, found = model.spec, _trace(model)
    graph, size = found.graph, spec.image_size
    before, values = _resizing(size)
    core = [*graph.node]
    del graph.node[:]
    graph.node.extend([*before, *core, *_resizing_back()])
    graph.initializer.extend(values)
    image = helper.make_tensor_value_info(INPUT, TensorProto.UINT8, ["batch", "H", "W", 3])
    shape: list[Any] = ["batch", spec.num_classes + 1, "H", "W"]
    mask, probabilities = (
        helper.make_tensor_value_info(OUTPUTS[0], TensorProto.UINT8, ["batch", "H", "W"]),
        helper.make_tensor_value_info(OUTPUTS[1], TensorProto.FLOAT, shape),
    )
    distance = next(each for each in graph.output if each.name == OUTPUTS[2])
    kept = [mask, probabilities, distance]
    del graph.input[:], graph.output[:]
    graph.input.append(image)
    graph.output.extend(kept)
    onnx.checker.check_model(found)
    return found


_RESIZE: dict[str, Any] = {
    "mode": "linear",
    "antialias": 1,
    "coordinate_transformation_mode": "half_pixel",
    "axes": [2, 3],
    "exclude_outside": 1,  # weights at the border add up to one, as in Pillow
}


def _resizing(size: int) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Return nodes from ``INPUT`` to ``_FRAMES``, and all constants that both ends need."""
    node = helper.make_node
    nodes = [
        node("Transpose", [INPUT], ["rows_last"], perm=[0, 3, 1, 2]),
        node("Cast", ["rows_last"], ["levels"], to=TensorProto.FLOAT),
        node("Resize", ["levels", "", "", "square"], ["resized"], **_RESIZE),
        node("Round", ["resized"], ["rounded"]),
        node("Clip", ["rounded", "black", "white"], [_FRAMES]),
    ]
    constants = [
        helper.make_tensor("square", TensorProto.INT64, [2], [size, size]),
        helper.make_tensor("black", TensorProto.FLOAT, [], [0.0]),
        helper.make_tensor("white", TensorProto.FLOAT, [], [255.0]),
    ]
    return nodes, constants


def _resizing_back() -> list[onnx.NodeProto]:
    """Return nodes from the square probabilities to mask and probabilities at the image's size."""
    node = helper.make_node
    resized = [_PROBABILITIES, "", "", "own_size"]
    return [
        node("Shape", ["rows_last"], ["own_size"], start=2, end=4),
        node("Resize", resized, [OUTPUTS[1]], **_RESIZE),
        node("ArgMax", [OUTPUTS[1]], ["likeliest"], axis=1, keepdims=0),
        node("Cast", ["likeliest"], [OUTPUTS[0]], to=TensorProto.UINT8),
    ]
