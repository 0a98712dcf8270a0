"""Stage one on dask: workers in processes of their own, one of them killed, the same bytes."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import dask
import distributed
import pytest
from conftest import tiny_config, write_params

from pipeline import __version__
from pipeline.config import Config
from pipeline.data.partition import load_partition
from pipeline.data.prepare import prepare
from pipeline.data.synthetic import write_dataset
from pipeline.disk import writer_lock
from pipeline.errors import ConfigError, SamfedError
from pipeline.labelling.cluster import Cluster, connect, local_cluster, run_task
from pipeline.labelling.precompute import StageOneResult, precompute
from pipeline.labelling.repair import repair
from pipeline.labelling.worker import Task, store_path
from pipeline.sam.finetune import finetune
from pipeline.stores.label_store import Identity, LabelStore

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Two clients with two shards of images each; an adapted vit_t; labelled in process."""
    folder = tmp_path_factory.mktemp("cluster")
    write_dataset(folder / "data", images_per_site=40, size_px=32, seed=0)
    config = tiny_config(
        folder / "data",
        folder / "cache",
        partition={
            "scheme": "iid",
            "clients": 2,
            "server_images": 12,
            "calibration_min": 4,
            "val_fraction": 0.01,
            "test_fraction": 0.01,
        },
        precompute={"batch_size": 4, "threads": 1},
    )
    prepare(config)
    finetune(config)
    precompute(config)
    return config


@pytest.fixture
def config(prepared: Config, tmp_path: Path) -> Config:
    """The same partition and teacher, nothing labelled."""
    cache = tmp_path / "cache"
    shutil.copytree(prepared.cache.root / "teacher", cache / "teacher")
    shutil.copy(prepared.cache.root / "partition.json", cache)
    return prepared.model_copy(update={"cache": prepared.cache.model_copy(update={"root": cache})})


def content(config: Config) -> dict[str, bytes]:
    folder = config.cache.root / "sam"
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


