"""What a round costs beside its clients' own computing, by where clients run.

    python benchmarks/engines.py [--clients 4 16 64] [--steps 10] [--rounds 4] [--as-params]
                                 [--kinds process dask ...] [--simulation PYTHON] [--json]

The same rounds run in this process, on two dask workers, over Flower (a SuperLink and the sites'
nodes on loopback, with TLS and keys), and, as a peer would do it, in Flower's simulation engine
(FedAvg and ray), which needs an environment of its own with ``pip install 'flwr[simulation]'``
beside samfed: ``--simulation`` names its Python. Images are generated ones of 32 px, eight to train
on and two to validate with at each client, and the network is small; ``--as-params`` takes 64 px,
and the network and batches of the project's settings.

CPU seconds are those of all processes, on one thread each; those that ``Client.answer`` takes are
the clients' own, and the rest is the overhead. The first round is left out. Nodes of the SuperLink
are threads of one process, for the sake of memory: a client's own CPU is the same there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from clock import CLOCK, clock_clients, read_clock
from inputs import IMAGES_PER_CLIENT, SERVER_IMAGES, prepare_with_labels, small_clients
from simulation import simulate

from pipeline.cluster import Cluster, Workers, choose_cluster
from pipeline.config import Config
from pipeline.data.partition import ServerPart, load_partition, save_partition
from pipeline.data.synthetic import write_dataset
from pipeline.federation.cluster import reach
from pipeline.federation.flower.launch import launch
from pipeline.federation.flower.link import Link
from pipeline.federation.flower.local import Deployment, deployed
from pipeline.federation.flower.node import run_node
from pipeline.federation.flower.site import Site
from pipeline.federation.inputs import ClientContext
from pipeline.federation.rounds import Engine
from pipeline.federation.runs import RunFolder
from pipeline.federation.server import federate
from pipeline.federation.workplace import Workplace
from pipeline.params import parse_config

KINDS = ("process", "dask", "superlink", "simulation")
WORKERS = 2


# --------------------------------------------------------------------------- clocks


def tree(process: psutil.Process | None = None) -> list[psutil.Process]:
    """Return a process, this one if None, and all that it has started."""
    process = process or psutil.Process()
    return [process, *process.children(recursive=True)]


def tree_cpu() -> float:
    """Return the CPU seconds of this process and of all that it has started."""
    total = 0.0
    for each in tree():
        with suppress(psutil.NoSuchProcess):
            total += sum(each.cpu_times()[:4])  # with those of children that have ended
    return total


def resident_mib() -> float:
    """Return this process's memory."""
    return float(psutil.Process().memory_info().rss) / 2**20


@dataclass
class Meter:
    """Clocks after each round."""

    clients: Callable[[], float] = read_clock
    memory: Callable[[], float] = resident_mib
    every: list[float] = field(default_factory=list)  # CPU seconds of all processes
    own: list[float] = field(default_factory=list)  # those of clients
    clock: list[float] = field(default_factory=list)
    peak_mib: float = 0.0

    def note(self) -> None:
        """Read them."""
        self.every.append(tree_cpu())
        self.own.append(self.clients())
        self.clock.append(time.perf_counter())
        self.peak_mib = max(self.peak_mib, self.memory())

    def round_is_over(self, what: str, done: int, total: int, note: str = "", /) -> None:
        """Read them after a round of ``federate``."""
        if "rounds" in what and done:
            self.note()

    def row(self, megabytes: float) -> dict[str, float]:
        """Return the median of all rounds but the first."""
        every, own, clock = (
            statistics.median(after - before for before, after in pairwise(each))
            for each in (self.every, self.own, self.clock)
        )
        found = {"clock_s": clock, "cpu_s": every, "clients_s": own, "beside_s": every - own}
        return {**found, "mb": megabytes, "server_mib": self.peak_mib}


def traffic(run: RunFolder) -> float:
    """Return the MB of weights either way in a round."""
    reports = run.history()[-1]["clients"].values()
    return float(sum(each["bytes_up"] + each["bytes_down"] for each in reports)) / 1e6


