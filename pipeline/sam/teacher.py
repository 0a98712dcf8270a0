"""The teacher: images in, label maps in the client's frame out.

It is adapted and needs no prompts, or it is SAM as it comes and has a ``Prompter``.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal, cast

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from segment_anything.modeling import Sam
from torch import Tensor, nn

from pipeline.config import Config, SamConfig
from pipeline.data.partition import Partition
from pipeline.disk import file_sha256
from pipeline.errors import ConfigError, DataError, IdentityError, StageError
from pipeline.runtime import resolve_device
from pipeline.sam.build import (
    EMBEDDED_WEIGHTS,
    OFFICIAL_SHA256,
    build_sam,
    decode_masks,
    load_state,
)
from pipeline.sam.coarse import load_coarse
from pipeline.sam.frame import to_input_frame
from pipeline.sam.lora import add_lora, merge_lora
from pipeline.sam.prompts import MULTIMASK, CoarseBox, PointGrid, Prompter
from pipeline.stores.label_store import PseudoLabels
from pipeline.stores.teacher_card import TeacherCard, label_precision, load_card

ADAPTER_FILE = "adapter.safetensors"
LOGIT_STRIDE = 4  # input pixels per cell of the low-resolution logits

Precision = Literal["fp32", "bf16", "fp16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def base_checkpoint(config: SamConfig) -> tuple[Path | None, str]:
    """The pretrained weights that the variant starts from, and their identity (see the card).

    Raises:
        ConfigError: a checkpoint is needed, or is not the official one. DataError: it is missing.
    """
    if config.variant == "vit_t" and config.checkpoint is None:
        return EMBEDDED_WEIGHTS, file_sha256(EMBEDDED_WEIGHTS)
    if config.checkpoint is None:
        if config.variant.startswith("timm:"):
            return None, "random"
        raise ConfigError(
            f"sam.checkpoint: {config.variant} needs the official checkpoint; download it from "
            "segment-anything's page and give its path"
        )
    if not config.checkpoint.is_file():
        raise DataError(
            f"{config.checkpoint}: no such checkpoint; check sam.checkpoint in params.yaml"
        )
    digest = file_sha256(config.checkpoint)
    official = OFFICIAL_SHA256.get(config.variant)
    if official is not None and digest != official:
        raise DataError(
            f"{config.checkpoint}: sha256 is {digest[:12]}..., the official {config.variant} "
            f"checkpoint's is {official[:12]}...; download it again"
        )
    return config.checkpoint, digest


def build_base(config: SamConfig, *, num_classes: int) -> Sam:
    """A SAM of the configured variant with its pretrained weights and K+1 mask tokens."""
    sam = build_sam(config.variant, input_size=config.input_size, num_multimask=num_classes)
    checkpoint, _ = base_checkpoint(config)
    if checkpoint is None:
        return sam
    state = {name: value.float() for name, value in load_state(checkpoint).items()}
    if config.variant.startswith("timm:"):
        _load_backbone(sam.image_encoder.backbone, state, checkpoint)
    else:
        _load_sam(sam, state, checkpoint)
    return sam


def _load_backbone(backbone: nn.Module, state: dict[str, Tensor], checkpoint: Path) -> None:
    """Load timm weights; a classifier in the file is not used."""
    wanted = backbone.state_dict()
    missing = [name for name in wanted if name not in state]
    wrong = [name for name in wanted if name in state and wanted[name].shape != state[name].shape]
    if missing or wrong:
        name = (missing or wrong)[0]
        raise DataError(
            f"{checkpoint}: '{name}' is {'missing' if missing else 'of another shape'}; expected "
            "the weights of the backbone that sam.variant names"
        )
    backbone.load_state_dict({name: state[name].to(wanted[name].dtype) for name in wanted})


def _load_sam(sam: Sam, state: dict[str, Tensor], checkpoint: Path) -> None:
    """Load SAM's weights; its four mask tokens are dealt to the K+1 classes in turn."""
    own = sam.state_dict()
    tokens = sam.mask_decoder.num_mask_tokens
    source = state.get("mask_decoder.mask_tokens.weight")
    if source is None:
        raise DataError(f"{checkpoint}: no mask decoder in it; expected a SAM checkpoint")
    pick = [i % len(source) for i in range(tokens)]
    for name in ("mask_decoder.mask_tokens.weight", *_iou_output_layers(state)):
        state[name] = state[name][pick]
    hyper = "mask_decoder.output_hypernetworks_mlps."
    mlps = {name: value for name, value in state.items() if name.startswith(hyper)}
    state = {name: value for name, value in state.items() if name not in mlps}
    for target, origin in enumerate(pick):
        prefix = f"{hyper}{origin}."
        for name, value in mlps.items():
            if name.startswith(prefix):
                state[f"{hyper}{target}.{name.removeprefix(prefix)}"] = value
    for name, value in own.items():
        if name not in state or state[name].shape != value.shape:
            raise DataError(f"{checkpoint}: '{name}' is missing or of another shape")
    sam.load_state_dict({name: state[name] for name in own})


