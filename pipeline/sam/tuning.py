"""How the teacher's encoder is run on a GPU: compiled, with another attention, with less traffic.

All of it is opt-in (``precompute.compile``, ``attention``, ``residual``), is named in the labels'
provenance, and rounds otherwise than the plain encoder does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import PrecomputeConfig
from pipeline.errors import ConfigError
from pipeline.sam.attention import FoldedAttention
from pipeline.sam.global_attention import FORMS, Attend

#: No kernel is chosen by a stopwatch: another run would then round otherwise.
COMPILE_OPTIONS: dict[str, Any] = {"deterministic": True, "triton.autotune_pointwise": False}

#: Shapes of batches that one encoder is compiled for, which is what torch allows by default.
MOST_SHAPES = 8

Compiler = Callable[[nn.Module], Callable[[Tensor], Tensor]]


def tune(encoder: nn.Module, run: PrecomputeConfig, device: torch.device) -> nn.Module:
    """Return the encoder as the settings ask for it; ``encoder`` itself is changed.

    Raises:
        ConfigError: the device or the encoder does not have what is asked for.
    """
    if run.attention != "auto":
        _set_attention(encoder, FORMS[run.attention], asked=f"attention: {run.attention}")
    if run.residual == "bf16":
        _narrow_residual(encoder)
    if not run.compile:
        return encoder
    if device.type != "cuda":
        raise ConfigError("precompute.compile: true needs a CUDA device; set it to false")
    return CompiledEncoder(encoder, run.batch_size, compiler=_inductor)


def tuning(run: PrecomputeConfig) -> dict[str, str]:
    """Return what of it is asked for, for the labels' provenance; empty by default."""
    return {
        key: str(value).lower()
        for key, value in (
            ("attention", run.attention),
            ("residual", run.residual),
            ("compile", run.compile),
        )
        if value != PrecomputeConfig.model_fields[key].default
    }


# --------------------------------------------------------------------------- blocks


def _set_attention(encoder: nn.Module, attend: Attend, *, asked: str) -> None:
    """Let the global blocks attend so; windows of 196 tokens stay folded."""
    blocks = [b for b in _blocks(encoder, asked) if b.attn.window_size == 0]
    for block in blocks:
        block.attn.attend = attend


def _narrow_residual(encoder: nn.Module) -> None:
    """Let bfloat16 be what blocks add to; in autocast it is float32, as the position embedding is.

    Norms take it as it is, compute in float32 inside, and return bfloat16.
    """
    blocks = _blocks(encoder, "residual: bf16")
    encoder.pos_embed.data = encoder.pos_embed.data.bfloat16()
    for block in blocks:
        block.norm1, block.norm2 = BFloat16Norm(block.norm1), BFloat16Norm(block.norm2)


def _blocks(encoder: nn.Module, asked: str) -> list[Any]:
    blocks = list(getattr(encoder, "blocks", ()))
    if not blocks or not all(isinstance(block.attn, FoldedAttention) for block in blocks):
        raise ConfigError(
            f"precompute.{asked} is for the encoders of vit_t, vit_b, vit_l and vit_h; leave it at "
            "its default for others"
        )
    return blocks


class BFloat16Norm(nn.Module):
    """A layer norm from bfloat16 to bfloat16, also where autocast would widen it."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` (..., C) over its last dimension; mean and variance are float32."""
        with torch.autocast(x.device.type, enabled=False):
            out: Tensor = self.norm(x.bfloat16())
        return out


# --------------------------------------------------------------------------- compiled


def _inductor(encoder: nn.Module) -> Callable[[Tensor], Tensor]:
    compiled: Callable[[Tensor], Tensor] = torch.compile(
        encoder,
        fullgraph=True,  # else what cannot be compiled runs as it is, without a word
        dynamic=False,
        options=COMPILE_OPTIONS,
    )
    return compiled


class CompiledEncoder(nn.Module):
    """An encoder compiled for batches of one size, to which smaller ones are padded."""

    def __init__(self, encoder: nn.Module, batch_size: int, *, compiler: Compiler) -> None:
        super().__init__()
        self.encoder = encoder
        self.img_size = encoder.img_size
        self.batch_size = batch_size
        self._compiled = compiler(encoder)
        self._shapes: set[tuple[int, ...]] = set()

    def forward(self, x: Tensor) -> Tensor:
        """Encode ``x`` (B, 3, h, w) float, in batches of the fixed size.

        Raises:
            ConfigError: images of more shapes than ``MOST_SHAPES`` (``sam.frame: content``).
        """
        return torch.cat([self._encode(part) for part in x.split(self.batch_size)])

    def _encode(self, x: Tensor) -> Tensor:
        count, missing = len(x), self.batch_size - len(x)
        self._shapes.add((self.batch_size, *x.shape[2:]))
        if len(self._shapes) > MOST_SHAPES:
            raise ConfigError(
                f"precompute.compile: found batches of more than {MOST_SHAPES} shapes, each of "
                "which is compiled for minutes; set it to false and run the same command again"
            )
        try:
            return self._compiled(F.pad(x, (0, 0) * 3 + (0, missing)))[:count]
        except RuntimeError:
            # who comes again after this does so with half as many images, as memory ran out
            self.batch_size = (self.batch_size + 1) // 2
            raise
