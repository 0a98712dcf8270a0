"""What precision and views do to a trained teacher's masks, and to its speed, on its own images.

    python benchmarks/precision.py [--params FILE] [--set KEY=VALUE] [--images 64] [--json]

Labels D_p's calibration part and the first clients' images with the teacher of ``cache/teacher`` at
fp32, at each other precision that the device has, and at fp32 with 2, 4 and 8 views. Mask IoU to
fp32 with one view is pooled over the clients' images, in the client's frame. Dice and calibration
error (ECE) are to the truth: of the calibration part, and of the clients' images after
``samfed prepare --with-oracle``. ``gain`` is the mean of an image's Dice less that at fp32 with one
view, and its standard error.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
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
from pipeline.runtime import resolve_device, torch_threads
from pipeline.sam.int8 import has_vnni
from pipeline.sam.teacher import load_teacher
from pipeline.segmentation.metrics import dice_score
from pipeline.segmentation.reliability import Reliability
from pipeline.stores.image_store import read_image_store
from pipeline.stores.pseudo_labels import PseudoLabels, confidence_to_probability, join

Pixels = NDArray[np.uint8]
VIEWS = (2, 4, 8)


@dataclass(frozen=True)
class Part:
    """Images, and their true masks (N, S, S) where these are known."""

    images: list[Pixels]
    truth: Pixels | None


def read_images(config: Config, partition: Partition, ids: list[str]) -> list[Pixels]:
    entries = [partition.images[image_id] for image_id in ids]
    return [load_image(config.data.root, e.image, sha256=e.image_sha256) for e in entries]


def read_truth(config: Config, partition: Partition, name: str) -> dict[str, Pixels] | None:
    """Masks by id of a client, or of ``server``'s calibration part; None where nobody has them."""
    cache, ids = config.cache.root, partition.server.calibration
    path = cache / "images" / "server" / "calibration.zarr"
    if name != "server":
        path, ids = cache / "oracle" / f"{name}.zarr", partition.clients[name].train
    if not path.exists():
        return None
    size, classes = config.data.image_size, config.data.num_classes
    labels = read_image_store(path, image_ids=ids, size=size, num_classes=classes).labels
    return None if labels is None else dict(zip(ids, labels, strict=True))


def read_parts(config: Config, partition: Partition, count: int) -> dict[str, Part]:
    """Read the calibration part whole, and so many images of the clients by turns."""
    every = chain.from_iterable(zip(*(c.train for c in partition.clients.values()), strict=False))
    ids = {"calibration": [*partition.server.calibration], "clients": [*islice(every, count)]}
    owners = {"calibration": ["server"], "clients": [*partition.clients]}
    parts = {}
    for name, chosen in ids.items():
        known = [read_truth(config, partition, owner) for owner in owners[name]]
        masks = {k: v for each in known if each is not None for k, v in each.items()}
        whole = all(each is not None for each in known)
        truth = np.stack([masks[image_id] for image_id in chosen]) if whole else None
        parts[name] = Part(read_images(config, partition, chosen), truth)
    return parts


def label(
    config: Config, partition: Partition, parts: Mapping[str, Part], changes: Mapping[str, object]
) -> tuple[dict[str, PseudoLabels], float]:
    """Labels of each part in batches, and seconds an image after the first batch."""
    run = config.precompute.model_copy(update=changes)
    teacher = load_teacher(config.model_copy(update={"precompute": run}), partition)
    size, step = config.data.image_size, run.batch_size
    teacher.label(parts["clients"].images[:step], size)
    found, began, count = {}, time.perf_counter(), 0
    for name, part in parts.items():
        starts = range(0, len(part.images), step)
        batches = [teacher.label(part.images[i : i + step], size) for i in starts]
        found[name], count = join(batches), count + len(part.images)
    return found, (time.perf_counter() - began) / count


def against_truth(labels: PseudoLabels, truth: Pixels, classes: int) -> tuple[list[float], float]:
    """Dice of each image, and the calibration error over all pixels."""
    pairs = zip(labels.masks, truth, strict=True)
    dice = [dice_score(mask, true, num_classes=classes) for mask, true in pairs]
    reliability = Reliability()
    right = labels.masks == truth
    reliability.add(confidence_to_probability(labels.confidences).ravel(), right.ravel())
    return dice, reliability.error()


def measure(config: Config, count: int) -> dict[str, dict[str, Any]]:
    partition = load_partition(config.cache.root / "partition.json", with_public=True)
    parts = read_parts(config, partition, count)
    cuda = resolve_device(config.precompute.device).type == "cuda"
    able = has_vnni() and not config.sam.variant.startswith("timm:")  # which lack linear layers
    on_cpu = ("fp32", "bf16", "int8") if able else ("fp32", "bf16")
    rows: dict[str, dict[str, object]] = {
        name: {"precision": name, "views": 1}
        for name in (("fp32", "bf16", "fp16") if cuda else on_cpu)
    }
    rows |= {f"fp32, {n} views": {"precision": "fp32", "views": n} for n in VIEWS}
    results: dict[str, dict[str, Any]] = {}
    exact: dict[str, PseudoLabels] = {}
    plain: dict[str, list[float]] = {}
    for name, changes in rows.items():
        labels, seconds = label(config, partition, parts, changes)
        exact = exact or labels
        iou = mask_iou(labels["clients"].masks, exact["clients"].masks)
        result: dict[str, Any] = {"images_per_s": 1 / seconds, "mask_iou": iou}
        result["cost"] = results["fp32"]["images_per_s"] * seconds if results else 1.0
        for kind, part in parts.items():
            if part.truth is not None:
                dice, ece = against_truth(labels[kind], part.truth, config.data.num_classes)
                gains = np.subtract(dice, plain.setdefault(kind, dice))
                error = float(gains.std(ddof=1) / len(gains) ** 0.5)
                gain = {"gain": float(gains.mean()), "gain_se": error}
                result[kind] = {"n": len(dice), "dice": float(np.mean(dice)), "ece": ece} | gain
        results[name] = result
    return results


def text(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Format the rows as lines."""
    lines = []
    for name, row in results.items():
        line = f"{name}: {row['images_per_s']:.2f} images/s, cost x {row['cost']:.2f}, "
        line += f"IoU to fp32 {row['mask_iou']:.4f}"
        for kind in ("calibration", "clients"):
            if kind in row:
                one = row[kind]
                line += f"; {kind} ({one['n']}): Dice {one['dice']:.4f}, gain {one['gain']:+.4f} "
                line += f"(s.e. {one['gain_se']:.4f}), ECE {one['ece']:.4f}"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    config = load_config(options.params, tuple(options.set))
    with torch_threads(config.precompute.threads):
        results = measure(config, options.images)
    print(json.dumps(results, indent=1) if options.json else text(results))


if __name__ == "__main__":
    main()
