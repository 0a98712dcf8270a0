"""Stage one of many tiny images on dask workers, one of which dies, and the coordinator too.

    python benchmarks/many_images.py [--images 20000] [--workers 4] [--json]

The images are generated, the teacher is as small as one can be, so that what is measured is all but
the network: tasks, files, marks. A scheduler and workers run as processes of their own, one thread
each. When a quarter is labelled a worker is killed, and another one started in its place, as a
cluster's manager would do; when half is labelled the coordinator is killed and called again.

For each tenth of the images: images a second by the clock, images for each CPU second of the
workers (steady beside other work), and the coordinator's memory and CPU time. In the end every
store is verified, byte by byte.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.cluster import connect
from pipeline.config import Config
from pipeline.data.prepare import prepare
from pipeline.labelling.maintenance import verify
from pipeline.labelling.precompute import precompute
from pipeline.params import parse_config
from pipeline.sam.finetune import finetune

SIZE = 32  # px
MASKS = 24  # images that have one; the server's
PARTS = 10
KILL_WORKER, KILL_COORDINATOR = 0.25, 0.5  # of all rows
TICK = os.sysconf("SC_CLK_TCK")


def settings(folder: Path) -> Config:
    raw = {
        "data": {"root": str(folder / "data"), "image_size": SIZE},
        "cache": {"root": str(folder / "cache")},
        "partition": {
            "scheme": "iid",
            "clients": 4,
            "server_images": MASKS,
            "server_site": None,
            "calibration_min": 8,
            "val_fraction": 0.0,
            "test_fraction": 0.0,
        },
        "sam": {"variant": "timm:test_efficientnet", "input_size": 64, "epochs": 1, "threads": 1},
        "precompute": {"batch_size": 32, "threads": 1, "readers": 1, "device": "cpu"},
    }
    return parse_config(raw, source="benchmark")


def write_images(folder: Path, count: int) -> None:
    """Write ``count`` different images, and masks for the first of them."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for i in range(count):
        small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        image.save(folder / "images" / f"{i:07d}.png")
        if i < MASKS:
            mask = (np.asarray(image)[..., 0] > 127).astype(np.uint8)
            Image.fromarray(mask).save(folder / "masks" / f"{i:07d}.png")


# --------------------------------------------------------------------------- processes


