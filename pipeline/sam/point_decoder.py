"""SAM's mask decoder for many prompts of one image, to the logits of segment-anything's own.

Its attention runs between a prompt's few tokens and the image's thousands. What the first layer
projects depends on the image alone and is projected once. In later layers the image differs from
prompt to prompt, and a product of three matrices is taken from the side of the few tokens:
q (K W)' = (q W') K', for heads x tokens = 56 columns in SAM's decoder instead of the 128 of W, and
likewise for values and outputs. Only the order of sums changes. Where no mask of a prompt can be
chosen any more, none is computed: estimates of the IoU come before masks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from segment_anything.modeling import Sam
from segment_anything.modeling.transformer import Attention, TwoWayAttentionBlock
from torch import Tensor

from pipeline.sam.build import no_mask


@dataclass(frozen=True)
class Prompted:
    """What n prompts have made of one image's embedding, before any mask."""

    iou: Tensor  # (n, masks), estimates for all but the unambiguous mask
    tokens: Tensor  # (n, masks, C), of these masks
    image: Tensor  # (n, h * w, C)


class PointDecoder:
    """The decoder of one image; prompts come in batches."""

    def __init__(self, sam: Sam, embedding: Tensor) -> None:
        """Project what depends on the image alone.

        Args:
            embedding: (C, h, w) float32.
        """
        self.sam = sam
        self.size_hw = embedding.shape[-2:]
        height, width = self.size_hw  # of a content frame, less than the whole
        source = embedding[None] + no_mask(sam, embedding[None])
        place = sam.prompt_encoder.get_dense_pe()[:, :, :height, :width].to(source.dtype)
        self.image = source.flatten(2).transpose(1, 2)  # (1, h * w, C)
        self.place = place.flatten(2).transpose(1, 2)
        first = sam.mask_decoder.transformer.layers[0]
        placed = (self.image + self.place)[0]
        self.keys = _heads(first.cross_attn_token_to_image, "k", placed)  # (heads, h * w, d)
        self.values = _heads(first.cross_attn_token_to_image, "v", self.image[0])
        self.queries = _heads(first.cross_attn_image_to_token, "q", placed)

    def prompt(self, points: Tensor) -> Prompted:
        """Run the decoder's transformer for foreground points (n, 1, 2) as x, y in input pixels.

        Their positions stay in float32.
        """
        decoder, count = self.sam.mask_decoder, len(points)
        labels = torch.ones(points.shape[:2], device=points.device)
        with torch.autocast(points.device.type, enabled=False):
            sparse, _ = self.sam.prompt_encoder(points=(points, labels), boxes=None, masks=None)
        own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight], dim=0)
        given = torch.cat([own.expand(count, -1, -1), sparse.to(own)], dim=1)
        tokens, image = given, self.image
        for number, layer in enumerate(decoder.transformer.layers):
            tokens, image = self._layer(layer, tokens, given, image, first=number == 0)
        final = decoder.transformer.final_attn_token_to_image
        tokens = tokens + _to_image(final, tokens + given, image, image + self.place)
        tokens = decoder.transformer.norm_final_attn(tokens)
        iou = decoder.iou_prediction_head(tokens[:, 0])
        return Prompted(iou[:, 1:], tokens[:, 2 : 1 + decoder.num_mask_tokens], image)

    def _layer(
        self,
        layer: TwoWayAttentionBlock,
        tokens: Tensor,
        given: Tensor,
        image: Tensor,
        *,
        first: bool,
    ) -> tuple[Tensor, Tensor]:
        """Return tokens (n, t, C) and image (n, h * w, C) after a layer of the transformer."""
        if layer.skip_first_layer_pe:
            tokens = layer.self_attn(q=tokens, k=tokens, v=tokens)
        else:
            placed = tokens + given
            tokens = tokens + layer.self_attn(q=placed, k=placed, v=tokens)
        tokens = layer.norm1(tokens)
        there, seen = layer.cross_attn_token_to_image, None if first else image + self.place
        if seen is None:
            found = self._to_same_image(there, tokens + given)
        else:
            found = _to_image(there, tokens + given, image, seen)
        tokens = layer.norm2(tokens + found)
        tokens = layer.norm3(tokens + layer.mlp(tokens))
        return tokens, layer.norm4(self._to_tokens(layer, tokens, given, image, seen))

    def _to_tokens(
        self,
        layer: TwoWayAttentionBlock,
        tokens: Tensor,
        given: Tensor,
        image: Tensor,
        seen: Tensor | None,
    ) -> Tensor:
        """Let images (n or 1, h * w, C) attend to tokens and add what they find: (n, h * w, C).

        Args:
            seen: the images, placed; None where they are the one of before any prompt.
        """
        attention = layer.cross_attn_image_to_token
        keys = _heads(attention, "k", tokens + given) / _depth(attention) ** 0.5
        count, heads, few, depth = keys.shape
        if seen is None:
            flat = keys.transpose(0, 1).reshape(heads, count * few, depth)
            logits = flat @ self.queries.transpose(1, 2)
            logits = logits.view(heads, count, few, -1).transpose(0, 1)
        else:
            weight, bias = _weights(attention, "q")
            folded = (keys @ weight).flatten(1, 2)  # (n, heads * t, C)
            logits = (folded @ seen.transpose(1, 2)).view(count, heads, few, -1)
            logits = logits + keys @ bias[:, :, None]
        shares = logits.softmax(dim=2).flatten(1, 2)  # (n, heads * t, h * w), over the tokens
        weight = attention.out_proj.weight.unflatten(1, (heads, -1)).permute(1, 2, 0)
        values = (_heads(attention, "v", tokens) @ weight).flatten(1, 2)  # (n, heads * t, C)
        image = (image + attention.out_proj.bias).expand(count, -1, -1)
        return torch.baddbmm(image, shares.transpose(1, 2), values)

    def _to_same_image(self, attention: Attention, asking: Tensor) -> Tensor:
        """Let tokens (n, t, C) attend to the image as it is before any prompt: (n, t, C)."""
        count, few, _ = asking.shape
        queries = _heads(attention, "q", asking.flatten(0, 1))  # (heads, n * t, d)
        logits = queries @ self.keys.transpose(1, 2) / _depth(attention) ** 0.5
        found = logits.softmax(dim=-1) @ self.values
        out: Tensor = attention.out_proj(found.transpose(0, 1).reshape(count, few, -1))
        return out

    def masks(self, prompted: Prompted, chosen: Tensor) -> Tensor:
        """Return the masks' logits (m, masks, 4h, 4w) of the chosen (m,) prompts."""
        decoder = self.sam.mask_decoder
        image = prompted.image[chosen].transpose(1, 2).unflatten(2, self.size_hw)
        upscaled = decoder.output_upscaling(image)
        mlps = list(decoder.output_hypernetworks_mlps)[1:]
        tokens = prompted.tokens[chosen].unbind(1)
        hyper = torch.stack([mlp(one) for mlp, one in zip(mlps, tokens, strict=True)], dim=1)
        masks: Tensor = (hyper @ upscaled.flatten(2)).unflatten(2, upscaled.shape[-2:])
        return masks


