"""Exact fused attention for segment-anything's image encoder.

segment-anything adds a decomposed relative position to the attention logits (Li et al., MViTv2,
2022; ViTDet, 2022), ``logits[i, j] = scale * q_i . k_j + q_i . Rh[row_i, row_j] + q_i . Rw[col_i,
col_j]``, and so materialises the whole attention matrix. The two extra terms are themselves a dot
product::

    q' = [scale * q,  q . Rh[row_i, :],  q . Rw[col_i, :]]      (d + H + W)
    k' = [k,          onehot(row_j),     onehot(col_j)]         (d + H + W)
    q' . k' = scale * q.k + rel_h + rel_w                       exactly

so a fused ``scaled_dot_product_attention`` computes the same function with no bias tensor. On a CPU
that kernel is slower than plain products of matrices (``benchmarks/attention.py``), which are taken
there for a few windows at a time. Where there are many tokens, it is a slice of the queries at a
time, and the product is added to both terms instead of being three times as wide.

**Frames smaller than SAM's square** (``sam.frame: content``). A frame of h x w tokens, h, w <= N,
gets the first rows and columns of the absolute position embedding and the middle of each table of
relative positions, which are those of the same tokens in the square of N x N. Its result equals the
square's at these tokens if, in the square, what lies outside the h x w tokens

* is masked as keys in the global blocks,
* is zero behind the first norm of the window blocks. That is what SAM's windows hold beyond the
  square, which they do not divide: such zeros stay keys, here as there,
* is zero before the 3 x 3 convolution of the neck, as beyond the square, and
* is masked as keys where the mask decoder's tokens attend to the image.

So no token sees another one's padding, windows lie where they lay, and a square is SAM's own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from segment_anything.modeling.image_encoder import Attention, ImageEncoderViT
from torch import Tensor, nn

from pipeline.sam.global_attention import Attend
from pipeline.sam.windows import from_windows, to_windows

_SLICED_TOKENS = 1024  # from here on a CPU is faster with slices; SAM's global blocks have 4096
_SLICE = 512  # queries: 512 x 4096 logits of 2 or 4 bytes
_WINDOWS = 48  # heads of windows at a time: 48 x 196 x 196 logits


class FoldedAttention(nn.Module):
    """Attention with segment-anything's relative positions and names, and its block's windows.

    ``window_size`` is the side of the windows within which tokens attend, 0 for the whole map;
    ``attend`` the form in which that is computed, None for the fastest here.
    """

    def __init__(
        self, stock: Attention, *, window_size: int = 0, attend: Attend | None = None
    ) -> None:
        super().__init__()
        self.attend, self.window_size = attend, window_size
        self.any_frame = False  # whether an exported graph must bear maps of any shape
        self.num_heads: int = stock.num_heads
        self.scale: float = stock.scale
        self.qkv, self.proj = stock.qkv, stock.proj
        self.rel_pos_h, self.rel_pos_w = stock.rel_pos_h, stock.rel_pos_w

    def forward(self, x: Tensor) -> Tensor:
        """Attend within ``x`` (B, H, W, C) or its windows; returns the same shape and dtype."""
        qkv = self.qkv(x)
        if self.window_size:
            beyond = self.qkv(x.new_zeros(1, x.shape[-1]))[0]
            qkv = to_windows(qkv, self.window_size, beyond, any_frame=self.any_frame)
        out = self._attend(qkv)
        if self.window_size:
            out = from_windows(out, x.shape, any_frame=self.any_frame)
        projected: Tensor = self.proj(out)
        return projected

    def _attend(self, qkv: Tensor) -> Tensor:
        """Return (B, H, W, C) of ``qkv`` (B, H, W, 3C)."""
        height, width = qkv.shape[1:3]
        parts = qkv.flatten(1, 2).unflatten(2, (3, self.num_heads, -1))
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, H*W, d)
        # q . Rh (B, heads, H*W, H) and q . Rw (B, heads, H*W, W)
        grid = q.unflatten(2, (height, width))
        rel_h = relative_positions(self.rel_pos_h, height).to(q.dtype)  # (H, H, d)
        rel_w = relative_positions(self.rel_pos_w, width).to(q.dtype)  # (W, W, d)
        rows = torch.einsum("bnhwc,hkc->bnhwk", grid, rel_h).flatten(2, 3)
        cols = torch.einsum("bnhwc,wkc->bnhwk", grid, rel_w).flatten(2, 3)
        attend = self.attend or fastest_form(q)
        out = attend(q * self.scale, k, v, rows, cols).transpose(1, 2)
        return out.reshape(*qkv.shape[:3], -1)


def relative_positions(table: Tensor, count: int) -> Tensor:
    """Return the embedding of i - j for each pair of ``count`` tokens in a row or column.

    Args:
        table: (2N-1, d), of the differences 1-N..N-1; N >= ``count``. segment-anything's own
            ``get_rel_pos`` would stretch a table that is too long.

    Returns:
        (count, count, d).
    """
    steps = torch.arange(count, device=table.device)
    return table[steps[:, None] - steps + len(table) // 2]


def fastest_form(q: Tensor) -> Attend:
    """Return the form that is fastest for ``q`` (B, heads, H*W, d).

    Where a gradient or an exported graph is wanted, it is the fused kernel.
    """
    wanted = torch.is_grad_enabled() or torch.compiler.is_exporting()
    if q.device.type != "cpu" or wanted:
        return attend_fused
    return attend_in_slices if q.shape[2] >= _SLICED_TOKENS else attend_in_windows


def attend_fused(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Attend (B, heads, H*W, d) through the fused kernel, with positions folded into q and k."""
    queries, keys = _fold(q, k, rows, cols)
    # fused kernels want one head size for all three
    values = F.pad(v, (0, rows.shape[-1] + cols.shape[-1]))
    out = F.scaled_dot_product_attention(queries, keys, values, scale=1.0)
    return out[..., : v.shape[-1]]


