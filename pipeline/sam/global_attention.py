"""Exact forms of SAM's global attention at the head size that it has, for GPUs.

The folded form (``pipeline.sam.attention``) needs no bias but triples the head size of a global
block of 64 x 64 tokens, and with it the work of the fused kernel. These two keep the head size:

* ``bias`` adds both relative positions in a tensor (B, heads, tokens, tokens), which the
  memory-efficient kernel reads: 0.4 GB an image and layer for ViT-B in bfloat16;
* ``flex`` adds them inside the kernel, which FlexAttention generates: no such tensor is made.

Which is fastest depends on the GPU: ``benchmarks/attention.py --device cuda`` measures all three.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

#: From scaled queries, keys and values (B, heads, H*W, d), and what each query adds to the keys of
#: a row (B, heads, H*W, H) and of a column (B, heads, H*W, W), to values (B, heads, H*W, d).
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

# not the cuDNN kernel, which wants its bias in another layout, and flash, which takes none
_WITH_BIAS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


def attend_with_bias(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Attend with the relative positions as one additive tensor; arguments as ``Attend``'s."""
    bias = (rows.unsqueeze(-1) + cols.unsqueeze(-2)).flatten(-2)
    with sdpa_kernel(_WITH_BIAS, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)


def attend_flexibly(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, cols: Tensor, *, compiled: bool = True
) -> Tensor:
    """Attend with the relative positions added inside a generated kernel; as ``Attend``'s.

    Args:
        compiled: False runs torch's reference, which makes the whole matrix: for tests alone.
    """
    width = cols.shape[-1]

    def add_positions(score: Tensor, b: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + rows[b, head, i, j // width] + cols[b, head, i, j % width]

    # within an encoder that is compiled it is compiled with it
    alone = compiled and not torch.compiler.is_compiling()
    attend: Any = _compiled_flex() if alone else flex_attention
    out: Tensor = attend(q, k, v, score_mod=add_positions, scale=1.0)
    return out


@cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=False)


FORMS: dict[str, Attend] = {"bias": attend_with_bias, "flex": attend_flexibly}
