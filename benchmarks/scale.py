"""Stage two from four to 256 clients: seconds a round, and memory.

    python benchmarks/scale.py [--clients 4 16 64 256] [--workers 2] [--per-round 50] [--steps 2]
                               [--kinds "one network" ...] [--json] [--figure docs/scale.png]

Every client has eight training and two validation images of 32 px (generated ones, repeated) and
takes two steps a round (``--steps``), so that work grows with the number of clients alone. Each
setting runs in a process of its own: clients with one network, then with two networks in turn that
exchange predictions, then, if asked for, clients with one network on dask's workers. CPU seconds
are those of all processes (on one thread each), steady beside other work; "outside" are those of
the coordinator, without the clients that run in it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from inputs import IMAGES_PER_CLIENT, SERVER_IMAGES, SMALL, prepare_with_labels, small_clients
from torch import Tensor

from pipeline.cluster import Cluster, Workers, choose_cluster
from pipeline.config import Config
from pipeline.data.synthetic import write_dataset
from pipeline.federation.cluster import reach
from pipeline.federation.inputs import ClientContext, load_client, load_inputs, load_part
from pipeline.federation.messages import AnyRequest, Reply
from pipeline.federation.rounds import Engine
from pipeline.federation.server import federate
from pipeline.federation.workplace import Workplace
from pipeline.params import parse_config

ROUNDS = 3  # the first is left out
MOST_WITH_OWN = 64  # clients with networks of their own, for the sake of time
OWN = [SMALL, {**SMALL, "decoder_channels": [24, 12, 8]}]
KINDS = ("one network", "own networks", "one network, on workers")


def settings(
    root: Path, cache: Path, clients: int, kind: str, options: argparse.Namespace
) -> Config:
    raw = small_clients(
        root,
        cache,
        clients,
        name=kind,
        clients_per_round=options.per_round or clients,
        rounds=ROUNDS,
        local_steps=options.steps,
        labelled_batch=4,
        unlabelled_batch=4,
        fusion_epochs=1,
    )
    raw["model"] = {**SMALL, "clients": OWN if kind == "own networks" else []}
    return parse_config(raw, source="benchmark")


# --------------------------------------------------------------------------- one setting


def memory_mib(field: str) -> float:
    """VmRSS, now, or VmHWM, at most. ``ru_maxrss`` would count the parent before ``exec``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def data_of(context: ClientContext) -> tuple[int, int]:
    """Return the number of a client's training images, and the bytes of its images and labels."""
    data = load_client(context)
    size = sum(v.nbytes for v in vars(data).values() if isinstance(v, Tensor))
    if context.val:
        part = load_part(context, "val")
        size += part.images.nbytes + (0 if part.labels is None else part.labels.nbytes)
    return len(data.images), size


class Watched:
    """An engine in this process: the CPU seconds that its clients take are summed."""

    def __init__(self, inner: Engine) -> None:
        self._inner, self.entries, self.seconds = inner, inner.entries, 0.0

    def run(self, requests: Iterable[AnyRequest]) -> Iterator[Reply]:
        """Yield the replies."""
        replies = iter(self._inner.run(requests))
        while True:
            began = time.process_time()
            reply = next(replies, None)
            self.seconds += time.process_time() - began
            if reply is None:
                return
            yield reply


class Meter:
    """What the processes of a run take: CPU seconds a round, and memory."""

    def __init__(self) -> None:
        self.cluster: Cluster | None = None
        self.engine: Watched | None = None
        self.load_s = 0.0
        self.every: list[float] = []  # CPU seconds of all processes after each round
        self.outside: list[float] = []  # those of this process, without its clients'
        self.worker_mib = 0.0

    def workers(self, work: Callable[..., float], *given: str) -> list[float]:
        """Call something in every worker."""
        return [] if self.cluster is None else [*self.cluster.client.run(work, *given).values()]

    @contextmanager
    def note(self, workers: Workers) -> Iterator[Cluster]:
        """Keep the workers at hand."""
        with workers as self.cluster:
            yield self.cluster

    @contextmanager
    def connect(
        self, workers: Workers | None, contexts: Sequence[ClientContext], workplace: Workplace
    ) -> Iterator[Engine]:
        """Reach the clients; note how long it takes to load them."""
        began = time.perf_counter()
        reached = None if workers is None else self.note(workers)
        with reach(reached)(contexts, workplace) as engine:
            self.load_s = time.perf_counter() - began
            self.engine = Watched(engine)
            yield engine if workers else self.engine

    def round_is_over(self, what: str, done: int, total: int, note: str = "", /) -> None:
        """Read the clocks after a round."""
        if "rounds" in what and done and self.engine is not None:
            here = time.process_time()
            self.every.append(here + sum(self.workers(time.process_time)))
            self.outside.append(here - self.engine.seconds)
            self.worker_mib = max(self.workers(memory_mib, "VmHWM"), default=0.0)