class Workers:
    """A dask scheduler and workers, each a process that the command line starts."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "scheduler.json"
        self.processes = [
            self._start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
        ]
        self.address = ""

    def _start(self, role: str, *options: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "dask", role, "--scheduler-file", str(self.file)]
        command += ["--host", "127.0.0.1", "--no-dashboard"]
        return subprocess.Popen(
            [*command, *options], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def add(self, count: int) -> list[subprocess.Popen[bytes]]:
        options = ("--no-nanny", "--nthreads", "1", "--death-timeout", "60")
        new = [self._start("worker", *options) for _ in range(count)]
        self.processes += new
        while not self.file.is_file():
            assert self.processes[0].poll() is None, "the scheduler died"
            time.sleep(0.1)
        self.address = json.loads(self.file.read_text())["address"]
        return new

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.kill()
            process.wait()


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Workers]:
    started = Workers(tmp_path)
    yield started
    started.stop()


def test_a_worker_killed_in_the_middle_costs_nothing_but_its_shard(
    config: Config, prepared: Config, workers: Workers
) -> None:
    first, _ = workers.add(2)
    killed: list[int] = []

    def kill(what: str, done: int, total: int) -> None:
        if done and not killed:  # every worker has a task from the start on
            first.send_signal(signal.SIGKILL)
            killed.append(done)

    result = precompute(config, cluster=connect(workers.address), progress=kill)
    assert killed
    assert first.wait(10) == -signal.SIGKILL
    assert content(config) == content(prepared)
    assert (result.kept, result.failed) == (0, [])
    again = precompute(config, cluster=connect(str(workers.file)))
    assert (again.labelled, again.kept) == (0, result.labelled)


def test_the_command_with_local_workers(config: Config, prepared: Config, tmp_path: Path) -> None:
    params = write_params(tmp_path / "params.yaml", config)
    command = [sys.executable, str(ROOT / "cli.py"), "precompute-sam", "--json", "--workers", "2"]
    done = subprocess.run(
        [*command, "--params", str(params)], cwd=ROOT, capture_output=True, check=True, text=True
    )
    partition = load_partition(config.cache.root / "partition.json")
    count = len(partition.server.calibration) + sum(
        len(client.train) for client in partition.clients.values()
    )
    assert json.loads(done.stdout)["labelled"] == count
    # on a busy machine dask warns that its event loop was held up
    assert [line for line in done.stderr.splitlines() if "distributed" not in line] == []
    assert content(config) == content(prepared)


def test_ctrl_c_with_local_workers(config: Config, prepared: Config, tmp_path: Path) -> None:
    """A terminal sends it to the workers too: no process is left, and what is done is kept."""
    params = write_params(tmp_path / "params.yaml", config)
    command = [sys.executable, str(ROOT / "cli.py"), "precompute-sam", "--workers", "1"]
    server = store_path(config, "server")  # its few images come first
    with subprocess.Popen(
        [*command, "--params", str(params)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as run:
        try:
            while not (server.is_dir() and LabelStore(server).done().all()):
                assert run.poll() is None
                time.sleep(0.05)
            os.killpg(run.pid, signal.SIGINT)
            out, err = run.communicate()
            while group_is_there(run.pid):
                time.sleep(0.05)  # dask's own helpers take a moment
        finally:
            with suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
    assert (run.returncode, out) == (130, "")
    assert "interrupted: run the same command again to continue\n" in err  # beside dask's warnings
    assert "Traceback" not in err
    again = precompute(config)
    assert again.kept == len(LabelStore(server))
    assert content(config) == content(prepared)


def group_is_there(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_workers_error_is_the_commands(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image that cannot be read is named as in process; another samfed ends the run."""
    partition = load_partition(config.cache.root / "partition.json")
    name = next(iter(partition.clients))
    image = partition.clients[name].train[0]
    entry = partition.images[image].model_copy(update={"image": "images/none.png"})
    images = {**partition.images, image: entry}
    path = config.cache.root / "partition.json"
    path.write_text(partition.model_copy(update={"images": images}).model_dump_json())
    with local_cluster(1, device="cpu") as cluster:
        result = precompute(config, cluster=nullcontext(cluster))
        assert len(result.failed) == 1
        assert result.failed[0].startswith(f"{config.data.root / 'images/none.png'}: ")
        monkeypatch.setattr(
            "pipeline.labelling.cluster.__version__", "0.0.0"
        )  # here, not on the worker
        with pytest.raises(SamfedError, match=r"expected 0\.0\.0; install it"):
            precompute(config, cluster=nullcontext(cluster))
    with writer_lock(config.cache.root / "locks" / f"sam-{name}.lock"):
        pass  # nobody holds it any more


def test_a_worker_checks_the_teacher(config: Config, prepared: Config) -> None:
    shutil.copytree(prepared.cache.root / "sam", config.cache.root / "sam")
    (config.cache.root / "teacher" / "adapter.safetensors").write_bytes(b"")
    partition = load_partition(config.cache.root / "partition.json")
    name = next(iter(partition.clients))
    entry = partition.images[partition.clients[name].train[0]]
    task = Task(name, 0, (0,), ((entry.image, entry.image_sha256),))
    identity = LabelStore(store_path(config, name)).identity
    with pytest.raises(SamfedError, match="sha256 differs from its card"):
        run_task(config.model_dump_json(), identity, task, __version__)


def test_a_worker_that_sees_no_files(config: Config) -> None:
    identity = Identity(
        variant="vit_t",
        base_sha256="b",
        adapter_sha256="a",
        prompt="none",
        input_size=256,
        label_size=32,
        num_classes=1,
    )
    task = Task("client_0", 0, (0,), (("images/a.png", "0" * 64),))
    with pytest.raises(SamfedError) as caught:
        run_task(config.model_dump_json(), identity, task, __version__)
    assert f"{store_path(config, 'client_0')} is not there" in str(caught.value)


def test_no_scheduler_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.labelling.cluster._CONNECT_SECONDS", 0.5)
    with pytest.raises(ConfigError) as caught, connect("tcp://127.0.0.1:1"):
        pass
    assert str(caught.value) == (
        "--scheduler tcp://127.0.0.1:1: no dask scheduler answers within 0.5 s; "
        "check the address, or start one with `dask scheduler`"
    )


