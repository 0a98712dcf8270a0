"""What precision and backend do to a trained teacher's masks, and to its speed, on its own images.

    python benchmarks/precision.py [--params FILE] [--set KEY=VALUE] [--images 64] [--json]

Labels the first clients' images with the teacher of ``cache/teacher`` at fp32 and at each other
precision that the device has; mask IoU is pooled over all images, in the client's frame.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import Config
from pipeline.data.images import load_image
from pipeline.data.partition import Partition, load_partition
from pipeline.labelling.fidelity import mask_iou
from pipeline.params import load_config
from pipeline.runtime import resolve_device
from pipeline.sam.int8 import has_vnni
from pipeline.sam.teacher import load_teacher
from pipeline.stores.pseudo_labels import PseudoLabels


def read_images(config: Config, partition: Partition, count: int) -> list[NDArray[np.uint8]]:
    every = chain.from_iterable(zip(*(c.train for c in partition.clients.values()), strict=False))
    entries = [partition.images[image_id] for image_id in islice(every, count)]
    return [load_image(config.data.root, e.image, sha256=e.image_sha256) for e in entries]


def label(
    config: Config, partition: Partition, images: list[NDArray[np.uint8]], precision: str
) -> tuple[list[PseudoLabels], float]:
    """Labels in batches, and seconds an image after the first batch."""
    run = config.precompute.model_copy(update={"precision": precision})
    teacher = load_teacher(config.model_copy(update={"precompute": run}), partition)
    size, step = config.data.image_size, run.batch_size
    parts = [teacher.label(images[:step], size)]
    began = time.perf_counter()
    parts += [teacher.label(images[i : i + step], size) for i in range(step, len(images), step)]
    return parts, (time.perf_counter() - began) / (len(images) - step)


def measure(config: Config, count: int) -> dict[str, dict[str, Any]]:
    partition = load_partition(config.cache.root / "partition.json")
    images = read_images(config, partition, count)
    cuda = resolve_device(config.precompute.device).type == "cuda"
    results: dict[str, dict[str, Any]] = {}
    exact: NDArray[np.uint8] | None = None
    on_cpu = ("fp32", "bf16", "int8") if has_vnni() else ("fp32", "bf16")
    for precision in ("fp32", "bf16", "fp16") if cuda else on_cpu:
        parts, seconds = label(config, partition, images, precision)
        masks = np.concatenate([part.masks for part in parts])
        exact = masks if exact is None else exact
        results[precision] = {"images_per_s": 1 / seconds, "mask_iou": mask_iou(masks, exact)}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = measure(load_config(options.params, tuple(options.set)), options.images)
    if options.json:
        print(json.dumps(results, indent=1))
    else:
        for name, row in results.items():
            print(f"{name}: {row['images_per_s']:.2f} images/s, IoU to fp32 {row['mask_iou']:.4f}")


if __name__ == "__main__":
    main()
