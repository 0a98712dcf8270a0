"""Building SAMs: segment-anything's own classes by variant, and timm backbones in their place.

Every teacher is a ``segment_anything`` ``Sam``: an image encoder, a prompt encoder and a mask
decoder. ``vit_b``, ``vit_l`` and ``vit_h`` are the official sizes; ``vit_t`` is the tiny one that
this package ships; ``timm:<name>`` puts a timm feature backbone in the encoder's place.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn

from pipeline.errors import ConfigError, DataError
from pipeline.sam.attention import fold_attention

EMBEDDED_WEIGHTS = Path(__file__).parent / "weights" / "vit_t.safetensors"

#: sha256 of the official checkpoints (github.com/facebookresearch/segment-anything).
OFFICIAL_SHA256 = {
    "vit_b": "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    "vit_l": "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    "vit_h": "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
}

_MASK_IN_CHANNELS = 16
_STRIDE = 16  # pixels of the input per cell of the embedding, in every variant


@dataclass(frozen=True)
class Architecture:
    """The sizes that define a SAM variant."""

    input_size: int  # side of the square input, pixels
    embed_dim: int
    depth: int
    num_heads: int
    global_blocks: tuple[int, ...]
    window_size: int
    mlp_ratio: float
    prompt_dim: int
    decoder_mlp_dim: int
    iou_hidden_dim: int


def _official(embed_dim: int, depth: int, heads: int, blocks: tuple[int, ...]) -> Architecture:
    return Architecture(1024, embed_dim, depth, heads, blocks, 14, 4.0, 256, 2048, 256)


ARCHITECTURES = {
    "vit_t": Architecture(256, 128, 6, 4, (2, 5), 8, 3.0, 64, 256, 64),
    "vit_b": _official(768, 12, 12, (2, 5, 8, 11)),
    "vit_l": _official(1024, 24, 16, (5, 11, 17, 23)),
    "vit_h": _official(1280, 32, 16, (7, 15, 23, 31)),
}

#: The decoder that a ``timm:`` encoder gets: SAM's own at its own size.
_TIMM_PROMPT_DIM, _TIMM_DECODER_MLP_DIM, _TIMM_IOU_HIDDEN_DIM = 256, 1024, 256


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
                f"({_first_line(error)}); see timm.list_models()"
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
        size = (x.shape[-2] // _STRIDE, x.shape[-1] // _STRIDE)
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


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def build_sam(variant: str, *, input_size: int | None = None, num_multimask: int = 3) -> Sam:
    """An untrained SAM of ``variant`` with exact fused attention.

    Args:
        variant: ``vit_t``, ``vit_b``, ``vit_l``, ``vit_h`` or ``timm:<name>``.
        input_size: side of the square input in pixels, a multiple of 16; the variant's own if None.
            Only ``timm:`` encoders take another than their own.
        num_multimask: masks beside the first that the decoder predicts (K for K classes).

    Raises:
        ConfigError: the variant is unknown or the input size does not fit it.
    """
    if variant.startswith("timm:"):
        return _build_timm(variant.removeprefix("timm:"), input_size or 256, num_multimask)
    if variant not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ConfigError(
            f"sam.variant: '{variant}' is unknown; expected {known} or timm:<backbone>"
        )
    arch = ARCHITECTURES[variant]
    if input_size not in (None, arch.input_size):
        raise ConfigError(
            f"sam.input_size: {input_size} does not fit {variant}, whose position embedding is "
            f"made for {arch.input_size}; leave it null"
        )
    encoder = ImageEncoderViT(
        img_size=arch.input_size,
        patch_size=_STRIDE,
        embed_dim=arch.embed_dim,
        depth=arch.depth,
        num_heads=arch.num_heads,
        mlp_ratio=arch.mlp_ratio,
        out_chans=arch.prompt_dim,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=arch.window_size,
        global_attn_indexes=arch.global_blocks,
    )
    return _assemble(
        fold_attention(encoder),
        input_size=arch.input_size,
        prompt_dim=arch.prompt_dim,
        decoder_mlp_dim=arch.decoder_mlp_dim,
        iou_hidden_dim=arch.iou_hidden_dim,
        num_multimask=num_multimask,
    )


def _build_timm(name: str, input_size: int, num_multimask: int) -> Sam:
    if input_size % 32:
        raise ConfigError(f"sam.input_size: {input_size} is not a multiple of 32")
    sam = _assemble(
        TimmImageEncoder(name, img_size=input_size, out_channels=_TIMM_PROMPT_DIM),
        input_size=input_size,
        prompt_dim=_TIMM_PROMPT_DIM,
        decoder_mlp_dim=_TIMM_DECODER_MLP_DIM,
        iou_hidden_dim=_TIMM_IOU_HIDDEN_DIM,
        num_multimask=num_multimask,
    )
    config = sam.image_encoder.backbone.default_cfg
    for buffer, values in ((sam.pixel_mean, config["mean"]), (sam.pixel_std, config["std"])):
        buffer.copy_(torch.tensor(values).view(3, 1, 1) * 255.0)
    return sam


def _assemble(
    encoder: nn.Module,
    *,
    input_size: int,
    prompt_dim: int,
    decoder_mlp_dim: int,
    iou_hidden_dim: int,
    num_multimask: int,
) -> Sam:
    grid = input_size // _STRIDE
    return Sam(
        image_encoder=encoder,
        prompt_encoder=PromptEncoder(
            embed_dim=prompt_dim,
            image_embedding_size=(grid, grid),
            input_image_size=(input_size, input_size),
            mask_in_chans=_MASK_IN_CHANNELS,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=num_multimask,
            transformer=TwoWayTransformer(
                depth=2, embedding_dim=prompt_dim, mlp_dim=decoder_mlp_dim, num_heads=8
            ),
            transformer_dim=prompt_dim,
            iou_head_depth=3,
            iou_head_hidden_dim=iou_hidden_dim,
        ),
    )


def decode_masks(
    sam: Sam, embeddings: Tensor, sparse: Tensor, dense: Tensor
) -> tuple[Tensor, Tensor]:
    """All mask tokens of ``B`` (image, prompt) pairs in one pass of the mask decoder.

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
    position = sam.prompt_encoder.get_dense_pe().to(source.dtype).expand(batch, -1, -1, -1)
    hidden, source = decoder.transformer(source, position, tokens)
    upscaled = decoder.output_upscaling(source.transpose(1, 2).reshape(embeddings.shape))
    hyper = torch.stack(
        [mlp(hidden[:, 1 + i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)], dim=1
    )
    masks = (hyper @ upscaled.flatten(2)).unflatten(2, upscaled.shape[-2:])
    return masks, decoder.iou_prediction_head(hidden[:, 0])


def load_state(path: Path) -> dict[str, Tensor]:
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
    return _flat_state(path, state)


def _flat_state(path: Path, state: object) -> dict[str, Tensor]:
    expected = "expected tensors by name; save the model's own state_dict()"
    if not isinstance(state, dict):
        raise DataError(f"{path}: holds a {type(state).__name__}; {expected}")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise DataError(f"{path}: {name!r} holds a {type(value).__name__}; {expected}")
    return state
