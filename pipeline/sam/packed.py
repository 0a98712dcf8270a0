"""Linear layers of an image encoder in bfloat16 as oneDNN multiplies fastest on a CPU.

Weights are laid out once for its kernels instead of in every call, and bias and activation are
applied to the product in float32, before it is rounded, instead of in passes of their own.
"""

from __future__ import annotations

import torch
from segment_anything.modeling.common import MLPBlock
from torch import Tensor, nn

_TOKENS = 4096  # for which the layout is chosen; other numbers are multiplied as well


class PackedLinear(nn.Module):
    """A linear layer in bfloat16, ``x @ weight.T + bias``; ``gelu`` puts a GELU behind it."""

    def __init__(self, linear: nn.Linear, *, gelu: bool = False) -> None:
        super().__init__()
        weight = linear.weight.detach().bfloat16()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, _TOKENS)
        self.bias = None if linear.bias is None else linear.bias.detach().bfloat16()
        self.activation = "gelu" if gelu else "none"

    @property
    def weight(self) -> Tensor:
        """Return (D, C) bfloat16, for blocks that multiply it themselves, as timm's BEiT does."""
        weight: Tensor = self.packed.to_dense()
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """Project ``x`` (..., C) to (..., D) bfloat16."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(
            x.bfloat16(), self.packed, self.bias, self.activation, [], "none"
        )
        return out


class PackedMlp(nn.Module):
    """SAM's two layers with a GELU between them."""

    def __init__(self, block: MLPBlock) -> None:
        super().__init__()
        self.lin1, self.lin2 = PackedLinear(block.lin1, gelu=True), PackedLinear(block.lin2)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to ``x`` (..., C); returns the same shape."""
        out: Tensor = self.lin2(self.lin1(x))
        return out


def pack(encoder: nn.Module) -> None:
    """Replace every linear layer of ``encoder`` by its packed form; convolutions stay."""
    for name, child in [*encoder.named_children()]:
        if isinstance(child, MLPBlock) and _is_gelu(child.act):
            setattr(encoder, name, PackedMlp(child))
        elif isinstance(child, nn.Linear):
            setattr(encoder, name, PackedLinear(child))
        else:  # not what has been replaced: its layers would be packed twice
            pack(child)


def _is_gelu(activation: nn.Module) -> bool:
    return isinstance(activation, nn.GELU) and activation.approximate == "none"
