"""Exact fused attention for segment-anything's image encoder.

segment-anything adds a decomposed relative position to the attention logits (Li et al., MViTv2,
2022; ViTDet, 2022), ``logits[i, j] = scale * q_i . k_j + q_i . Rh[row_i, row_j] + q_i . Rw[col_i,
col_j]``, and so materialises the whole attention matrix. The two extra terms are themselves a dot
product::

    q' = [scale * q,  q . Rh[row_i, :],  q . Rw[col_i, :]]      (d + H + W)
    k' = [k,          onehot(row_j),     onehot(col_j)]         (d + H + W)
    q' . k' = scale * q.k + rel_h + rel_w                       exactly

so a fused ``scaled_dot_product_attention`` computes the same function with no bias tensor. Its
cost is the wider dot product, which a CPU feels where there are many tokens: there the logits are
made in slices that stay in its cache, with both terms added in place (``benchmarks/attention.py``).

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

_SLICED_TOKENS = 1024  # from here on a CPU is faster with slices; SAM's global blocks have 4096
_SLICE = 256  # queries: 256 x 4096 logits of 2 or 4 bytes


class FoldedAttention(nn.Module):
    """Drop-in for segment-anything's ``Attention`` with relative positions; the same state names.

    ``slices`` says whether logits are made in slices; None means wherever that is faster.
    ``attend`` is another form in place of both.
    """

    def __init__(
        self, stock: Attention, *, slices: bool | None = None, attend: Attend | None = None
    ) -> None:
        super().__init__()
        self.slices, self.attend = slices, attend
        self.num_heads: int = stock.num_heads
        self.scale: float = stock.scale
        self.qkv, self.proj = stock.qkv, stock.proj
        self.rel_pos_h, self.rel_pos_w = stock.rel_pos_h, stock.rel_pos_w

    def forward(self, x: Tensor) -> Tensor:
        """Attend within ``x`` (B, H, W, C); returns the same shape and dtype."""
        qkv = self.qkv(x).flatten(1, 2).unflatten(2, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, H*W, d)
        # q . Rh (B, heads, H*W, H) and q . Rw (B, heads, H*W, W)
        height, width = x.shape[1:3]
        grid = q.unflatten(2, (height, width))
        rel_h = relative_positions(self.rel_pos_h, height).to(q.dtype)  # (H, H, d)
        rel_w = relative_positions(self.rel_pos_w, width).to(q.dtype)  # (W, W, d)
        rows = torch.einsum("bnhwc,hkc->bnhwk", grid, rel_h).flatten(2, 3)
        cols = torch.einsum("bnhwc,wkc->bnhwk", grid, rel_w).flatten(2, 3)
        sliced = slices_pay(q) if self.slices is None else self.slices
        attend = self.attend or (_attend_in_slices if sliced else _attend_folded)
        out = attend(q * self.scale, k, v, rows, cols).transpose(1, 2).reshape(x.shape)
        projected: Tensor = self.proj(out)
        return projected


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


def _attend_folded(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Attend (B, heads, H*W, d) through the fused kernel, with positions folded into q and k."""
    height, width = rows.shape[-1], cols.shape[-1]
    # expanded, not repeated: an exported graph can do that for any height and width
    of_row = torch.eye(height, dtype=k.dtype, device=k.device)[:, None].expand(-1, width, -1)
    of_col = torch.eye(width, dtype=k.dtype, device=k.device).expand(height, -1, -1)
    onehot = torch.cat([of_row, of_col], dim=2).flatten(0, 1).expand(*k.shape[:2], -1, -1)
    out = F.scaled_dot_product_attention(
        torch.cat([q, rows, cols], dim=-1),
        torch.cat([k, onehot], dim=-1),
        F.pad(v, (0, height + width)),  # fused kernels want one head size for all three
        scale=1.0,
    )
    return out[..., : v.shape[-1]]


def _attend_in_slices(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Attend (B, heads, H*W, d), one head and ``_SLICE`` queries at a time."""
    grid = (rows.shape[-1], cols.shape[-1])
    queries, values, rows, cols = (part.flatten(0, 1) for part in (q, v, rows, cols))
    keys = k.flatten(0, 1).transpose(1, 2).contiguous()
    out = torch.empty_like(values)
    for head in range(len(queries)):
        for start in range(0, queries.shape[1], _SLICE):
            part = slice(start, start + _SLICE)
            logits = (queries[head, part] @ keys[head]).unflatten(1, grid)
            logits.add_(rows[head, part, :, None]).add_(cols[head, part, None, :])
            out[head, part] = logits.flatten(1).softmax(dim=1).to(v.dtype) @ values[head]
    return out.view_as(q)


def slices_pay(q: Tensor) -> bool:
    """Tell whether slices are faster for ``q`` (B, heads, H*W, d): on a CPU, with many tokens.

    They are never used where a gradient or an exported graph is wanted.
    """
    wanted = torch.is_grad_enabled() or torch.compiler.is_exporting()
    return q.device.type == "cpu" and q.shape[2] >= _SLICED_TOKENS and not wanted


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
    """Replace every block's attention of ``encoder`` by its exact fused form, in place."""
    for block in encoder.blocks:
        if isinstance(block.attn, Attention):
            block.attn = FoldedAttention(block.attn)
    return encoder
