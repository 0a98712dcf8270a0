"""Low-rank adaptation of the image encoder (SAMed, Zhang & Liu 2023; LoRA, Hu et al. 2022)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
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

    def merged(self) -> nn.Linear:
        """One linear layer that computes the same function."""
        update = torch.cat(
            [
                self.b_q @ self.a_q,
                torch.zeros_like(self.qkv.weight[: len(self.b_q)]),
                self.b_v @ self.a_v,
            ]
        )
        with torch.no_grad():
            self.qkv.weight += update
        return self.qkv


def add_lora(encoder: nn.Module, rank: int) -> None:
    """Freeze ``encoder`` and put rank-``rank`` adapters on every block's query and value."""
    encoder.requires_grad_(False)
    for block in encoder.blocks:  # type: ignore[union-attr]
        block.attn.qkv = LoraQKV(block.attn.qkv, rank)


def merge_lora(encoder: nn.Module) -> None:
    """Fold every adapter into its projection: the same function at no cost at inference."""
    for block in encoder.blocks:  # type: ignore[union-attr]
        if isinstance(block.attn.qkv, LoraQKV):
            block.attn.qkv = block.attn.qkv.merged()
