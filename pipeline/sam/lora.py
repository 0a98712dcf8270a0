"""What is trained of a teacher: low-rank updates of its encoder, or all of it.

SAMed (Zhang & Liu 2023) on LoRA (Hu et al. 2022).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam
from timm.models.tiny_vit import Attention as TinyVitAttention
from torch import Tensor, nn


class LoraQKV(nn.Module):
    """A frozen ``qkv`` projection with trainable rank-r updates to the query and value parts.

    ``qkv(x) + [B_q A_q x, 0, B_v A_v x]``; A starts Kaiming-uniform and B zero, so an untrained
    adapter changes nothing. The output lies in ``groups`` of query, key and value each: one in
    segment-anything, one a head in TinyViT.
    """

    def __init__(self, qkv: nn.Linear, rank: int, *, groups: int = 1) -> None:
        super().__init__()
        dim = qkv.in_features
        self.qkv, self.groups = qkv, groups
        self.a_q = nn.Parameter(torch.empty(rank, dim))
        self.b_q = nn.Parameter(torch.zeros(dim, rank))
        self.a_v = nn.Parameter(torch.empty(rank, dim))
        self.b_v = nn.Parameter(torch.zeros(dim, rank))
        for a in (self.a_q, self.a_v):
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Project ``x`` (..., C) to (..., 3C)."""
        q = F.linear(F.linear(x, self.a_q), self.b_q)
        v = F.linear(F.linear(x, self.a_v), self.b_v)
        out: Tensor = self.qkv(x) + self._laid_out(q, v)
        return out

    def _laid_out(self, q: Tensor, v: Tensor) -> Tensor:
        """Put ``q`` and ``v`` (..., C) at their places in (..., 3C), and zeros at the key's."""
        parts = (part.unflatten(-1, (self.groups, -1)) for part in (q, torch.zeros_like(q), v))
        return torch.stack([*parts], dim=-2).flatten(-3)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Return one linear layer that computes the same function."""
        query, value = self.b_q @ self.a_q, self.b_v @ self.a_v
        self.qkv.weight += self._laid_out(query.T, value.T).T
        return self.qkv


def add_adapter(sam: Sam, rank: int | None) -> list[str]:
    """Make ``sam`` ready for training or for a trained adapter, in place.

    With a ``rank``, every block's query and value get LoRA, and beside it the mask decoder and the
    default prompt embedding are trained; with None, everything is.

    Returns:
        the names in its state that an adapter's file holds: the trained parameters and, of a
        teacher trained whole, the buffers too, which change with it.
    """
    if rank is None:
        return list(sam.state_dict())
    sam.image_encoder.requires_grad_(False)
    for attention in [*_attentions(sam)]:
        groups = attention.num_heads if isinstance(attention, TinyVitAttention) else 1
        attention.qkv = LoraQKV(attention.qkv, rank, groups=groups)
    sam.prompt_encoder.requires_grad_(False)
    sam.prompt_encoder.no_mask_embed.requires_grad_(True)
    return [name for name, parameter in sam.named_parameters() if parameter.requires_grad]


def merge_lora(sam: Sam) -> None:
    """Fold every LoRA into its projection: the same function at no cost at inference."""
    for attention in [*_attentions(sam)]:
        if isinstance(attention.qkv, LoraQKV):
            attention.qkv = attention.qkv.merged()


def _attentions(sam: Sam) -> Iterator[Any]:
    """Yield the encoder's attention modules: those with a joint projection to q, k and v."""
    return (each for each in sam.image_encoder.modules() if hasattr(each, "qkv"))