def cpu_seconds(process: int) -> float:
    """Return the CPU time that a process has taken, user and system."""
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def memory_mib() -> float:
    """Return this process's resident memory, now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:"))


class Workers:
    """A scheduler and its workers, each a process."""

    def __init__(self, folder: Path, count: int) -> None:
        self.file, self._lost = folder / "scheduler.json", 0.0
        self._scheduler = self._start("scheduler", "--port", "0")
        self._workers = [self._start("worker", *self._options()) for _ in range(count)]

    @staticmethod
    def _options() -> tuple[str, ...]:
        return "--no-nanny", "--nthreads", "1", "--death-timeout", "60"

    def _start(self, role: str, *options: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "dask", role, "--scheduler-file", str(self.file)]
        command += ["--host", "127.0.0.1", "--no-dashboard", *options]
        silent = subprocess.DEVNULL
        return subprocess.Popen(command, stdout=silent, stderr=silent)

    def cpu_seconds(self) -> float:
        """Return what all workers took so far, dead ones included."""
        return self._lost + sum(cpu_seconds(worker.pid) for worker in self._workers)

    def replace_one(self) -> None:
        """Kill a worker, and start another one."""
        worker = self._workers.pop(0)
        self._lost += cpu_seconds(worker.pid)
        worker.kill()
        worker.wait()
        self._workers.append(self._start("worker", *self._options()))

    def stop(self) -> None:
        for process in (*self._workers, self._scheduler):
            process.kill()
            process.wait()


def coordinate(folder: Path) -> None:
    """Run stage one on the workers, and print a line for each chunk that is done."""

    def show(what: str, done: int, total: int, note: str = "", /) -> None:
        line = {"done": done, "total": total, "mib": memory_mib(), "cpu_s": time.process_time()}
        print(json.dumps(line), flush=True)

    result = precompute(
        settings(folder), cluster=connect(str(folder / "scheduler.json")), progress=show
    )
    end = {"labelled": result.labelled, "already_labelled": result.already_labelled}
    print(json.dumps({**end, "failed": result.failed}), flush=True)


# --------------------------------------------------------------------------- the run


@dataclass
class Moment:
    """What had been done and taken at one time."""

    done: int
    clock_s: float
    worker_s: float  # CPU
    coordinator_mib: float
    coordinator_s: float  # CPU, of the coordinator that ran then


class Run:
    """Stage one with its accidents, watched."""

    def __init__(self, folder: Path, workers: Workers) -> None:
        self.moments: list[Moment] = []
        self.ends: list[dict[str, Any]] = []  # of each coordinator that came to its end
        self._folder, self._workers = folder, workers
        self._killed = {"worker": False, "coordinator": False}

    def coordinate(self) -> None:
        """Call the coordinator, and call it again once it was killed."""
        while not self.ends:
            command = [sys.executable, __file__, "--coordinate", str(self._folder)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as coordinator:
                for line in self._lines(coordinator):
                    self._look(line, coordinator)
            if not self.ends and not self._killed["coordinator"]:
                raise RuntimeError("the coordinator ended by itself; see above")

    @staticmethod
    def _lines(coordinator: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
        if coordinator.stdout is not None:
            yield from map(json.loads, coordinator.stdout)

    def _look(self, line: dict[str, Any], coordinator: subprocess.Popen[str]) -> None:
        if "labelled" in line:
            self.ends.append(line)
            return
        done, total = line["done"], line["total"]
        clock, work = time.perf_counter(), self._workers.cpu_seconds()
        self.moments.append(Moment(done, clock, work, line["mib"], line["cpu_s"]))
        if done >= KILL_WORKER * total and not self._killed["worker"]:
            self._killed["worker"] = True
            self._workers.replace_one()
        if done >= KILL_COORDINATOR * total and not self._killed["coordinator"]:
            self._killed["coordinator"] = True
            coordinator.kill()

    def parts(self) -> list[dict[str, float]]:
        """Return each tenth of the images, from the first chunk on: workers had loaded by then."""
        seen = [moment for moment in self.moments if moment.done > self.moments[0].done]
        total = seen[-1].done
        edges = [next(m for m in seen if m.done >= total * part / PARTS) for part in range(PARTS)]
        return [
            {
                "done": after.done,
                "images_per_s": (after.done - before.done) / (after.clock_s - before.clock_s),
                "images_per_worker_s": (after.done - before.done)
                / (after.worker_s - before.worker_s),
                "coordinator_mib": after.coordinator_mib,
                "coordinator_s": after.coordinator_s,
            }
            for before, after in pairwise([*edges, seen[-1]])
        ]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = settings(folder)
        write_images(folder / "data", options.images)
        began, cpu = time.perf_counter(), time.process_time()
        prepare(config, allow_duplicates=True)
        prepared = {
            "clock_s": time.perf_counter() - began,
            "cpu_s": time.process_time() - cpu,
            "partition_mib": (config.cache.root / "partition.json").stat().st_size / 2**20,
        }
        finetune(config)
        workers = Workers(folder, options.workers)
        run = Run(folder, workers)
        try:
            run.coordinate()
        finally:
            workers.stop()
        checked = verify(config)
        return {
            "images": options.images,
            "prepare": prepared,
            "parts": run.parts(),
            "end": run.ends[0],
            "faults": [str(fault) for fault in checked.faults],
            "last": asdict(run.moments[-1]),
        }


def show(found: dict[str, Any]) -> None:
    prepared, end = found["prepare"], found["end"]
    print(
        f"prepare: {found['images'] / prepared['cpu_s']:.0f} images for a CPU second, "
        f"partition.json {prepared['partition_mib']:.1f} MiB"
    )
    print(f"{'done':>8} {'images/s':>9} {'/worker s':>10} {'coord. MiB':>11} {'coord. CPU s':>13}")
    for row in found["parts"]:
        print(
            f"{row['done']:8.0f} {row['images_per_s']:9.1f} {row['images_per_worker_s']:10.1f} "
            f"{row['coordinator_mib']:11.1f} {row['coordinator_s']:13.2f}"
        )
    print(
        f"the second coordinator found {end['already_labelled']} labelled and did "
        f"{end['labelled']}; {len(end['failed'])} failed, {len(found['faults'])} faults"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--coordinate", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.coordinate:
        coordinate(options.coordinate)
        return
    found = measure(options)
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        show(found)


if __name__ == "__main__":
    main()
