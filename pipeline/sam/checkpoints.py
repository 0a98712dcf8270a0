"""Weights of teachers: where they come from, and that all of them fit or none is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from segment_anything.modeling import Sam
from torch import Tensor

from pipeline.config import SamConfig
from pipeline.disk import file_sha256
from pipeline.errors import ConfigError, DataError
from pipeline.sam.build import IOU_HEAD_DEPTH, build_sam

State = dict[str, Tensor]

EMBEDDED_WEIGHTS = Path(__file__).parent / "weights" / "vit_t.safetensors"

#: sha256 of the official checkpoints (github.com/facebookresearch/segment-anything).
OFFICIAL_SHA256 = {
    "vit_b": "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    "vit_l": "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    "vit_h": "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
}

_TOKENS = "mask_decoder.mask_tokens.weight"
_IOU_OUTPUT = f"mask_decoder.iou_prediction_head.layers.{IOU_HEAD_DEPTH - 1}."
_HYPERNETWORKS = "mask_decoder.output_hypernetworks_mlps."


def base_checkpoint(config: SamConfig) -> tuple[Path | None, str]:
    """Return the pretrained weights that the variant starts from, and their identity (the card's).

    Raises:
        ConfigError: a checkpoint is needed. DataError: it is missing, or not the official one.
    """
    path = config.checkpoint
    if path is None and config.variant == "vit_t":
        return EMBEDDED_WEIGHTS, file_sha256(EMBEDDED_WEIGHTS)
    if path is None and config.variant.startswith("timm:"):
        return None, "random"
    if path is None:
        raise ConfigError(
            f"sam.checkpoint: {config.variant} needs the official checkpoint; download it from "
            "segment-anything's page and give its path"
        )
    if not path.is_file():
        raise DataError(f"{path}: no such checkpoint; check sam.checkpoint in params.yaml")
    digest = file_sha256(path)
    official = OFFICIAL_SHA256.get(config.variant, digest)
    if digest != official:
        raise DataError(
            f"{path}: sha256 is {digest[:12]}..., the official {config.variant} checkpoint's is "
            f"{official[:12]}...; download it again"
        )
    return path, digest


def build_base(config: SamConfig, *, num_classes: int) -> Sam:
    """Build a SAM of the configured variant with its pretrained weights and K+1 mask tokens.

    Raises:
        as ``base_checkpoint`` and ``load_state``. DataError: the weights do not fit the variant.
    """
    sam = build_sam(config.variant, input_size=config.input_size, num_multimask=num_classes)
    path, _ = base_checkpoint(config)
    if path is None:
        return sam
    state, module = load_state(path), sam
    if config.variant.startswith("timm:"):
        module = sam.image_encoder.backbone
        wanted = module.state_dict()
        # a classifier, and whatever lies behind the last feature map, is not used
        state = {name: value for name, value in state.items() if name in wanted}
    else:
        state = _deal_mask_tokens(path, state, num_classes + 1)
    fault = misfit(state, module.state_dict())
    if fault is not None:
        raise DataError(
            f"{path}: {fault}; expected the weights of the model that sam.variant names"
        )
    module.load_state_dict(state)
    return sam


def _deal_mask_tokens(path: Path, state: State, count: int) -> State:
    """Deal the pretrained mask tokens of ``state`` to ``count`` classes in turn."""
    if _TOKENS not in state:
        raise DataError(f"{path}: no mask decoder in it; expected a SAM checkpoint")
    pick = [i % len(state[_TOKENS]) for i in range(count)]
    dealt = {name: value for name, value in state.items() if not name.startswith(_HYPERNETWORKS)}
    for name in (_TOKENS, f"{_IOU_OUTPUT}weight", f"{_IOU_OUTPUT}bias"):
        if name in state:
            dealt[name] = state[name][pick]
    for target, origin in enumerate(pick):
        prefix = f"{_HYPERNETWORKS}{origin}."
        for name, value in state.items():
            if name.startswith(prefix):
                dealt[f"{_HYPERNETWORKS}{target}.{name.removeprefix(prefix)}"] = value
    return dealt


def misfit(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """Say in which names and shapes ``state`` is not what a module expects; None if it is."""
    faults = {
        "missing": [name for name in expected if name not in state],
        "not expected": [name for name in state if name not in expected],
        "of another shape": [
            name for name, value in state.items() if value.shape != expected.get(name, value).shape
        ],
    }
    counts = ", ".join(f"{len(names)} {what}" for what, names in faults.items())
    for what, names in faults.items():
        if names:
            return f"'{names[0]}' is {what} (in all: {counts})"
    return None


def load_state(path: Path) -> State:
    """Read a checkpoint's tensors without ever executing code from it.

    Raises:
        DataError: the file is missing, damaged, or holds anything but a flat table of tensors.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such checkpoint; check the path in params.yaml (sam.*)")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state: object = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors and torch raise many kinds for a damaged file
        raise DataError(
            f"{path}: not a readable checkpoint ({type(error).__name__}); expected safetensors or "
            "a torch file of plain tensors"
        ) from error
    advice = "expected tensors by name; save the model's own state_dict()"
    if not isinstance(state, dict):
        raise DataError(f"{path}: holds a {type(state).__name__}; {advice}")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise DataError(f"{path}: {name!r} holds a {type(value).__name__}; {advice}")
    return state
