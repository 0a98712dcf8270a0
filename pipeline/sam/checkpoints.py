"""Weights of teachers: where they come from, and that all of them fit or none is loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from segment_anything.modeling import Sam
from torch import Tensor

from pipeline.config import SamConfig
from pipeline.data.catalogue import WEIGHTS
from pipeline.disk import file_sha256
from pipeline.errors import ConfigError, DataError
from pipeline.sam.build import ENCODERS, IOU_HEAD_DEPTH, MOBILE_SAM, build_sam
from pipeline.sam.tiny_vit import from_mobile_sam
from pipeline.stores.plain_data import State, not_finite

log = logging.getLogger("samfed.sam.checkpoints")

EMBEDDED_WEIGHTS = Path(__file__).parent / "weights" / "vit_t.safetensors"

#: sha256 of each variant's official checkpoint.
OFFICIAL_SHA256 = {
    source.variant: source.files[0].sha256 for source in WEIGHTS.values() if source.files
}

_WRAPPERS = ("model", "state_dict", "model_state_dict", "model_state")  # of training checkpoints
_PREFIXES = ("module.", "model.", "sam.")  # of DataParallel, Lightning, and wrappers of a SAM
_NAMED = 3  # names that an error shows of each kind

_TOKENS = "mask_decoder.mask_tokens.weight"
_IOU_OUTPUT = f"mask_decoder.iou_prediction_head.layers.{IOU_HEAD_DEPTH - 1}."
_HYPERNETWORKS = "mask_decoder.output_hypernetworks_mlps."


def base_checkpoint(config: SamConfig) -> tuple[Path | None, str]:
    """Return the pretrained weights that the variant starts from, and their identity (the card's).

    Raises:
        ConfigError: a checkpoint is needed. DataError: it is missing.
    """
    path = config.checkpoint
    if path is None and config.variant == "vit_t":
        return EMBEDDED_WEIGHTS, file_sha256(EMBEDDED_WEIGHTS)
    if path is None and config.variant.startswith("timm:"):
        return None, "random"
    if path is None:
        raise ConfigError(
            f"sam.checkpoint: {config.variant} needs a checkpoint; give the path of one (`samfed "
            "fetch` gets the official ones)"
        )
    if not path.is_file():
        raise DataError(f"{path}: no such checkpoint; check sam.checkpoint in params.yaml")
    return path, file_sha256(path)


def note_unofficial(config: SamConfig) -> None:
    """Log one line if the weights are random, or other than the official ones of the variant."""
    path, digest = base_checkpoint(config)
    if path is None:
        log.warning(
            "sam.checkpoint: null, so that %s starts from random weights and learns from the "
            "server's images alone; give the backbone's timm weights",
            config.variant,
        )
    if digest != OFFICIAL_SHA256.get(config.variant, digest):
        log.info(
            "%s: not the official %s checkpoint (sha256 %s...); used as it is, and named by its "
            "sha256 in the card",
            path,
            config.variant,
            digest[:12],
        )


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
    if config.variant == MOBILE_SAM:
        state = from_mobile_sam(state)
    if config.variant.startswith("timm:"):
        module = sam.image_encoder.backbone
        wanted = module.state_dict()
        # a classifier, and whatever lies behind the last feature map, is not used
        state = {name: value for name, value in state.items() if name in wanted}
    else:
        state = _deal_mask_tokens(path, state, num_classes + 1)
    fault = misfit(state, module.state_dict())
    if fault is not None:
        found = "" if module is not sam else _looks_like(state)
        raise DataError(f"{path}: {fault}; {_expectation(config.variant, found)}")
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
    parts = []
    for what, names in faults.items():
        shown = ", ".join(f"'{name}'" for name in names[:_NAMED])
        more = ", ..." if len(names) > _NAMED else ""
        parts += [f"{len(names)} {what} ({shown}{more})"] if names else []
    return ", ".join(parts) or None


def _expectation(variant: str, found: str) -> str:
    """Say what a checkpoint should be, and where it looks like something else, what it is."""
    if found.endswith(f" {variant}"):
        return f"expected the tensors of {variant}, all of them and no others"
    return f"expected {variant}" + (f", found {found}" if found else "")


def _looks_like(state: Mapping[str, Tensor]) -> str:
    """Say which variant has an encoder of this width and depth."""
    if any(name.startswith(("image_encoder.layers.", "image_encoder.stages.")) for name in state):
        return f"what looks like {MOBILE_SAM}"
    patches = state.get("image_encoder.patch_embed.proj.weight")
    if patches is None:
        return "no encoder of SAM"
    prefix = "image_encoder.blocks."
    depth = len({name.split(".")[2] for name in state if name.startswith(prefix)})
    width = len(patches)
    for variant, sizes in ENCODERS.items():
        if (sizes["embed_dim"], sizes["depth"]) == (width, depth):
            return f"what looks like {variant}"
    return f"an encoder of width {width} and depth {depth}"


def load_state(path: Path) -> State:
    """Read a checkpoint's tensors without ever executing code from it.

    Tensors that a training run wrapped (``{"model": ...}``, ``module.``) get their own names back.

    Raises:
        DataError: the file is missing, damaged, or holds no table of tensors. OSError: it cannot be
        read.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such checkpoint; check the path in params.yaml (sam.*)")
    path.open("rb").close()  # what cannot be opened is not damaged
    try:
        state: object = (
            safetensors.torch.load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # safetensors and torch raise many kinds for a damaged file
        raise DataError(
            f"{path}: not a readable checkpoint ({type(error).__name__}); expected safetensors or "
            "a torch file of plain tensors"
        ) from error
    tensors = _unprefixed(_unwrapped(path, state))
    fault = not_finite(tensors)
    if fault is not None:
        raise DataError(f"{path}: {fault}; the training that wrote it has diverged")
    return tensors


def _unwrapped(path: Path, state: object) -> State:
    """Return the table of tensors in what ``torch.load`` returned."""
    while isinstance(state, dict):
        inside = [state[key] for key in _WRAPPERS if isinstance(state.get(key), dict)]
        if not inside:
            break
        state = inside[0]
    advice = "expected tensors by name; save the model's own state_dict()"
    if not isinstance(state, dict):
        raise DataError(f"{path}: holds a {type(state).__name__}; {advice}")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise DataError(f"{path}: {name!r} holds a {type(value).__name__}; {advice}")
    return state


def _unprefixed(state: State) -> State:
    """Drop the prefixes that all names share."""
    while prefix := next(
        (p for p in _PREFIXES if state and all(n.startswith(p) for n in state)), None
    ):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state
