"""Linear layers of an image encoder in 8-bit integers, for CPUs that multiply these fast (VNNI).

Weights have one scale an output channel, activations a scale and a middle a token, found anew for
every input (Yao et al., "ZeroQuant", 2022), so that an image's embedding does not depend on the
batch around it. With ``x = scale * q + middle`` and ``w`` the weights' rounded values,
``w . x = scale * (w . q) + middle * sum(w)``. The products are oneDNN's, exact in 32-bit integers;
what lies between the linear layers stays as it is.
"""

from __future__ import annotations

import torch
from segment_anything.modeling.common import MLPBlock
from torch import Tensor, nn

from pipeline.errors import ConfigError

_WEIGHT_LEVELS = 127  # of either sign
_TOKEN_LEVELS = 255  # above a token's smallest value
_MIDDLE = 128  # the level of a token's middle
_TOKENS = 256  # at a time, so that what lies between two steps stays in the processor's cache
_INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "amx_int8")


def has_vnni() -> bool:
    """Tell whether this CPU multiplies 8-bit integers faster than floating point numbers.

    Without these instructions oneDNN's sums of two products overflow 16 bits as well.
    """
    able = torch.cpu.get_capabilities()
    return torch.backends.mkldnn.is_available() and any(able.get(name) for name in _INSTRUCTIONS)


class Int8Linear(nn.Module):
    """A linear layer's function, approximately: ``x @ weight.T + bias``."""

    def __init__(self, linear: nn.Linear, *, dtype: torch.dtype) -> None:
        """Quantise ``linear``; what it returns will be of ``dtype``."""
        super().__init__()
        weight = linear.weight.detach().float()
        self.dtype, self.out_features = dtype, linear.out_features
        self.scales = _above_zero(weight.abs().amax(dim=1) / _WEIGHT_LEVELS)
        levels = (weight / self.scales[:, None]).round().to(torch.int8)
        self.sums = levels.sum(dim=1) * self.scales
        self.packed = torch.ops.onednn.qlinear_prepack(levels, None)
        self.zeros = torch.zeros(self.out_features, dtype=torch.int32)
        bias = linear.bias
        self.bias = weight.new_zeros(self.out_features) if bias is None else bias.detach().float()

    @property
    def weight(self) -> Tensor:
        """Not there in floating point, for a backbone that multiplies weights itself.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "precompute.precision: int8 does not fit this backbone, which multiplies its weights "
            "itself instead of calling its layers; use auto, bf16 or fp32"
        )

    def forward(self, x: Tensor) -> Tensor:
        """Project ``x`` (..., C) to (..., D)."""
        tokens = x.flatten(0, -2)
        out = torch.empty(len(tokens), self.out_features, dtype=self.dtype)
        for part, place in zip(tokens.split(_TOKENS), out.split(_TOKENS), strict=True):
            values = part.float()
            lowest, highest = values.amin(dim=1, keepdim=True), values.amax(dim=1, keepdim=True)
            scale = _above_zero((highest - lowest) / _TOKEN_LEVELS)
            levels = ((values - lowest) / scale).round_().to(torch.uint8)
            constant = torch.addcmul(self.bias, lowest + _MIDDLE * scale, self.sums)
            torch.addcmul(constant, self.multiply(levels), scale, out=place)
        return out.view(*x.shape[:-1], self.out_features)

    def multiply(self, levels: Tensor) -> Tensor:
        """Return (N, D) float32: the weights' true values times (N, C) uint8 levels.

        Args:
            levels: as above a token's smallest value; 128 stands for 0.
        """
        product: Tensor = torch.ops.onednn.qlinear_pointwise(
            levels,
            1.0,  # the activations' scale, which oneDNN wants to be one for all tokens
            _MIDDLE,
            self.packed,
            self.scales,
            self.zeros,
            None,  # bias
            1.0,  # scale and zero of an output in 8 bits, which this is not
            0,
            torch.float32,
            "none",  # what may follow in one step: nothing
            [],
            "",
        )
        return product


class Int8Mlp(nn.Module):
    """Two quantised layers with an activation between them, a few tokens at a time."""

    def __init__(self, block: MLPBlock, *, dtype: torch.dtype) -> None:
        """Quantise both layers of ``block``; what it returns will be of ``dtype``."""
        super().__init__()
        self.lin1 = Int8Linear(block.lin1, dtype=torch.float32)
        self.lin2 = Int8Linear(block.lin2, dtype=dtype)
        self.act = block.act

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to ``x`` (..., C); returns the same shape."""
        parts = x.flatten(0, -2).split(_TOKENS)
        return torch.cat([self.lin2(self.act(self.lin1(part))) for part in parts]).view(x.shape)


def _above_zero(scale: Tensor) -> Tensor:
    """Return scales by which can be divided, where all values are equal as well."""
    return scale.clamp_(min=torch.finfo(torch.float32).tiny)


def quantise(encoder: nn.Module, *, dtype: torch.dtype) -> None:
    """Replace every linear layer of ``encoder`` by its 8-bit form, which returns ``dtype``.

    Raises:
        ConfigError: there are none.
    """
    count = 0
    for parent in [*encoder.modules()]:
        for name, child in [*parent.named_children()]:
            if isinstance(child, MLPBlock):
                setattr(parent, name, Int8Mlp(child, dtype=dtype))
            elif isinstance(child, nn.Linear) and not isinstance(parent, MLPBlock):
                setattr(parent, name, Int8Linear(child, dtype=dtype))
            else:
                continue
            count += 1
    if not count:
        raise ConfigError(
            "precompute.precision: int8 is for linear layers, of which this encoder has none; use "
            "auto, bf16 or fp32"
        )