# --------------------------------------------------------------------------- our engines


def in_process(config: Config) -> dict[str, float]:
    clock_clients()
    meter = Meter()
    run = federate(config, progress=meter.round_is_over)
    return meter.row(traffic(run))


def on_dask(config: Config) -> dict[str, float]:
    meter = Meter()

    @contextmanager
    def clocked(workers: Workers) -> Iterator[Cluster]:
        with workers as cluster:
            cluster.client.run(clock_clients)
            meter.clients = lambda: float(sum(cluster.client.run(read_clock).values()))
            yield cluster

    @contextmanager
    def connect(
        workers: Workers | None, contexts: Sequence[ClientContext], workplace: Workplace
    ) -> Iterator[Engine]:
        assert workers is not None
        with reach(clocked(workers))(contexts, workplace) as engine:
            yield engine

    cluster = choose_cluster(scheduler=None, workers=WORKERS, device="cpu")
    run = federate(config, progress=meter.round_is_over, connect=partial(connect, cluster))
    return meter.row(traffic(run))


def over_superlink(config: Config) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        (folder / "flower").mkdir()
        deployment = stack.enter_context(deployed(folder / "flower"))
        started = nodes(config, deployment, folder, deployment.fleet.address)
        process, clock = stack.enter_context(started)
        known = {os.getpid(), process}

        def memory() -> float:
            server = [each for each in tree() if each.pid not in known]
            return float(sum(each.memory_info().rss for each in server)) / 2**20

        meter = Meter(clients=lambda: float(clock.read_text() or 0), memory=memory)
        sited = with_sites(config, config.federate.name)
        run = launch(sited, deployment.link, progress=meter.round_is_over)
    return meter.row(traffic(run))


def with_sites(config: Config, name: str) -> Config:
    """Return the settings of a run called ``name`` whose clients are at sites of their own."""
    sites = tuple(load_partition(config.cache.root / "partition.json").clients)
    federated = config.federate.model_copy(update={"sites": sites, "name": name})
    return config.model_copy(update={"federate": federated})


@contextmanager
def nodes(
    config: Config, deployment: Deployment, folder: Path, address: str
) -> Iterator[tuple[int, Path]]:
    """Start a process with the node of every site, which reach the SuperLink at ``address``.

    Yields:
        Its number, and the file in which it keeps its clients' clock.
    """
    names = load_partition(config.cache.root / "partition.json").clients
    sites = {
        name: (str(lay_out_site(folder / name, config, name)), str(deployment.register(name)))
        for name in names
    }
    link = (address, str(deployment.certificate))
    told = {"link": link, "sites": sites, "config": config.model_dump_json()}
    (folder / "told.json").write_text(json.dumps(told))
    clock = folder / "clock"
    clock.write_text("0")
    command = [sys.executable, str(Path(__file__)), "--nodes", str(folder / "told.json")]
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here.parent), str(here)])
    environment = os.environ | {CLOCK: str(clock), "PYTHONPATH": paths}
    with subprocess.Popen(command, env=environment) as process:
        try:
            yield process.pid, clock
        finally:
            process.kill()


def lay_out_site(folder: Path, config: Config, name: str) -> Path:
    """Give a site what it would have prepared and labelled by itself; return its cache."""
    whole, cache = config.cache.root, folder / "cache"
    for store in (f"images/{name}", f"sam/{name}.zarr", "images/server", "sam/server.zarr"):
        (cache / store).parent.mkdir(parents=True, exist_ok=True)
        (cache / store).symlink_to(whole / store)
    all_of_it = load_partition(whole / "partition.json")
    for owner, file in ((name, "partition.json"), ("server", "public.json")):
        ids = {i for part in all_of_it.splits(owner).values() for i in part}
        clients = {k: part for k, part in all_of_it.clients.items() if k == owner}
        server = all_of_it.server if owner == "server" else ServerPart()
        images = {i: all_of_it.images[i] for i in sorted(ids)}
        part = {"server": server, "clients": clients, "images": images}
        save_partition(cache / file, all_of_it.model_copy(update=part))
    return cache


