"""What is trained of a teacher: low-rank updates of its encoder, or all of it.

SAMed (Zhang & Liu 2023) on LoRA (Hu et al. 2022).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam
from torch import Tensor, nn


class LoraQKV(nn.Module):
    """A frozen ``qkv`` projection with trainable rank-r updates to the query and value parts.

    ``qkv(x) + [B_q A_q x, 0, B_v A_v x]``; A starts Kaiming-uniform and B zero, so an untrained
    adapter changes nothing.
    """

    def __init__(self, qkv: nn.Linear, rank: int) -> None:
        super().__init__()
        dim = qkv.in_features
        self.qkv = qkv
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
        out: Tensor = self.qkv(x) + torch.cat([q, torch.zeros_like(q), v], dim=-1)
        return out

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Return one linear layer that computes the same function."""
        query, value = self.b_q @ self.a_q, self.b_v @ self.a_v
        self.qkv.weight += torch.cat([query, torch.zeros_like(query), value])
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
    for block in sam.image_encoder.blocks:
        block.attn.qkv = LoraQKV(block.attn.qkv, rank)
    sam.prompt_encoder.requires_grad_(False)
    sam.prompt_encoder.no_mask_embed.requires_grad_(True)
    return [name for name, parameter in sam.named_parameters() if parameter.requires_grad]


def merge_lora(sam: Sam) -> None:
    """Fold every LoRA into its projection: the same function at no cost at inference."""
    for block in getattr(sam.image_encoder, "blocks", ()):
        if isinstance(block.attn.qkv, LoraQKV):
            block.attn.qkv = block.attn.qkv.merged()
