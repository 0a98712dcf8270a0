"""The coarse model behind ``sam.prompt: box``: a small U-Net that says where to look.

It sees the teacher's padded input frame at 128 pixels, and is no client's network: its shape does
not follow ``model`` in params.yaml, so another client network never changes the labels.
"""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import Config, ModelConfig
from pipeline.disk import file_sha256
from pipeline.errors import IdentityError, StageError
from pipeline.segmentation.networks import build_model, normalise

COARSE_FILE = "coarse.safetensors"
COARSE_SIDE = 128  # px; a box needs no more


def build_coarse(config: Config) -> nn.Module:
    """The untrained model, weights drawn from ``config.seed``."""
    data = config.data.model_copy(update={"image_size": COARSE_SIDE})
    return build_model(
        config.model_copy(update={"model": ModelConfig(), "data": data}), seed=config.seed
    )


def load_coarse(config: Config, folder: Path, *, sha256: str | None) -> nn.Module:
    """The trained model of ``folder``.

    Raises:
        StageError: its file is missing. IdentityError: it is not the one with ``sha256``.
    """
    path = folder / COARSE_FILE
    if not path.is_file():
        raise StageError(f"{path}: not found; run `samfed finetune-sam` first")
    if file_sha256(path) != sha256:
        raise IdentityError(f"{path}: sha256 differs from its card; run `samfed finetune-sam`")
    model = build_coarse(config)
    model.load_state_dict(safetensors.torch.load_file(path))
    return model


def coarse_log_odds(model: nn.Module, pixels: Tensor) -> Tensor:
    """Log-odds of the foreground (B, 128, 128) float32 of padded frames (B, 3, S, S) in 0..255."""
    size = (COARSE_SIDE, COARSE_SIDE)
    small = F.interpolate(pixels.float() / 255, size, mode="bilinear", antialias=True)
    logits: Tensor = model(normalise(small)).float()
    return logits[:, 1] - logits[:, 0]