def _depth(attention: Attention) -> int:
    """Return the channels of a head."""
    depth: int = attention.internal_dim // attention.num_heads
    return depth


def _weights(attention: Attention, kind: str) -> tuple[Tensor, Tensor]:
    """Return a projection's weights (heads, d, C) and bias (heads, d); ``kind`` is q, k or v."""
    projection = getattr(attention, f"{kind}_proj")
    weight = projection.weight.unflatten(0, (attention.num_heads, -1))
    return weight, projection.bias.unflatten(0, (attention.num_heads, -1))


def _heads(attention: Attention, kind: str, x: Tensor) -> Tensor:
    """Project x (..., t, C) for each head: (..., heads, t, d)."""
    projected = getattr(attention, f"{kind}_proj")(x)
    heads: Tensor = projected.unflatten(-1, (attention.num_heads, -1)).transpose(-2, -3)
    return heads


def _to_image(attention: Attention, asking: Tensor, image: Tensor, placed: Tensor) -> Tensor:
    """Let tokens (n, t, C) attend to images (n, h * w, C), placed where keys are made: (n, t, C).

    The bias of the keys is left out: it adds the same to all logits of a token.
    """
    queries = _heads(attention, "q", asking) / _depth(attention) ** 0.5  # (n, heads, t, d)
    weight, _ = _weights(attention, "k")
    logits = (queries @ weight).flatten(1, 2) @ placed.transpose(1, 2)  # (n, heads * t, h * w)
    found = (logits.softmax(dim=-1) @ image).view(*queries.shape[:3], -1)
    weight, bias = _weights(attention, "v")
    values = found @ weight.transpose(1, 2) + bias[:, None]  # (n, heads, t, d)
    out: Tensor = attention.out_proj(values.transpose(1, 2).flatten(2))
    return out