def serve_nodes(told: Path) -> None:
    """Be the node of every site, until this process is killed."""
    clock_clients()
    given = json.loads(told.read_text())
    config = Config.model_validate_json(given["config"])
    link = Link(given["link"][0], Path(given["link"][1]))
    for name, (cache, key) in given["sites"].items():
        own = config.cache.model_copy(update={"root": Path(cache)})
        site = Site(name, config.model_copy(update={"cache": own}))
        threading.Thread(target=run_node, args=(site, link, Path(key)), daemon=True).start()
    threading.Event().wait()


# --------------------------------------------------------------------------- all of them


def in_simulation(config: Config) -> dict[str, float]:
    meter = Meter()
    meter.clients = lambda: 0.0  # known at the end
    clients, megabytes = simulate(config, meter.note, cores=WORKERS)
    meter.own = clients
    return meter.row(megabytes)


RUN = dict(zip(KINDS, (in_process, on_dask, over_superlink, in_simulation), strict=True))


def settings(folder: Path, clients: int, options: argparse.Namespace) -> Config:
    """Return the settings of all kinds."""
    batch = {} if options.as_params else {"labelled_batch": 4, "unlabelled_batch": 4}
    steps = {"rounds": options.rounds, "local_steps": options.steps}
    raw = small_clients(folder / "data", folder / "cache", clients, **steps, **batch)
    if options.as_params:
        raw["data"]["image_size"], raw["model"] = 64, {}
    return parse_config(raw, source="benchmark")


def lay_out(config: Config, clients: int) -> None:
    """Generate images, of which no two are the same, and make what stage two reads."""
    count = SERVER_IMAGES + IMAGES_PER_CLIENT * clients
    write_dataset(config.data.root, images_per_site=-(-count // 4), size_px=48, seed=0)
    prepare_with_labels(config)


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each engine and number of clients, each from a process of its own."""
    for clients in options.clients:
        for kind in options.kinds:
            python = options.simulation if kind == "simulation" else sys.executable
            with tempfile.TemporaryDirectory() as name:
                config = settings(Path(name), clients, options)
                lay_out(config, clients)
                command = [python, __file__, "--child", kind, config.model_dump_json()]
                here = Path(__file__).parent
                paths = os.pathsep.join([str(here.parent), str(here)])
                env = os.environ | {"PYTHONPATH": paths}
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=env)
                found = json.loads(done.stdout.splitlines()[-1])
            yield {"kind": kind, "clients": clients, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--steps", type=int, default=10, help="of each client in a round")
    parser.add_argument("--rounds", type=int, default=4, help="of which the first is left out")
    parser.add_argument("--as-params", action="store_true", help="the project's own settings")
    parser.add_argument("--kinds", nargs="+", choices=KINDS)
    parser.add_argument("--simulation", metavar="PYTHON", help="that has flwr[simulation]")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--nodes", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.nodes:
        return serve_nodes(options.nodes)
    if options.child:
        config = Config.model_validate_json(options.child[1])
        print(json.dumps(RUN[options.child[0]](config)))
        return None
    options.kinds = options.kinds or (KINDS if options.simulation else KINDS[:3])
    if "simulation" in options.kinds and not options.simulation:
        parser.error("simulation needs --simulation PYTHON")
    head = ("engine", "clients", "clock s", "CPU s", "clients'", "beside", "MB", "server MiB")
    if not options.json:
        print("| " + " | ".join(head) + " |\n|" + "---|" * len(head), flush=True)
    for row in measure(options):
        if options.json:
            print(json.dumps(row), flush=True)
            continue
        share = f"{row['beside_s']:.3f} ({row['beside_s'] / row['cpu_s']:.1%})"
        cells = [row["kind"], row["clients"], f"{row['clock_s']:.2f}", f"{row['cpu_s']:.2f}"]
        cells += [f"{row['clients_s']:.2f}", share, f"{row['mb']:.1f}", f"{row['server_mib']:.0f}"]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    return None


if __name__ == "__main__":
    main()
