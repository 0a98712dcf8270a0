"""Where dask workers are: processes of their own, one of them killed, and the same bytes."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import dask
import distributed
import pytest
from conftest import ADAPTED, call, copy_cache, tiny_config, write_params
from dask_processes import Workers, group_is_there
from forks import Forks
from teachers import content

from pipeline.cluster import connect, local_cluster
from pipeline.config import Config
from pipeline.data.partition import load_partition
from pipeline.data.prepare import prepare
from pipeline.data.synthetic import write_dataset
from pipeline.disk import writer_lock
from pipeline.errors import ConfigError, SamfedError
from pipeline.labelling.job import owner_images, store_lock
from pipeline.labelling.precompute import precompute
from pipeline.sam.finetune import finetune
from pipeline.stores.label_store import LabelStore


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
    return copy_cache(prepared, tmp_path / "cache", ADAPTED)


@pytest.fixture
def workers(tmp_path: Path, forks: Forks) -> Iterator[Workers]:
    started = Workers(tmp_path, forks)
    yield started
    started.stop()


def test_a_worker_killed_in_the_middle_costs_nothing_but_its_shard(
    config: Config, prepared: Config, workers: Workers
) -> None:
    first, _ = workers.add(2)
    killed: list[int] = []

    def kill(what: str, done: int, total: int) -> None:
        if done and not killed:  # every worker has a task from the start on
            first.kill()
            killed.append(done)

    result = precompute(config, cluster=connect(workers.address), progress=kill)
    assert killed
    assert first.wait(10) == -signal.SIGKILL
    assert content(config.cache.root / "sam") == content(prepared.cache.root / "sam")
    assert (result.already_labelled, result.failed) == (0, [])
    again = precompute(config, cluster=connect(str(workers.file)))
    assert (again.labelled, again.already_labelled) == (0, result.labelled)


def test_ctrl_c_with_local_workers(
    config: Config, prepared: Config, tmp_path: Path, forks: Forks
) -> None:
    """A terminal sends it to the workers too: none is left, and what is done is kept.

    SIGTERM takes the same way (tests/test_signals.py).
    Then the command again, to the end: nothing is said but the result.
    """
    params = write_params(tmp_path / "params.yaml", config)
    quiet = ("--json", "--progress", "none")  # it would say each half minute that it still works
    options = ("precompute-sam", *quiet, "--params", str(params), "--workers")
    server = config.cache.root / "sam" / "server.zarr"  # its few images come first
    said = [tmp_path / "out", tmp_path / "err"]
    with said[0].open("w") as out, said[1].open("w") as err:
        run = forks.start("samfed", *options, 1, files=(None, out.fileno(), err.fileno()))
    try:
        while not (server.is_dir() and LabelStore(server).done().all()):
            assert run.is_running()
            time.sleep(0.01)  # the rest takes a second or two
        os.killpg(run.pid, signal.SIGINT)
        code = run.wait()
        while group_is_there(run.pid):
            time.sleep(0.05)  # dask's own helpers take a moment
    finally:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    out, err = (path.read_text() for path in said)
    assert (code, out) == (130, "")
    assert "interrupted: run the same command again to continue\n" in err  # beside dask's warnings
    assert "Traceback" not in err
    assert "leaked" not in err
    again = call(*options, 2)
    count = sum(
        map(len, owner_images(load_partition(config.cache.root / "partition.json")).values())
    )
    found = json.loads(again.stdout)
    assert found["already_labelled"] == len(LabelStore(server))
    assert found["labelled"] == count - found["already_labelled"]
    # on a busy machine dask warns that its event loop was held up
    assert [line for line in again.stderr.splitlines() if "distributed" not in line] == []
    assert content(config.cache.root / "sam") == content(prepared.cache.root / "sam")


def test_local_workers_are_stopped_without_a_word() -> None:
    """dask's would show a traceback beside our one line, as often as not."""

    def stop_in_the_log() -> list[str]:
        """What a worker says that is stopped in the middle of its work, and of something else."""
        said = list[str]()

        class Said(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                said.append(record.getMessage())

        handler, worker = Said(), logging.getLogger("distributed.worker")
        worker.addHandler(handler)
        logging.getLogger("distributed.worker.state_machine").warning(
            "Async instruction for <Task> ended with CancelledError"
        )
        worker.error("Failed to communicate with scheduler during heartbeat.")
        worker.error("something else")
        worker.removeHandler(handler)
        return said

    with local_cluster(1, device="cpu") as cluster:
        found = cluster.client.run(stop_in_the_log)
    assert [*found.values()] == [["something else"]]


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Let SIGINT interrupt, as it does at a terminal: a shell's job starts with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_a_signal_before_dask_began_with_a_call(
    workers: Workers, caplog: pytest.LogCaptureFixture
) -> None:
    """dask's own clean-up raises a NameError in its event loop then, which is nobody's concern."""
    workers.add(1)
    with connect(workers.address) as cluster:
        busy = threading.Event()
        cluster.client.loop.add_callback(busy.wait)
        main = threading.main_thread().ident
        assert main is not None
        threading.Timer(0.1, signal.pthread_kill, (main, signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            cluster.addresses()
        busy.set()
        assert len(cluster.addresses()) == 1  # the loop is past it
    assert "NameError" not in caplog.text


def test_no_scheduler_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.cluster.CONNECT_SECONDS", 0.5)
    with pytest.raises(ConfigError) as caught, connect("tcp://127.0.0.1:1"):
        pass
    assert str(caught.value) == (
        "--scheduler tcp://127.0.0.1:1: no dask scheduler answers within 0.5 s; "
        "check the address, or start one with `dask scheduler`"
    )


def test_a_scheduler_without_workers(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    workers.add(0)
    monkeypatch.setattr("pipeline.cluster.WORKERS_SECONDS", 0.5)
    with pytest.raises(ConfigError, match=r"no worker within 0\.5 s"), connect(workers.address):
        pass


def test_what_is_no_scheduler(tmp_path: Path) -> None:
    (tmp_path / "no.json").write_text('{"address": 7}')  # without an address dask waits for one
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
    with writer_lock(store_lock(config.cache.root, owner)):
        pass  # nobody holds it any more


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
    monkeypatch.setattr("pipeline.cluster.WORKERS_SECONDS", 0.2)
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
