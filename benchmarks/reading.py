"""What a core needs to bring one photograph to the teacher: CPU milliseconds of each step.

    python benchmarks/reading.py [--images 8] [--repeats 5] [--json]

Photographs of nothing (smooth noise with grain), 1200 x 900, as JPEG files of quality 92. CPU time
is steady beside other work on the machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data.images import read_image, resize_image
from pipeline.disk import file_sha256
from pipeline.sam.device import Image as Pixels
from pipeline.sam.frame import fit_longest_side, to_input_frame

IMAGE_HW, TEACHER, CLIENT = (900, 1200), 1024, 256  # px


def write_photographs(folder: Path, count: int) -> list[Path]:
    rng = np.random.default_rng(0)
    files = [folder / f"{i}.jpg" for i in range(count)]
    for file in files:
        small = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
        smooth = Image.fromarray(small).resize(IMAGE_HW[::-1], Image.Resampling.BICUBIC)
        grain = rng.normal(0, 6, (*IMAGE_HW, 3))
        picture = np.clip(np.asarray(smooth) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(picture).save(file, quality=92)
    return files


def milliseconds(step: Callable[[], object], repeats: int) -> float:
    """Return the CPU time of one call, the median of several."""
    taken = []
    for _ in range(repeats):
        began = time.process_time()
        step()
        taken.append(time.process_time() - began)
    return 1e3 * statistics.median(taken)


def steps_of(file: Path) -> dict[str, Callable[[], object]]:
    image: Pixels = read_image(file).pixels
    fitted = fit_longest_side(image, TEACHER)
    return {
        "sha256": lambda: file_sha256(file),
        "read, check and decode": lambda: read_image(file),
        "resize for the teacher": lambda: fit_longest_side(image, TEACHER),
        "resize for the client": lambda: resize_image(image, CLIENT),
        "pad and batch": lambda: to_input_frame([fitted], TEACHER),
    }


def measure(count: int, repeats: int) -> dict[str, float]:
    steps: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        for file in write_photographs(Path(name), count):
            for step, call in steps_of(file).items():
                steps.setdefault(step, []).append(milliseconds(call, repeats))
    return {name: statistics.mean(values) for name, values in steps.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measure(options.images, options.repeats)
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        for name, value in found.items():
            print(f"{name:24} {value:7.2f} ms")


if __name__ == "__main__":
    main()
