"""The teacher: images in, label maps in the client's frame out.

It is adapted and needs no prompts, or it is SAM as it comes, prompted by a grid of points.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

import safetensors.torch
import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam
from torch import Tensor, nn

from pipeline.config import Config, PrecomputeConfig
from pipeline.data.partition import Partition
from pipeline.disk import file_sha256
from pipeline.errors import ConfigError, IdentityError, StageError
from pipeline.runtime import has_fast_bf16, resolve_device
from pipeline.sam.build import decode_masks, no_mask
from pipeline.sam.checkpoints import base_checkpoint, build_base, misfit
from pipeline.sam.device import Download, Image, Upload, page_locked, plain_float32
from pipeline.sam.frame import (
    fit_longest_side,
    frame_patch,
    groups_of_frames,
    inside_image,
    to_client_frame,
)
from pipeline.sam.int8 import has_vnni, quantise
from pipeline.sam.lora import add_adapter, merge_lora
from pipeline.sam.packed import pack
from pipeline.sam.prompts import MULTIMASK, PointGrid, check_views
from pipeline.sam.tuning import tune, tuning
from pipeline.sam.views import Seen, in_order, mean_of_views
from pipeline.stores.pseudo_labels import PseudoLabels
from pipeline.stores.teacher_card import TeacherCard, label_precision, load_card

ADAPTER_FILE = "adapter.safetensors"
BASE_FILE = "base.safetensors"  # SAM's own weights, where they came with the server's teacher
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def encode(
    sam: Sam, pixels: Tensor, inside: Tensor, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return image embeddings (B, C, h/16, w/16) float32 of a whole batch.

    As in SAM, padding is zero after normalisation.

    Args:
        pixels: (B, 3, h, w) in 0..255, padded. inside: (B, h, w) bool, False in the padding.
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
    """Run the prompt-free teacher on a whole batch; arguments as ``encode``'s.

    Returns:
        logits (B, K+1, h/4, w/4) and IoU estimates (B, K+1).
    """
    embeddings = encode(sam, pixels, inside, dtype=dtype)
    batch, dim = embeddings.shape[:2]  # len() would fix the size of an exported graph's batch
    sparse = embeddings.new_zeros((batch, 0, dim))
    return decode_masks(sam, embeddings, sparse, no_mask(sam, embeddings))


def image_score(masks: Tensor, iou: Tensor) -> Tensor:
    """Return one IoU estimate an image: the mean over the foreground classes that its mask shows.

    An image whose mask is all background gets the background's estimate.

    Args:
        masks: (B, S, S) int64 class indices. iou: (B, K+1) float.
    """
    present = F.one_hot(masks.flatten(1), iou.shape[1]).any(dim=1)
    present[:, 0] = ~present[:, 1:].any(dim=1)
    return (iou * present).sum(dim=1) / present.sum(dim=1)


def to_labels(probabilities: Tensor, iou: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the label store holds of a batch, as tensors.

    Args:
        probabilities: (B, K+1, S, S) float32 in the client's frame. iou: (B, K+1) float32.

    Returns:
        masks (B, S, S) uint8, confidences (B, S, S) uint8 in 0..255, predicted_iou (B,) float32,
        NaN where a probability was not finite, which 8 bits could not tell.
    """
    confidences, masks = probabilities.max(dim=1)
    levels = (confidences * 255).round().clamp(0, 255).to(torch.uint8)
    broken = ~confidences.isfinite().flatten(1).all(dim=1)
    return masks.to(torch.uint8), levels, image_score(masks, iou).masked_fill(broken, torch.nan)


def to_arrays(seen: Seen, *, views: int, probabilities: bool) -> dict[str, Tensor]:
    """Return ``PseudoLabels`` of what was seen, as tensors by name.

    Args:
        views: of which it is the mean. probabilities: whether to keep those of every class.
    """
    names = ("masks", "confidences", "predicted_iou")
    arrays = dict(zip(names, to_labels(seen.probabilities, seen.iou), strict=True))
    if views > 1:
        arrays |= {"view_agreement": seen.agreement, "flip_dice": seen.flip_dice}
    if probabilities:
        levels = (seen.probabilities * 255).round().clamp(0, 255)
        arrays["probabilities"] = levels.to(torch.uint8)
    return arrays


