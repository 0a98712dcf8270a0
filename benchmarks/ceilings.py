"""How fast this machine multiplies large matrices, by precision: what an encoder could reach."""

from __future__ import annotations

import time

import pipeline.sam  # noqa: F401  (before segment_anything imports torchvision)

# isort: split
import torch

from pipeline.sam.int8 import Int8Linear, has_vnni


def synchronise(device: torch.device) -> None:
    """Wait for what a GPU was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure_ceilings(device: torch.device) -> dict[str, float]:
    """FLOP/s by the precision's name."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if device.type == "cuda":
        dtypes["fp16"] = torch.float16
    ceilings = {name: matmul_ceiling(device, dtype) for name, dtype in dtypes.items()}
    if device.type == "cpu" and has_vnni():
        ceilings["int8"] = int8_ceiling()
    return ceilings


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large product of matrices, the best of several."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(6):
        synchronise(device)
        began = time.perf_counter()
        a @ a
        synchronise(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def int8_ceiling() -> float:
    """FLOP/s of the same product in 8-bit integers, as the encoder's linear layers compute it."""
    size = 2048
    layer = Int8Linear(torch.nn.Linear(size, size), dtype=torch.float32)
    levels = torch.randint(1, 256, (size, size), dtype=torch.uint8)
    best = float("inf")
    for _ in range(6):
        began = time.perf_counter()
        layer.multiply(levels)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