def attend_in_windows(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Attend (B, heads, H*W, d), positions folded in, ``_WINDOWS`` heads of windows at a time."""
    parts = [part.flatten(0, 1).split(_WINDOWS) for part in (*_fold(q, k, rows, cols), v)]
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    places = out.flatten(0, 1).split(_WINDOWS)
    for queries, keys, values, place in zip(*parts, places, strict=True):
        torch.bmm((queries @ keys.transpose(1, 2)).softmax(dim=2), values, out=place)
    return out


def attend_in_slices(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Attend (B, heads, H*W, d), one head and ``_SLICE`` queries at a time."""
    queries, values, rows, cols = (part.flatten(0, 1) for part in (q, v, rows, cols))
    keys = k.flatten(0, 1).transpose(1, 2).contiguous()
    out = torch.empty_like(values)
    for head in range(len(queries)):
        for start in range(0, queries.shape[1], _SLICE):
            part = slice(start, start + _SLICE)
            logits = (rows[head, part, :, None] + cols[head, part, None, :]).flatten(1)
            logits.addmm_(queries[head, part], keys[head])
            torch.mm(logits.softmax(dim=1), values[head], out=out[head, part])
    return out.view_as(q)


def _fold(q: Tensor, k: Tensor, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
    """Return q' and k' (B, heads, H*W, d + H + W) of this module's first lines."""
    height, width = rows.shape[-1], cols.shape[-1]
    # expanded, not repeated: an exported graph can do that for any height and width
    of_row = torch.eye(height, dtype=k.dtype, device=k.device)[:, None].expand(-1, width, -1)
    of_col = torch.eye(width, dtype=k.dtype, device=k.device).expand(height, -1, -1)
    onehot = torch.cat([of_row, of_col], dim=2).flatten(0, 1).expand(*k.shape[:2], -1, -1)
    return torch.cat([q, rows, cols], dim=-1), torch.cat([k, onehot], dim=-1)


class ImageEncoder(ImageEncoderViT):  # type: ignore[misc]
    """segment-anything's encoder, also for frames that are smaller than its square."""

    def forward(self, x: Tensor) -> Tensor:
        """Encode (B, 3, h, w), whole patches, at most the square, into (B, C, h/16, w/16)."""
        tokens = self.patch_embed(x)
        tokens = tokens + self.pos_embed[:, : tokens.shape[1], : tokens.shape[2]]
        for block in self.blocks:
            tokens = block(tokens)
        out: Tensor = self.neck(tokens.permute(0, 3, 1, 2))
        return out


def fold_attention(encoder: ImageEncoderViT) -> ImageEncoderViT:
    """Replace attention and windows of all blocks by exact faster forms, in place."""
    for block in encoder.blocks:
        if isinstance(block.attn, Attention):
            block.attn = FoldedAttention(block.attn, window_size=block.window_size)
            block.window_size = 0  # else the block would cut them before
    return encoder


def for_any_frame(encoder: nn.Module) -> None:
    """Let one exported graph serve frames of any shape."""
    for module in encoder.modules():
        if isinstance(module, FoldedAttention):
            module.any_frame = True
