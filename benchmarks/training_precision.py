"""Forward and backward of the full-size client (384 px, U-Net on ResNet-34) in fp32 and bf16.

    python benchmarks/training_precision.py [--size-px 384] [--batch 8]

Best of three steps each, in turns, by the number of threads; labels are noise.
"""

from __future__ import annotations

import argparse
import time

import torch

from pipeline.config import Precision
from pipeline.params import parse_config
from pipeline.segmentation.losses import supervised_loss
from pipeline.segmentation.networks import build_for_training, logits_of, normalise

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")


def step_seconds(precision: Precision, size_px: int, batch: int) -> float:
    """Return the wall time of one training step without the optimiser."""
    raw = {
        "data": {"image_size": size_px},
        "model": {
            "architecture": "unet",
            "encoder": "tu-resnet34",
            "encoder_depth": 5,
            "decoder_channels": [256, 128, 64, 32, 16],
        },
        "federate": {"precision": precision},
    }
    config = parse_config(raw, source="benchmark")
    network = build_for_training(config, config.model, torch.device("cpu")).train()
    images = normalise(torch.rand(batch, 3, size_px, size_px))
    truth = torch.randint(2, (batch, size_px, size_px))
    start = time.perf_counter()
    supervised_loss(logits_of(network, images), truth).backward()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size-px", type=int, default=384)
    parser.add_argument("--batch", type=int, default=8)
    chosen = parser.parse_args()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        turns = [
            [step_seconds(p, chosen.size_px, chosen.batch) for p in PRECISIONS] for _ in range(3)
        ]
        exact, fast = (min(times) for times in zip(*turns, strict=True))
        print(f"{threads} threads: fp32 {exact:.2f} s, bf16 {fast:.2f} s, {exact / fast:.2f}")


if __name__ == "__main__":
    main()
