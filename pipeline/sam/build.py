"""Building SAMs: segment-anything's own classes by variant, and timm backbones in their place.

Every teacher is a ``segment_anything`` ``Sam``: an image encoder, a prompt encoder and a mask
decoder. ``vit_b``, ``vit_l`` and ``vit_h`` are the official sizes; ``vit_t`` is the tiny one that
this package ships; ``mobile_sam`` has MobileSAM's encoder, and ``timm:<name>`` puts a timm feature
backbone in the encoder's place.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn

from pipeline.errors import ConfigError, first_line
from pipeline.sam.attention import ImageEncoder, fold_attention
from pipeline.sam.tiny_vit import TinyVitEncoder

STRIDE = 16  # pixels of the input per cell of the embedding, in every variant
IOU_HEAD_DEPTH = 3
MOBILE_SAM = "mobile_sam"


def _vit(dim: int, depth: int, heads: int, blocks: tuple[int, ...], **more: Any) -> dict[str, Any]:
    """Return arguments of ``ImageEncoderViT``, whose defaults are the other official sizes."""
    sizes = {"embed_dim": dim, "depth": depth, "num_heads": heads, "global_attn_indexes": blocks}
    return {"img_size": 1024, "window_size": 14, **sizes, **more}


ENCODERS = {
    "vit_t": _vit(128, 6, 4, (2, 5), img_size=256, window_size=8, mlp_ratio=3.0, out_chans=64),
    "vit_b": _vit(768, 12, 12, (2, 5, 8, 11)),
    "vit_l": _vit(1024, 24, 16, (5, 11, 17, 23)),
    "vit_h": _vit(1280, 32, 16, (7, 15, 23, 31)),
}


@dataclass(frozen=True)
class Decoder:
    """The sizes of the prompt encoder and the mask decoder; the defaults are the official ones."""

    dim: int = 256
    mlp_dim: int = 2048
    iou_hidden_dim: int = 256


_SMALL_DECODERS = {"vit_t": Decoder(64, 256, 64), "timm": Decoder(256, 1024, 256)}


class TimmImageEncoder(nn.Module):
    """A timm feature pyramid summed at stride 16, with segment-anything's neck behind it.

    Levels at strides 8, 16 and 32 are projected to ``out_channels``, resized to the stride-16 grid
    and added, so fine and coarse features both reach the mask decoder.
    """

    def __init__(self, name: str, *, img_size: int, out_channels: int) -> None:
        super().__init__()
        self.img_size = img_size
        try:
            self.backbone = timm.create_model(name, features_only=True, pretrained=False)
        except Exception as error:  # timm raises RuntimeError, ValueError or AttributeError here
            raise ConfigError(
                f"sam.variant: 'timm:{name}' is no timm model with feature maps "
                f"({first_line(error)}); see timm.list_models()"
            ) from error
        strides = self.backbone.feature_info.reduction()
        channels = self.backbone.feature_info.channels()
        self.levels = [i for i, stride in enumerate(strides) if stride in (8, 16, 32)]
        if not self.levels:
            raise ConfigError(
                f"sam.variant: 'timm:{name}' has feature maps at strides {strides}; "
                "expected one at 8, 16 or 32; choose a pyramid backbone"
            )
        self.projections = nn.ModuleList(
            nn.Conv2d(channels[i], out_channels, kernel_size=1) for i in self.levels
        )
        self.neck = nn.Sequential(
            LayerNorm2d(out_channels),
            nn.GELU(),
            nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
            LayerNorm2d(out_channels),
        )
        # depthwise convolutions run about twice as fast with channels last
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        """Encode ``x`` (B, 3, S, S) float, normalised, into (B, out_channels, S/16, S/16)."""
        size = (x.shape[-2] // STRIDE, x.shape[-1] // STRIDE)
        features = self.backbone(x.contiguous(memory_format=torch.channels_last))
        total: Tensor | None = None
        for level, projection in zip(self.levels, self.projections, strict=True):
            projected = projection(features[level])
            if projected.shape[-2] > size[0]:
                projected = F.adaptive_avg_pool2d(projected, size)
            elif projected.shape[-2:] != size:
                projected = F.interpolate(projected, size, mode="bilinear", align_corners=False)
            total = projected if total is None else total + projected
        out: Tensor = self.neck(total)
        return out


def build_sam(variant: str, *, input_size: int | None = None, num_multimask: int = 3) -> Sam:
    """Build an untrained SAM of ``variant`` with exact fused attention, for frames of any shape.

    Args:
        variant: ``vit_t``, ``vit_b``, ``vit_l``, ``vit_h``, ``mobile_sam`` or ``timm:<name>``.
        input_size: side of the square input in pixels, a multiple of 32; the variant's own if None.
            Only ``mobile_sam`` and ``timm:`` encoders take another than their own.
        num_multimask: masks beside the first that the decoder predicts (K for K classes).

    Raises:
        ConfigError: the variant is unknown or the input size does not fit it.
    """
    if variant.startswith("timm:"):
        return _build_timm(variant.removeprefix("timm:"), input_size or 256, num_multimask)
    if variant == MOBILE_SAM:
        _check_multiple(input_size or 1024)
        encoder = TinyVitEncoder(img_size=input_size or 1024, out_channels=Decoder.dim)
        return _assemble(encoder, Decoder(), num_multimask)
    if variant not in ENCODERS:
        known = ", ".join([*ENCODERS, MOBILE_SAM])
        raise ConfigError(
            f"sam.variant: '{variant}' is unknown; expected {known} or timm:<backbone>"
        )
    own_size = ENCODERS[variant]["img_size"]
    if input_size not in (None, own_size):
        raise ConfigError(
            f"sam.input_size: {input_size} does not fit {variant}, whose position embedding is "
            f"made for {own_size}; leave it null"
        )
    norm = partial(nn.LayerNorm, eps=1e-6)
    vit = ImageEncoder(**ENCODERS[variant], patch_size=STRIDE, norm_layer=norm, use_rel_pos=True)
    decoder = _SMALL_DECODERS.get(variant, Decoder())
    return _assemble(fold_attention(vit), decoder, num_multimask)


def _check_multiple(input_size: int) -> None:
    if input_size % 32:
        raise ConfigError(f"sam.input_size: {input_size} is not a multiple of 32")


def _build_timm(name: str, input_size: int, num_multimask: int) -> Sam:
    _check_multiple(input_size)
    decoder = _SMALL_DECODERS["timm"]
    encoder = TimmImageEncoder(name, img_size=input_size, out_channels=decoder.dim)
    sam = _assemble(encoder, decoder, num_multimask)
    config = encoder.backbone.default_cfg
    for buffer, values in ((sam.pixel_mean, config["mean"]), (sam.pixel_std, config["std"])):
        buffer.copy_(torch.tensor(values).view(3, 1, 1) * 255.0)
    return sam


def _assemble(encoder: nn.Module, sizes: Decoder, num_multimask: int) -> Sam:
    """Put SAM's prompt encoder and mask decoder behind ``encoder``."""
    side: int = encoder.img_size  # type: ignore[assignment]
    return Sam(
        image_encoder=encoder,
        prompt_encoder=PromptEncoder(
            embed_dim=sizes.dim,
            image_embedding_size=(side // STRIDE, side // STRIDE),
            input_image_size=(side, side),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=num_multimask,
            transformer=TwoWayTransformer(
                depth=2, embedding_dim=sizes.dim, mlp_dim=sizes.mlp_dim, num_heads=8
            ),
            transformer_dim=sizes.dim,
            iou_head_depth=IOU_HEAD_DEPTH,
            iou_head_hidden_dim=sizes.iou_hidden_dim,
        ),
    )


def no_mask(sam: Sam, embeddings: Tensor) -> Tensor:
    """Return the dense prompt (B, C, h, w) that says there is no mask, for these embeddings."""
    dense: Tensor = sam.prompt_encoder.no_mask_embed.weight[:, :, None, None]
    return dense.to(embeddings).expand_as(embeddings)


def decode_masks(
    sam: Sam, embeddings: Tensor, sparse: Tensor, dense: Tensor
) -> tuple[Tensor, Tensor]:
    """Decode all mask tokens of ``B`` (image, prompt) pairs in one pass of the mask decoder.

    segment-anything's ``predict_masks`` expects one image and many prompts and repeats the image
    for each; given B images it would repeat them B x B. Here pair ``i`` is ``embeddings[i]`` with
    ``sparse[i]`` and ``dense[i]``.

    Args:
        embeddings: (B, C, h, w) float, from the image encoder.
        sparse: (B, P, C) float, prompt tokens; P may be 0.
        dense: (B, C, h, w) float.

    Returns:
        logits (B, tokens, 4h, 4w) and IoU estimates (B, tokens), tokens = num_multimask + 1.
    """
    decoder = sam.mask_decoder
    batch = embeddings.shape[0]
    tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight], dim=0)
    tokens = torch.cat([tokens.unsqueeze(0).expand(batch, -1, -1), sparse], dim=1)
    source = embeddings + dense
    height, width = source.shape[-2:]  # of a content frame, less than the whole
    position = sam.prompt_encoder.get_dense_pe()[:, :, :height, :width]
    position = position.to(source.dtype).expand(batch, -1, -1, -1)
    hidden, source = decoder.transformer(source, position, tokens)
    upscaled = decoder.output_upscaling(source.transpose(1, 2).reshape(embeddings.shape))
    hyper = torch.stack(
        [mlp(hidden[:, 1 + i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)], dim=1
    )
    masks = (hyper @ upscaled.flatten(2)).unflatten(2, upscaled.shape[-2:])
    return masks, decoder.iou_prediction_head(hidden[:, 0])
