"""One attention layer of SAM's ViT-B at 1024: segment-anything's own, and other exact forms.

    python benchmarks/attention.py [--device cpu] [--threads 1] [--json]

Fused with positions folded in, as products of a few windows or of slices of the queries, with a
bias tensor and, on a GPU, FlexAttention. They differ in speed alone, and which is fastest depends
on device, precision and the number of tokens; ``pipeline/sam/attention.py`` chooses by what this
showed, ``precompute.attention`` says otherwise.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import pipeline.sam  # noqa: F401  (before segment_anything imports torchvision)

# isort: split
import torch
from segment_anything.modeling.image_encoder import Attention
from torch import Tensor

from pipeline.sam.attention import (
    FoldedAttention,
    attend_fused,
    attend_in_slices,
    attend_in_windows,
)
from pipeline.sam.device import plain_float32
from pipeline.sam.global_attention import FORMS

SHAPES = {"window": (25, 14, 14, 768), "global": (1, 64, 64, 768)}
REPEATS = 3


def seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    """Return the fastest of several calls."""
    best = float("inf")
    for _ in range(REPEATS + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best


def measure(device: torch.device) -> list[dict[str, Any]]:
    rows = []
    for name, shape in SHAPES.items():
        torch.manual_seed(0)
        stock = Attention(shape[-1], 12, use_rel_pos=True, input_size=shape[1:3])
        stock = stock.to(device).eval().requires_grad_(False)
        for table in (stock.rel_pos_h, stock.rel_pos_w):
            torch.nn.init.normal_(table, std=0.2)
        x = torch.randn(shape, device=device)
        with plain_float32():
            exact = stock(x)
        layers: dict[str, torch.nn.Module] = {
            "segment-anything": stock,
            "fused": FoldedAttention(stock, attend=attend_fused),
            "windows": FoldedAttention(stock, attend=attend_in_windows),
            "slices": FoldedAttention(stock, attend=attend_in_slices),
            "bias": FoldedAttention(stock, attend=FORMS["bias"]),
        }
        if device.type == "cuda":
            layers["flex"] = FoldedAttention(stock, attend=FORMS["flex"])
        for dtype in (torch.float32, torch.bfloat16):
            times = {}
            for way, layer in layers.items():

                def call(layer: Any = layer, x: Tensor = x, dtype: Any = dtype) -> Tensor:
                    narrow = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
                    with plain_float32(), narrow:
                        out: Tensor = layer(x)
                    return out

                times[way] = seconds(call, device)
                error = float((call().float() - exact).norm() / exact.norm())
                rows.append(
                    {
                        "block": name,
                        "dtype": str(dtype).removeprefix("torch."),
                        "way": way,
                        "ms": 1e3 * times[way],
                        "speedup": times["segment-anything"] / times[way],
                        "relative_error": error,
                    }
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with torch.inference_mode():
        rows = measure(torch.device(options.device))
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print(
            f"{row['block']:8} {row['dtype']:9} {row['way']:17} {row['ms']:8.1f} ms "
            f"{row['speedup']:6.2f}x  error {row['relative_error']:.1e}"
        )


if __name__ == "__main__":
    main()