def test_a_scheduler_without_workers(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    workers.add(0)
    monkeypatch.setattr("pipeline.labelling.cluster._WORKERS_SECONDS", 0.5)
    with pytest.raises(ConfigError, match=r"no worker within 0\.5 s"), connect(workers.address):
        pass


def test_what_is_no_scheduler(tmp_path: Path) -> None:
    (tmp_path / "no.json").write_text("{}")
    for address in (str(tmp_path / "no.json"), "carrier-pigeon://here"):
        with pytest.raises(ConfigError) as caught, connect(address):
            pass
        assert str(caught.value).startswith(f"--scheduler {address}: no ")
        assert "\n" not in str(caught.value)


def test_a_scheduler_that_dies(config: Config, workers: Workers) -> None:
    workers.add(1)

    def kill(what: str, done: int, total: int) -> None:
        workers.processes[0].kill()

    quickly = dask.config.set({"distributed.comm.timeouts.connect": "1s"})
    gone = pytest.raises(SamfedError, match="scheduler is gone; run the same command again")
    with quickly, gone:
        precompute(config, cluster=connect(workers.address), progress=kill)
    owner = next(iter(load_partition(config.cache.root / "partition.json").clients))
    with writer_lock(config.cache.root / "locks" / f"sam-{owner}.lock"):
        pass  # nobody holds it any more


# --------------------------------------------------------------------------- no worker left


class Threads:
    """A scheduler and workers that are threads of this process: they come and go in no time."""

    def __init__(self, client: distributed.Client) -> None:
        self.client = client
        self.cluster = Cluster(client)
        self.where = f"the dask scheduler at {client.scheduler_info()['address']}"
        self.lost = (
            f"{self.where} lost its last worker and found no other within 0.2 s; finished shards "
            "are kept: see why workers stop, and run the same command again"
        )

    def lose(self) -> None:
        """All workers go, and what they hold with them."""
        for name, worker in list(self.client.cluster.workers.items()):
            self.client.sync(worker.close, executor_wait=False)
            del self.client.cluster.workers[name]
        self._await(0)

    def add(self) -> None:
        self.client.cluster.scale(1)
        self._await(1)

    def _await(self, count: int) -> None:
        while len(self.client.nthreads()) != count:
            time.sleep(0.01)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Threads]:
    monkeypatch.setattr("pipeline.labelling.cluster._LOOK_SECONDS", 0.1)
    monkeypatch.setattr("pipeline.labelling.cluster._WORKERS_SECONDS", 0.2)
    options: dict[str, Any] = {"processes": False, "dashboard_address": "127.0.0.1:0"}
    with (
        distributed.LocalCluster(n_workers=1, threads_per_worker=1, **options) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        yield Threads(client)


def half(config: Config, threads: Threads, **options: Any) -> StageOneResult:
    """Label one of the two clients, and the server's part."""
    name = next(iter(load_partition(config.cache.root / "partition.json").clients))
    return precompute(config, clients=[name], cluster=nullcontext(threads.cluster), **options)


def test_the_last_worker_goes_for_good(config: Config, prepared: Config, threads: Threads) -> None:
    finished: list[int] = []

    def lose(what: str, done: int, total: int) -> None:
        if done and not finished:
            finished.append(done)
            threads.lose()

    with pytest.raises(SamfedError) as caught:
        half(config, threads, progress=lose)
    assert str(caught.value) == threads.lost
    threads.add()
    again = half(config, threads)
    assert again.kept == finished[0]
    assert content(config).items() <= content(prepared).items()


def test_a_worker_comes_back_in_time(
    config: Config,
    prepared: Config,
    threads: Threads,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    wait = threads.client.wait_for_workers

    def add_and_wait(count: int, timeout: float) -> None:
        threads.add()
        wait(count, timeout)

    monkeypatch.setattr(threads.client, "wait_for_workers", add_and_wait)

    def lose(what: str, done: int, total: int) -> None:
        if not done:
            threads.lose()

    result = half(config, threads, progress=lose)
    assert (result.kept, result.failed) == (0, [])
    assert content(config).items() <= content(prepared).items()
    assert [record.getMessage() for record in caplog.records if "samfed" in record.name] == [
        f"{threads.where} has no worker left; waiting up to 0 s",
        f"{threads.where} has a worker again",
    ]


def test_the_last_worker_takes_its_results_with_it(threads: Threads) -> None:
    """A result stays with its worker until it is asked for."""
    future = threads.client.submit(str, 7)
    while not future.done():
        time.sleep(0.01)
    threads.lose()
    with pytest.raises(SamfedError) as caught:
        threads.cluster._result(future, "a task")
    assert str(caught.value) == threads.lost


def test_a_tasks_own_timeout_is_not_the_clusters(threads: Threads) -> None:
    def slow() -> None:
        raise TimeoutError("the file system is away")

    future = threads.client.submit(slow)
    with pytest.raises(TimeoutError, match="the file system is away"):
        threads.cluster._result(future, "a task")


# --------------------------------------------------------------------------- repair


def test_repair_on_workers(config: Config, prepared: Config, threads: Threads) -> None:
    shutil.copytree(prepared.cache.root / "sam", config.cache.root / "sam")
    name = next(iter(load_partition(config.cache.root / "partition.json").clients))
    shard = store_path(config, name) / "masks" / "c" / "1" / "0" / "0"
    shard.write_bytes(shard.read_bytes()[:-1])
    before = content(config)
    adapter = config.cache.root / "teacher" / "adapter.safetensors"
    good = adapter.read_bytes()
    adapter.write_bytes(b"")
    with pytest.raises(SamfedError, match="sha256 differs from its card"):  # a worker's finding
        repair(config, cluster=nullcontext(threads.cluster))
    assert content(config) == before
    adapter.write_bytes(good)
    result = repair(config, cluster=nullcontext(threads.cluster))
    assert result.labelled == len(LabelStore(store_path(config, name))) - 64
    assert content(config) == content(prepared)


# --------------------------------------------------------------------------- local workers


class Mute(distributed.deploy.ProcessInterface):
    """In the place of a worker's nanny: the worker died before anybody heard of it."""

    def __init__(self, scheduler: str, **options: object) -> None:
        super().__init__(scheduler=scheduler)


class Refused(Mute):
    """No process can be started."""

    async def start(self) -> None:
        raise RuntimeError("Nanny failed to start.")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(Mute, "Only 0/1 workers arrived after 0.2"), (Refused, "Nanny failed to start.")],
)
def test_local_workers_that_do_not_start(
    monkeypatch: pytest.MonkeyPatch, kind: type[Mute], reason: str
) -> None:
    monkeypatch.setattr("pipeline.labelling.cluster._WORKERS_SECONDS", 0.2)
    monkeypatch.setattr(distributed, "Nanny", kind)
    with pytest.raises(SamfedError) as caught, local_cluster(1, device="cpu"):
        pass
    assert str(caught.value) == (
        f"--workers 1: not all of them started ({reason}); see above what stopped them (memory?), "
        "or give fewer"
    )


class Lingering(Mute):
    """A worker that is busy when it is to close."""

    async def close(self) -> None:
        logging.getLogger("distributed.nanny").warning("still alive, killing")
        await super().close()


def test_local_workers_beside_another_dask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its port is no matter to us; a warning would end the test."""
    monkeypatch.setattr(distributed, "Nanny", Mute)
    monkeypatch.setattr(distributed.Client, "wait_for_workers", lambda *args, **options: None)
    with socket.socket() as taken:
        with suppress(OSError):  # taken already
            taken.bind(("127.0.0.1", 8787))
            taken.listen()
        with local_cluster(1, device="cpu"):
            pass


def test_local_workers_are_closed_without_a_word(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(distributed, "Nanny", Lingering)
    monkeypatch.setattr(distributed.Client, "wait_for_workers", lambda *args, **options: None)
    nanny = logging.getLogger("distributed.nanny")
    before = nanny.level
    with local_cluster(1, device="cpu"):
        nanny.warning("restarting a worker")
    assert [r.getMessage() for r in caplog.records if r.name == nanny.name] == [
        "restarting a worker"
    ]
    assert nanny.level == before