def _iou_output_layers(state: dict[str, Tensor]) -> list[str]:
    head = "mask_decoder.iou_prediction_head.layers."
    last = max(
        int(name.removeprefix(head).split(".")[0]) for name in state if name.startswith(head)
    )
    return [f"{head}{last}.weight", f"{head}{last}.bias"]


def inside_image(valid_hw: Tensor, size: int) -> Tensor:
    """Which pixels of the padded frame belong to the image: (B, size, size) bool."""
    steps = torch.arange(size, device=valid_hw.device)
    rows = steps[None, :, None] < valid_hw[:, 0, None, None]
    return rows & (steps[None, None, :] < valid_hw[:, 1, None, None])


def encode(
    sam: Sam, pixels: Tensor, inside: Tensor, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Image embeddings (B, C, S/16, S/16) float32 of a whole batch.

    As in SAM, padding is zero after normalisation.

    Args:
        pixels: (B, 3, S, S) in 0..255, padded. inside: (B, S, S) bool, False in the padding.
        dtype: what the encoder computes in. What comes after it is a hundredth of the work and
            always float32: in bfloat16 it would double the error of the logits.
    """
    values = (pixels.to(sam.pixel_mean.dtype) - sam.pixel_mean) / sam.pixel_std
    with torch.autocast(pixels.device.type, dtype=dtype, enabled=dtype != torch.float32):
        embeddings: Tensor = sam.image_encoder(values * inside[:, None])
    return embeddings.float()


def forward(
    sam: Sam, pixels: Tensor, inside: Tensor, *, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Prompt-free forward pass of a whole batch; arguments as ``encode``'s.

    Returns:
        logits (B, K+1, S/4, S/4) and IoU estimates (B, K+1).
    """
    embeddings = encode(sam, pixels, inside, dtype=dtype)
    batch, dim, height, width = embeddings.shape
    sparse = embeddings.new_zeros((batch, 0, dim))
    dense = sam.prompt_encoder.no_mask_embed.weight.reshape(1, dim, 1, 1)
    dense = dense.expand(batch, dim, height, width)
    return decode_masks(sam, embeddings, sparse, dense)


def to_client_frame(logits: Tensor, valid_hw: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Class probabilities, cropped to each image and resized to ``size_hw``.

    Args:
        logits: (B, K+1, h, w) low-resolution logits of the padded frame.

    Returns:
        (B, K+1, *size_hw) float32, summing to one over the classes.
    """
    probabilities = logits.float().softmax(dim=1)
    height, width = probabilities.shape[-2:]
    grids = []
    for axis, (cells, out) in enumerate(((height, size_hw[0]), (width, size_hw[1]))):
        valid = valid_hw[:, axis, None].float() / LOGIT_STRIDE  # cells that lie in the image
        centre = (torch.arange(out, device=logits.device) + 0.5) / out
        # never beyond the image's last cell: what lies in the padding is no prediction
        cell = torch.minimum(centre * valid, (valid - 0.5).clamp(min=0.5))
        grids.append(cell * 2 / cells - 1)
    rows = grids[0][:, :, None].expand(-1, -1, size_hw[1])
    cols = grids[1][:, None, :].expand(-1, size_hw[0], -1)
    grid = torch.stack([cols, rows], dim=-1)
    sampled: Tensor = F.grid_sample(
        probabilities, grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    return sampled


def image_score(masks: Tensor, iou: Tensor) -> Tensor:
    """One IoU estimate an image: the mean over the foreground classes that its mask shows.

    An image whose mask is all background gets the background's estimate.

    Args:
        masks: (B, S, S) int64 class indices. iou: (B, K+1) float.
    """
    classes = iou.shape[1]
    present = F.one_hot(masks.flatten(1), classes).any(dim=1)
    present[:, 0] = ~present[:, 1:].any(dim=1)
    return (iou * present).sum(dim=1) / present.sum(dim=1)


def to_labels(probabilities: Tensor, iou: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the label store holds of a batch, as tensors.

    Args:
        probabilities: (B, K+1, S, S) float32 in the client's frame. iou: (B, K+1) float32.

    Returns:
        masks (B, S, S) uint8, confidences (B, S, S) uint8 in 0..255, predicted_iou (B,) float32.
    """
    confidences, masks = probabilities.max(dim=1)
    levels = (confidences * 255).round().clamp(0, 255).to(torch.uint8)
    return masks.to(torch.uint8), levels, image_score(masks, iou)


def resolve_precision(precision: str, device: torch.device, variant: str) -> Precision:
    """What the encoder computes in; ``auto`` is bf16 where that is fast and keeps the masks.

    SAM's own encoders keep them (mask IoU to fp32 above 0.99, ``benchmarks/stage_one.py``); the
    convolutional ``timm:`` ones do not, so they stay at fp32 unless asked. Fast is a GPU with
    bfloat16, or a CPU with AMX or AVX512-bf16.

    Raises:
        ConfigError: fp16 on a CPU, which has no fast arithmetic for it.
    """
    if precision == "auto":
        precision = label_precision(variant, "auto") or ("bf16" if _has_bf16(device) else "fp32")
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("precompute.precision: fp16 needs a GPU; use auto, bf16 or fp32")
    return cast(Precision, precision)


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    able = torch.cpu.get_capabilities()
    return bool(able.get("amx_bf16") or able.get("avx512_bf16"))


def _store_weights(encoder: nn.Module, dtype: torch.dtype) -> None:
    """Hold what autocast would cast for every batch in ``dtype``; the rest stays float32."""
    for module in encoder.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(dtype)


class Teacher:
    """A teacher ready for inference: LoRA merged, evaluation mode, one device and precision.

    ``prompter`` is None for an adapted teacher.
    """

    def __init__(
        self,
        sam: Sam,
        card: TeacherCard,
        *,
        device: str,
        precision: str,
        prompter: Prompter | None = None,
    ) -> None:
        self.card = card
        self.prompter = prompter
        self.device = resolve_device(device)
        self.precision = resolve_precision(precision, self.device, card.variant)
        self.dtype = _DTYPES[self.precision]
        self.sam = sam.eval().requires_grad_(False).to(self.device)
        if self.dtype != torch.float32:
            _store_weights(self.sam.image_encoder, self.dtype)

    def provenance(self) -> dict[str, str]:
        """What computes the labels; recorded with every shard, no part of their identity."""
        return {
            "backend": "torch",
            "precision": self.precision,
            "device": self.device.type,
            "torch": version("torch"),
            "samfed": version("samfed"),
        }

    @torch.inference_mode()
    def probabilities(
        self, images: Sequence[NDArray[np.uint8]], size_hw: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Class probabilities (B, K+1, *size_hw) float32 and IoU estimates (B, K+1) float32."""
        pixels, valid_hw = to_input_frame(images, self.card.input_size)
        pixels, valid_hw = pixels.to(self.device), valid_hw.to(self.device)
        inside = inside_image(valid_hw, pixels.shape[-1])
        if self.prompter is None:
            logits, iou = forward(self.sam, pixels, inside, dtype=self.dtype)
        else:
            embeddings = encode(self.sam, pixels, inside, dtype=self.dtype)
            logits, iou = self.prompter(self.sam, embeddings, pixels, valid_hw)
        return to_client_frame(logits, valid_hw, size_hw), iou.float()

    def label(self, images: Sequence[NDArray[np.uint8]], size: int) -> PseudoLabels:
        """Labels of (H, W, 3) uint8 images of any sizes, in the client's frame ``size``."""
        tensors = to_labels(*self.probabilities(images, (size, size)))
        masks, confidences, predicted_iou = (tensor.cpu().numpy() for tensor in tensors)
        return PseudoLabels(masks=masks, confidences=confidences, predicted_iou=predicted_iou)


def checked_card(settings: Config, partition: Partition) -> TeacherCard:
    """The card of ``cache/teacher``, found to be the one that settings and partition ask for.

    Raises:
        StageError: not fine-tuned yet. IdentityError: the card is not what params.yaml asks for.
    """
    folder = settings.cache.root / "teacher"
    card = load_card(folder)
    card.check(settings, partition.server_sha256(), path=folder)
    _, base_sha256 = base_checkpoint(settings.sam)
    if card.base_sha256 != base_sha256:
        raise IdentityError(
            f"{folder}: base_sha256 is {card.base_sha256}, the settings ask for {base_sha256}; "
            "run `samfed finetune-sam`"
        )
    return card


def load_teacher(settings: Config, partition: Partition) -> Teacher:
    """Build the teacher of ``cache/teacher`` for inference, as ``precompute`` asks.

    Raises:
        StageError: not fine-tuned yet. IdentityError: the card is not what params.yaml asks for,
        or the adapter's file is not the one that the card was written for.
    """
    folder = settings.cache.root / "teacher"
    card, config = checked_card(settings, partition), settings.sam
    if config.prompt != "none":
        return load_zero_shot(settings, card)
    adapter = folder / ADAPTER_FILE
    if not adapter.is_file():
        raise StageError(f"{adapter}: not found; run `samfed finetune-sam` first")
    if file_sha256(adapter) != card.adapter_sha256:
        raise IdentityError(f"{adapter}: sha256 differs from its card; run `samfed finetune-sam`")
    sam = build_base(config, num_classes=card.num_classes)
    if card.lora_rank is not None:
        add_lora(sam.image_encoder, card.lora_rank)
    sam.load_state_dict(safetensors.torch.load_file(adapter), strict=False)
    if card.lora_rank is not None:
        merge_lora(sam.image_encoder)
    run = settings.precompute
    return Teacher(sam, card, device=run.device, precision=run.precision)


def load_zero_shot(settings: Config, card: TeacherCard) -> Teacher:
    """SAM as it comes, prompted by the policy of ``card``; no adapter is read.

    Raises:
        ConfigError: the variant's checkpoint is not given. StageError, IdentityError: the coarse
        model that draws the boxes is missing, or not the one of the card.
    """
    run = settings.precompute
    sam = build_base(settings.sam, num_classes=MULTIMASK)  # its tokens as they were pretrained
    prompter = _make_prompter(settings, card)
    return Teacher(sam, card, device=run.device, precision=run.precision, prompter=prompter)


def _make_prompter(settings: Config, card: TeacherCard) -> Prompter:
    """What prompts SAM under the policy of ``card``."""
    kind, _, per_side = card.prompt.partition(":")
    if kind == "points":
        return PointGrid(int(per_side))
    folder = settings.cache.root / "teacher"
    model = load_coarse(settings, folder, sha256=card.coarse_sha256)
    return CoarseBox(model.to(resolve_device(settings.precompute.device)))