def resolve_precision(precision: str, device: torch.device, variant: str) -> str:
    """Return what the encoder computes in: ``fp32``, ``bf16``, ``fp16`` or ``int8``.

    ``auto`` is bf16 where that is fast and keeps the masks (``label_precision``). Fast is a GPU
    with bfloat16, or a CPU with AMX or AVX512-bf16.

    Raises:
        ConfigError: fp16 on a CPU, which has no fast arithmetic for it, or int8 elsewhere than on a
        CPU that has.
    """
    if precision == "auto":
        return label_precision(variant, "auto") or ("bf16" if has_fast_bf16(device) else "fp32")
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("precompute.precision: fp16 needs a GPU; use auto, bf16 or fp32")
    if precision == "int8" and device.type != "cpu":
        raise ConfigError("precompute.precision: int8 is for CPUs; use auto, bf16 or fp16 on a GPU")
    if precision == "int8" and not has_vnni():
        raise ConfigError(
            "precompute.precision: int8 needs a CPU with VNNI (avx512_vnni, avx_vnni or amx_int8), "
            "which this one lacks; use auto"
        )
    return precision


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
        prompter: PointGrid | None = None,
    ) -> None:
        self.card = card
        self.prompter = prompter
        self.device = resolve_device(device)
        self.precision = resolve_precision(precision, self.device, card.variant)
        # what is between linear layers in 8 bits
        others = precision if self.precision != "int8" else "auto"
        self.dtype = _DTYPES[resolve_precision(others, self.device, card.variant)]
        self.sam = sam.eval().requires_grad_(False).to(self.device)
        self._upload = Upload(self.device)
        self.tuning: dict[str, str] = {}
        self.views = 1  # of each image, whose mean its label is
        self.keeps_probabilities = False  # of every class, with the labels
        if self.precision == "int8":
            quantise(self.sam.image_encoder, dtype=self.dtype)
        elif (
            self.dtype == torch.bfloat16
            and self.device.type == "cpu"
            and has_fast_bf16(self.device)
        ):
            pack(self.sam.image_encoder)
        for module in self.sam.image_encoder.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(self.dtype)  # else autocast would cast these weights for every batch

    def tune(self, run: PrecomputeConfig) -> Teacher:
        """Run as these settings ask for it; return the teacher.

        A prompt picks one mask of an image, so that a prompted teacher has one view.

        Raises:
            ConfigError: the device or the encoder does not have what is asked for.
        """
        if run.residual == "bf16" and self.precision != "bf16":
            raise ConfigError(
                f"precompute.residual: bf16 asked for, but the encoder computes in "
                f"{self.precision}; set precompute.precision to bf16, or precompute.residual to "
                "fp32"
            )
        self.sam.image_encoder = tune(self.sam.image_encoder, run, self.device)
        self.tuning = tuning(run)
        self.views = run.views if self.prompter is None else 1
        self.keeps_probabilities = run.keeps_probabilities(self.card.num_classes)
        return self

    def provenance(self) -> dict[str, str]:
        """Return what computes the labels; recorded with them, no part of their identity."""
        return {
            "backend": "torch",
            "precision": self.precision,
            "device": self.device.type,
            "torch": version("torch"),
            "samfed": version("samfed"),
            **self.tuning,
        }

    def staged(self, image: Image) -> Image:
        """Resize an image as ``label`` does, and put it where the device copies it from.

        It may be called by any thread, while the teacher is at work on other images.
        """
        image = fit_longest_side(image, self.card.input_size)
        return page_locked(image) if self.device.type == "cuda" else image

    def probabilities(
        self, images: Sequence[Image], size_hw: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Return class probabilities (B, K+1, *size_hw) and IoU estimates (B, K+1), float32."""
        seen = self.see(images, size_hw)
        return seen.probabilities, seen.iou

    @torch.inference_mode()
    @plain_float32()
    def see(self, images: Sequence[Image], size_hw: tuple[int, int]) -> Seen:
        """Return the mean of the images' views in a frame of ``size_hw``.

        Images of one frame share a pass.
        """
        side, patch = self.card.input_size, frame_patch(self.card)
        groups, parts = groups_of_frames(images, side, patch), []
        for group in groups:
            frames = self._upload([images[place] for place in group], side, patch)
            parts.append(mean_of_views(self._one_view, *frames, size_hw, views=self.views))
        return in_order(parts, groups)

    def _one_view(
        self, pixels: Tensor, valid_hw: Tensor, size_hw: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Return probabilities and IoU estimates of images in one frame, as they lie in it."""
        inside = inside_image(valid_hw, pixels.shape[-2:])
        if self.prompter is None:
            logits, iou = forward(self.sam, pixels, inside, dtype=self.dtype)
        else:
            embeddings = encode(self.sam, pixels, inside, dtype=self.dtype)
            logits, iou = self.prompter(self.sam, embeddings, valid_hw)
        return to_client_frame(logits, valid_hw, size_hw), iou.float()

    def begin(self, images: Sequence[Image], size: int) -> Download:
        """Begin to label (H, W, 3) uint8 images of any sizes, in the client's frame ``size``."""
        seen = self.see(images, (size, size))
        asked = self.keeps_probabilities
        return Download(to_arrays(seen, views=self.views, probabilities=asked), images)

    def label(self, images: Sequence[Image], size: int) -> PseudoLabels:
        """Label images as ``begin`` does, and wait for it."""
        return self.begin(images, size).result()


def checked_card(settings: Config, partition: Partition) -> TeacherCard:
    """Read the card of ``cache/teacher``, which must be what settings and partition ask for.

    Raises:
        StageError: not fine-tuned yet. IdentityError: the card is not what params.yaml asks for.
        ConfigError: several views of a prompted teacher.
    """
    check_views(settings)
    folder = settings.cache.root / "teacher"
    card = load_card(folder)
    server = partition.server_sha256() if partition.has_public else None
    card.check(settings, server, path=folder)
    if server is None and (card.is_whole or settings.precompute.backend == "onnx"):
        return card  # a site has no use for the checkpoint
    _, found = base_checkpoint(_with_base(settings, card).sam)
    expected = card.base_copy_sha256 or card.base_sha256
    if found != expected:
        way = "run `samfed finetune-sam`"
        if server is None:
            way = "give the server's checkpoint, or import a teacher that was exported with --base"
        raise IdentityError(
            f"{folder}: base_sha256 is {expected}, the settings ask for {found}; {way}"
        )
    return card


def _with_base(settings: Config, card: TeacherCard) -> Config:
    """Return the settings with the weights that SAM starts from, as far as they came along."""
    if card.base_copy_sha256 is None:
        return settings
    copy = settings.cache.root / "teacher" / BASE_FILE
    sam = settings.sam.model_copy(update={"checkpoint": copy})
    return settings.model_copy(update={"sam": sam})


def load_teacher(settings: Config, partition: Partition) -> Teacher:
    """Build the teacher of ``cache/teacher`` for inference, as ``precompute`` asks.

    Raises:
        StageError: not fine-tuned yet. IdentityError: the card is not what params.yaml asks for,
        or the adapter's file is not the one that the card was written for, or not of this teacher.
    """
    card = checked_card(settings, partition)
    settings = _with_base(settings, card)
    if card.prompt != "none":
        return load_zero_shot(settings, card)
    path = settings.cache.root / "teacher" / ADAPTER_FILE
    if not path.is_file():
        raise StageError(f"{path}: not found; run `samfed finetune-sam` first")
    if file_sha256(path) != card.adapter_sha256:
        raise IdentityError(f"{path}: sha256 differs from its card; run `samfed finetune-sam`")
    start = settings.sam
    if card.is_whole:  # nothing of it is kept, and at a site it need not be there
        start = start.model_copy(update={"checkpoint": None})
    sam = build_base(start, num_classes=card.num_classes)
    names = add_adapter(sam, card.lora_rank)
    state, whole = safetensors.torch.load_file(path), sam.state_dict()
    fault = misfit(state, {name: whole[name] for name in names})
    if fault is not None:
        raise IdentityError(f"{path}: {fault}; run `samfed finetune-sam` again")
    sam.load_state_dict(state, strict=False)  # the frozen encoder is not in it
    merge_lora(sam)
    run = settings.precompute
    return Teacher(sam, card, device=run.device, precision=run.precision).tune(run)


def load_zero_shot(settings: Config, card: TeacherCard) -> Teacher:
    """Build SAM as it comes, prompted by the policy of ``card``; no adapter is read.

    Raises:
        ConfigError: the variant's checkpoint is not given.
    """
    sam = build_base(settings.sam, num_classes=MULTIMASK)  # its tokens as they were pretrained
    prompter, run = PointGrid(int(card.prompt.removeprefix("points:"))), settings.precompute
    teacher = Teacher(sam, card, device=run.device, precision=run.precision, prompter=prompter)
    return teacher.tune(run)
