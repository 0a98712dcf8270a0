"""Measure the label store alone: rows through stage one with a teacher that only copies.

    python benchmarks/store.py [--rows 10000] [--probabilities] [--json]

Masks are realistic (one smooth lesion with a soft border); every row reads the same tiny image, so
what is timed is the reading threads' work, the copying and the store.

Reads are rows for each second of CPU time, the best of three: the files are in memory, so this is
what one idle core reaches, and other work on the machine changes it little. ``decode`` is the least
that any reader needs: the files read and decompressed, nothing checked and nothing kept.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numcodecs.zstd import decompress
from numpy.typing import NDArray
from PIL import Image

from pipeline.config import Config
from pipeline.data.partition import Partition, ServerPart
from pipeline.disk import file_sha256
from pipeline.labelling.job import Job
from pipeline.labelling.worker import ChunkTask, label_chunks
from pipeline.params import parse_config
from pipeline.sam.device import Finished
from pipeline.stores.label_store import LabelStore, RowKey, read_labels
from pipeline.stores.pseudo_labels import PseudoLabels
from pipeline.stores.teacher_card import TeacherCard

SIZE = 256
VARIETY = 64  # different masks


class Copier:
    """A teacher that knows its answers; a batch takes the next masks in turn."""

    def __init__(self, *, probabilities: bool = False) -> None:
        rng = np.random.default_rng(0)
        axis = np.linspace(-1, 1, SIZE, dtype=np.float32)
        masks, confidences = [], []
        for _ in range(VARIETY):
            x, y, width, height = rng.uniform([-0.4, -0.4, 0.2, 0.2], [0.4, 0.4, 0.6, 0.6])
            angle = np.arctan2(axis[:, None] - y, axis[None] - x)
            waves = sum(
                rng.normal(0, 0.08) * np.cos(k * angle + rng.uniform(0, 6)) for k in range(2, 7)
            )
            radius = np.hypot((axis[None] - x) / width, (axis[:, None] - y) / height)
            logit = 12 * (1 + waves - radius) + rng.normal(0, 0.3, (SIZE, SIZE))
            probability = 1 / (1 + np.exp(-logit))
            masks.append(probability > 0.5)
            confidences.append(np.round(255 * np.maximum(probability, 1 - probability)))
        self.masks = np.array(masks, np.uint8)
        self.confidences = np.array(confidences, np.uint8)
        likely = np.where(self.masks > 0, self.confidences, 255 - self.confidences)
        both = np.stack([255 - likely, likely], axis=1)
        self.probabilities = both if probabilities else None
        self.next = 0
        self.seconds = 0.0
        self.card = TeacherCard(
            variant="copier",
            input_size=64,
            num_classes=1,
            prompt="none",
            lora_rank=None,
            base_sha256="random",
            adapter_sha256="0" * 64,
            parameters=0,
            trained_parameters=0,
            server_sha256="0" * 64,
            train_images=0,
            calibration_images=0,
            calibration_dice=0.0,
            seed=0,
        )

    def staged(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the image, at which nobody looks."""
        return image

    def begin(self, images: Sequence[NDArray[np.uint8]], size: int) -> Finished:
        """Return the next labels in turn, whatever the images."""
        pick = (self.next + np.arange(len(images))) % VARIETY
        self.next += len(images)
        likely = np.full(len(images), 0.9, np.float32)
        sure = None if self.probabilities is None else self.probabilities[pick]
        labels = PseudoLabels(self.masks[pick], self.confidences[pick], likely, probabilities=sure)
        return Finished(labels)

    def provenance(self) -> dict[str, str]:
        """Return what stands for the backend."""
        return {"backend": "copier"}


def settings(folder: Path) -> Config:
    raw = {
        "data": {"root": str(folder), "image_size": SIZE},
        "cache": {"root": str(folder / "cache")},
        "precompute": {"batch_size": 32},
    }
    return parse_config(raw, source="benchmark")


def rss_mib() -> float:
    """Return the size of the present resident set."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def write(
    config: Config, count: int, sha256: str, *, probabilities: bool
) -> tuple[LabelStore, list[tuple[float, float]]]:
    """Label ``count`` rows; seconds since the start and MiB after each chunk."""
    teacher = Copier(probabilities=probabilities)
    identity = teacher.card.identity(label_size=SIZE, precision="auto")
    rows = [RowKey(f"{i:07d}", sha256) for i in range(count)]
    nothing = ServerPart(train=(), calibration=())
    partition = Partition(scheme="iid", seed=0, server=nothing, clients={}, images={})
    job = Job(config, partition, identity)
    path = job.path(f"rows{count}")
    store = LabelStore.create(path, identity, rows, probabilities=probabilities)
    file = ("images/a.png", sha256)
    tasks = (
        ChunkTask(f"rows{count}", chunk, tuple(span), (file,) * len(span))
        for chunk in range(store.chunks)
        for span in (store.chunk_rows(chunk),)
    )
    track: list[tuple[float, float]] = []
    began = time.perf_counter()
    for result in label_chunks(job, teacher, tasks):
        store.mark_done(result.task.chunk, result.rows, result.provenance)
        track.append((time.perf_counter() - began, rss_mib()))
    return store, track


def rates(readers: dict[str, Callable[[], object]], rows: int) -> dict[str, float]:
    """Return rows for each second of CPU time, the best of three turns."""
    seconds = dict.fromkeys(readers, float("inf"))
    for _ in range(3):
        for name, read in readers.items():
            began = time.process_time()
            read()
            seconds[name] = min(seconds[name], time.process_time() - began)
    return {f"{name}_rows_per_s": rows / best for name, best in seconds.items()}


def read_in_chunks(store: LabelStore) -> None:
    """Read the store in the order of its chunks, one in memory at a time."""
    for chunk in range(store.chunks):
        store.read_chunk(chunk)


def decode(files: list[Path]) -> None:
    """Decompress each file, its crc32c left aside."""
    for file in files:
        decompress(file.read_bytes()[:-4])


def measure(rows: int, *, probabilities: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        image = folder / "images" / "a.png"
        Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(image)
        config, digest = settings(folder), file_sha256(image)
        write(config, 640, digest, probabilities=probabilities)  # warm
        store, track = write(config, rows, digest, probabilities=probabilities)
        seconds = [at for at, _ in track]
        half = len(track) // 2
        size = sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file())
        names = (store.chunk_files(chunk).values() for chunk in range(store.chunks))
        files = [store.path / name for each in names for name in each]
        readers: dict[str, Callable[[], object]] = {
            "read": lambda: read_in_chunks(store),
            "read_whole": lambda: read_labels(store.path, rows=store.rows, identity=store.identity),
            "decode": lambda: decode(files),
        }
        return {
            "rows": rows,
            "write_ms_per_row": 1e3 * seconds[-1] / rows,
            "second_half_over_first": (seconds[-1] - seconds[half - 1]) / seconds[half - 1],
            "rss_growth_mib": track[-1][1] - track[len(track) // 10][1],
            "kib_per_row": size / rows / 1024,
            **rates(readers, rows),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--probabilities", action="store_true", help="keep those of every class")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = measure(options.rows, probabilities=options.probabilities)
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        for name, value in result.items():
            print(f"{name:24} {value:10.2f}")


if __name__ == "__main__":
    main()
