"""Measure what ``sam.prompt: points`` costs beside the encoder, before and after, in one run.

    python benchmarks/points.py FOLDER [--variant vit_t] [--images 40] [--threads 2]

``before`` repeats the image for each of 256 points and makes every mask, as segment-anything does;
``after`` is what stage one does. They take turns, image by image; times are medians. Only ``vit_t``
has trained weights here: with random ones no mask is ever chosen, so that hardly one is left out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pipeline.sam  # noqa: F401  (before segment_anything imports torchvision)

# isort: split
import numpy as np
import torch
from PIL import Image
from segment_anything.modeling import Sam
from torch import Tensor

from pipeline.allocation import keep_freed_memory
from pipeline.config import SamConfig
from pipeline.sam.build import build_sam, decode_masks, no_mask
from pipeline.sam.checkpoints import build_base
from pipeline.sam.frame import LOGIT_STRIDE, inside_image, to_input_frame
from pipeline.sam.point_decoder import PointDecoder, Prompted
from pipeline.sam.prompts import MULTIMASK, POINTS_PER_PASS, PointGrid, rank_masks
from pipeline.sam.teacher import encode

PER_SIDE = 16


class Counting(PointDecoder):
    """The decoder of stage one, which counts the prompts whose masks it makes."""

    made = 0

    def masks(self, prompted: Prompted, chosen: Tensor) -> Tensor:
        """Count and decode."""
        Counting.made += len(chosen)
        return super().masks(prompted, chosen)


def before(sam: Sam, embedding: Tensor, valid_hw: Tensor) -> Tensor:
    """Return the best mask's logits (4h, 4w), with the image repeated for each point."""
    size_hw = valid_hw[0].tolist()
    rows, cols = (-(-side // LOGIT_STRIDE) for side in size_hw)
    points = PointGrid(PER_SIDE).grid * torch.tensor(size_hw[::-1])
    best_rank, best = 0.0, torch.zeros([4 * side for side in embedding.shape[-2:]])
    for part in points.split(POINTS_PER_PASS):
        repeated, labels = embedding.expand(len(part), -1, -1, -1), torch.ones(len(part), 1)
        prompt = (part[:, None], labels)
        sparse, _ = sam.prompt_encoder(points=prompt, boxes=None, masks=None)
        logits, iou = decode_masks(sam, repeated, sparse, no_mask(sam, repeated))
        logits, iou = logits[:, 1:].flatten(0, 1), iou[:, 1:].flatten()
        rank = rank_masks(logits[:, :rows, :cols], iou)
        top = int(rank.argmax())
        if float(rank[top]) > best_rank:
            best_rank, best = float(rank[top]), logits[top].clone()
    return best


@torch.inference_mode()
def measure(sam: Sam, files: list[Path]) -> dict[str, Any]:
    """Time the encoder and both ways for each image, and compare their masks."""
    sam, side = sam.eval().requires_grad_(False), sam.image_encoder.img_size
    grid = PointGrid(PER_SIDE, decoder=Counting)
    seconds: dict[str, list[float]] = defaultdict(list)
    gaps: list[float] = []
    equal = 0

    def timed(name: str, act: Callable[..., Any], *given: Any, **options: Any) -> Any:
        began = time.perf_counter()
        result = act(*given, **options)
        seconds[name].append(time.perf_counter() - began)
        return result

    for file in files:
        pixels, valid_hw = to_input_frame([np.asarray(Image.open(file).convert("RGB"))], side)
        inside = inside_image(valid_hw, pixels.shape[-2:])
        timed("encoder_bf16", encode, sam, pixels, inside, dtype=torch.bfloat16)
        found = timed("encoder_fp32", encode, sam, pixels, inside)
        old = timed("before", before, sam, found[0], valid_hw)
        new, _ = timed("after", grid, sam, found, valid_hw)
        gaps.append(float((new[0, 1] - old).abs().max()))
        equal += bool(torch.equal(new[0, 1] > 0, old > 0))
    medians = {name: round(1e3 * statistics.median(each), 1) for name, each in seconds.items()}
    made = Counting.made / len(files)
    return {"ms": medians, "masks_made": made, "largest_gap": max(gaps), "equal_masks": equal}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--variant", default="vit_t")
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    sam = build_sam(options.variant)
    if options.variant == "vit_t":
        sam = build_base(SamConfig(), num_classes=MULTIMASK)
    files = sorted(options.folder.iterdir())
    chosen = files[:: max(1, len(files) // options.images)][: options.images]
    print({"images": len(chosen), **measure(sam, chosen)})


if __name__ == "__main__":
    main()