def run_child(config: Config, workers: int) -> dict[str, Any]:
    """Run one setting in this process, or on workers that it starts."""
    imported, meter = memory_mib("VmRSS"), Meter()
    cluster = choose_cluster(scheduler=None, workers=workers or None, device="cpu")
    connect = partial(meter.connect, cluster)
    run = federate(config, progress=meter.round_is_over, connect=connect)
    peak = memory_mib("VmHWM")
    every, outside = (
        statistics.median(after - before for before, after in pairwise(clock))
        for clock in (meter.every, meter.outside)
    )
    owned = [data_of(context) for context in load_inputs(config).contexts]
    return {
        "imported_mib": imported,
        "load_s": meter.load_s,
        "images": sum(images for images, _ in owned),
        "data_mib": sum(size for _, size in owned) / 2**20,
        "round_s": every,
        "outside_s": outside,
        "wall_s": statistics.median(entry["seconds"] for entry in run.history()[1:]),
        "peak_mib": peak,
        "worker_mib": meter.worker_mib,
        "checkpoint_mib": max(run.path.glob("checkpoints/*")).stat().st_size / 2**20,
    }


# --------------------------------------------------------------------------- all settings


def lay_out(generated: Path, root: Path, count: int) -> None:
    """``count`` images with masks, the generated ones over and over under new names."""
    files = sorted((generated / "images").iterdir())
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True)
        for i in range(count):
            shutil.copyfile(generated / kind / files[i % len(files)].name, root / kind / f"{i}.png")


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    workers = options.workers
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_dataset(folder / "generated", images_per_site=8, size_px=48, seed=0)
        for clients in options.clients:
            root, cache = folder / f"data{clients}", folder / f"cache{clients}"
            lay_out(folder / "generated", root, SERVER_IMAGES + IMAGES_PER_CLIENT * clients)
            prepare_with_labels(settings(root, cache, clients, KINDS[0], options))
            for kind in options.kinds:
                if kind == "own networks" and clients > MOST_WITH_OWN:
                    continue
                config = settings(root, cache, clients, kind, options)
                command = [sys.executable, __file__, "--child", config.model_dump_json()]
                command += ["--workers", str(workers if kind == KINDS[2] else 0)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
                rows.append({"kind": kind, "clients": clients, **json.loads(done.stdout)})
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def slopes(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return a client's cost, between the smallest and the largest setting, in ms and KiB."""
    first, last = rows[0], rows[-1]
    more = last["clients"] - first["clients"]

    def each(key: str, unit: float) -> float:
        return float((last[key] - first[key]) / more * unit)

    return {
        "round_ms": each("round_s", 1e3),
        "load_ms": each("load_s", 1e3),
        "peak_kib": each("peak_mib", 1024),
        "data_kib": each("data_mib", 1024),
        "checkpoint_kib": each("checkpoint_mib", 1024),
    }


def show(rows: list[dict[str, Any]]) -> None:
    head = ["clients", "CPU s", "outside s", "outside", "clock s", "peak MiB"]
    head += ["worker MiB", "data MiB", "load s"]
    for kind in KINDS:
        mine = [row for row in rows if row["kind"] == kind]
        if not mine:
            continue
        print(f"{kind}\n" + " ".join(f"{name:>11}" for name in head))
        for row in mine:
            print(
                f"{row['clients']:11} {row['round_s']:11.2f} {row['outside_s']:11.3f} "
                f"{row['outside_s'] / row['round_s']:11.1%} {row['wall_s']:11.2f} "
                f"{row['peak_mib']:11.1f} {row['worker_mib']:11.1f} {row['data_mib']:11.2f} "
                f"{row['load_s']:11.2f}"
            )
        if len(mine) > 1:
            values = slopes(mine)
            print("a client adds " + ", ".join(f"{k} {v:.1f}" for k, v in values.items()))


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Seconds a round and peak memory against the clients' images."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for kind in KINDS[:2]:
        mine = [row for row in rows if row["kind"] == kind]
        images = [row["images"] for row in mine]
        left.plot(images, [row["round_s"] for row in mine], "o-", label=kind)
        right.plot(images, [row["peak_mib"] for row in mine], "o-", label=kind)
    mine = [row for row in rows if row["kind"] == "one network"]
    rest = [row["peak_mib"] - row["data_mib"] for row in mine]
    label = "one network, without the images and labels"
    right.plot([row["images"] for row in mine], rest, "--", color="C0", label=label)
    left.set(xlabel="clients' training images", ylabel="CPU seconds a round", ylim=(0, None))
    right.set(xlabel="clients' training images", ylabel="peak memory, MiB", ylim=(0, None))
    left.legend(frameon=False)
    right.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[4, 16, 64, 256])
    parser.add_argument("--workers", type=int, default=0, help="also on so many dask workers")
    parser.add_argument("--per-round", type=int, default=0, help="clients a round (default: all)")
    parser.add_argument("--steps", type=int, default=2, help="of each client in a round")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="default: all that workers allow")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        config = Config.model_validate_json(options.child)
        print(json.dumps(run_child(config, options.workers)))
        return
    options.kinds = options.kinds or (KINDS if options.workers else KINDS[:2])
    rows = measure(options)
    if options.figure:
        draw(rows, options.figure)
    if options.json:
        kinds = [kind for kind in KINDS if any(row["kind"] == kind for row in rows)]
        every = {kind: slopes([row for row in rows if row["kind"] == kind]) for kind in kinds}
        print(json.dumps({"rows": rows, "a_client_adds": every}, indent=1))
    else:
        show(rows)


if __name__ == "__main__":
    main()
