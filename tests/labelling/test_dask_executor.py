"""Stage one on dask workers that are threads of this process: they come and go in no time."""

from __future__ import annotations

import logging
import shutil
import socket
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import distributed
import pytest
from conftest import tiny_config
from dask_processes import thread_workers
from teachers import FakeTeacher, content, on_workers, run, stand_in, write_noise

from pipeline import __version__
from pipeline.cluster import Cluster
from pipeline.config import Config
from pipeline.data.partition import load_partition
from pipeline.data.prepare import prepare
from pipeline.disk import writer_lock
from pipeline.errors import SamfedError, StoreError
from pipeline.labelling.cluster import Order, run_task
from pipeline.labelling.cluster import on_workers as share_out
from pipeline.labelling.job import Meter, load_job, store_lock
from pipeline.labelling.precompute import precompute
from pipeline.labelling.repair import repair
from pipeline.labelling.worker import ChunkTask
from pipeline.stores.label_store import LABEL_VERSION, LabelStore


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """One client with three chunks of images, labelled in this process."""
    folder = tmp_path_factory.mktemp("dask")
    write_noise(folder / "data", count=150, size=32)
    config = tiny_config(
        folder / "data",
        folder / "cache",
        partition={"val_fraction": 0.02, "test_fraction": 0.02},
        precompute={"batch_size": 16},
    )
    prepare(config)
    run(config, FakeTeacher(), mirrors=True)
    return config


@pytest.fixture
def config(whole: Config, tmp_path: Path) -> Config:
    """The same partition, nothing labelled."""
    (tmp_path / "cache").mkdir()
    shutil.copy(whole.cache.root / "partition.json", tmp_path / "cache")
    cache = whole.cache.model_copy(update={"root": tmp_path / "cache"})
    return whole.model_copy(update={"cache": cache})


@pytest.fixture
def teacher(monkeypatch: pytest.MonkeyPatch) -> FakeTeacher:
    """The teacher that the workers, too, find."""
    teacher = FakeTeacher()
    stand_in(monkeypatch, teacher, mirrors=True)
    return teacher


class Threads:
    """A scheduler and its workers."""

    def __init__(self, client: distributed.Client) -> None:
        self.client = client
        self.workplace = on_workers(client)
        self.where = f"the dask scheduler at {client.scheduler_info()['address']}"
        self.lost = (
            f"{self.where} lost its last worker and found no other within 0.2 s; what is finished "
            "is kept: see why workers stop, and run the same command again"
        )

    def lose(self) -> None:
        """Let all workers go, and what they hold with them."""
        for name, worker in list(self.client.cluster.workers.items()):
            self.client.sync(worker.close, executor_wait=False)
            del self.client.cluster.workers[name]
        self._await(0)

    def add(self) -> None:
        self.client.cluster.scale(1)
        self._await(1)

    def finish(self) -> None:
        """Wait until the workers have done all that they were given."""
        while any(state.status == "pending" for state in self.client.futures.values()):
            time.sleep(0.01)

    def _await(self, count: int) -> None:
        while len(self.client.nthreads()) != count:
            time.sleep(0.01)


@pytest.fixture(scope="module")
def scheduler() -> Iterator[Threads]:
    with thread_workers() as client:
        yield Threads(client)


@pytest.fixture
def threads(scheduler: Threads, monkeypatch: pytest.MonkeyPatch) -> Threads:
    """One worker, as often as tests lose it; the executor soon misses one."""
    monkeypatch.setattr("pipeline.cluster.LOOK_SECONDS", 0.1)
    monkeypatch.setattr("pipeline.cluster.WORKERS_SECONDS", 0.2)
    scheduler.add()
    return scheduler


@contextmanager
def gpu_workers(**gpus: int) -> Iterator[distributed.Client]:
    """Start workers of these names in threads, which announce so many GPUs."""
    here = {"protocol": "inproc", "dashboard": False}
    workers = {
        name: {
            "cls": distributed.Worker,
            "options": {"nthreads": 2, "resources": {"GPU": count} if count else {}, **here},
        }
        for name, count in gpus.items()
    }
    scheduler = {"cls": distributed.Scheduler, "options": {**here, "dashboard_address": ":0"}}
    with (
        distributed.SpecCluster(workers=workers, scheduler=scheduler) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        client.wait_for_workers(len(gpus), timeout=10)
        yield client


def once(act: Callable[[], None], *, after: int = 1) -> Callable[[str, int, int], None]:
    """Return a display of progress that acts once, when so many images are labelled."""
    acted: list[int] = []

    def progress(what: str, done: int, total: int) -> None:
        if done >= after and not acted:
            acted.append(done)
            act()

    return progress


def test_the_same_bytes(
    config: Config, whole: Config, threads: Threads, teacher: FakeTeacher
) -> None:
    seen: list[int] = []
    result = precompute(
        config, cluster=threads.workplace, progress=lambda what, done, total: seen.append(done)
    )
    assert content(config.cache.root / "sam") == content(whole.cache.root / "sam")
    assert (result.already_labelled, result.failed) == (0, [])
    assert sorted(result.statistics) == ["server", "site"]
    assert (seen, seen[-1]) == (sorted(seen), result.labelled)


def test_the_last_worker_goes_for_good(
    config: Config, whole: Config, threads: Threads, teacher: FakeTeacher
) -> None:
    """And takes finished results with it: they stay with a worker until they are asked for."""

    def lose() -> None:
        threads.finish()
        threads.lose()

    with pytest.raises(SamfedError) as caught:
        precompute(config, cluster=threads.workplace, progress=once(lose))
    assert str(caught.value) == threads.lost
    threads.add()
    again = precompute(config, cluster=threads.workplace)
    assert again.already_labelled > 0
    assert content(config.cache.root / "sam") == content(whole.cache.root / "sam")


def test_a_worker_comes_back_in_time(
    config: Config,
    whole: Config,
    threads: Threads,
    teacher: FakeTeacher,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = logging.getLogger("samfed.cluster")

    def say_and_add(message: str, *args: object) -> None:
        log.log(logging.WARNING, message, *args)
        if "waiting" in message:
            threads.add()

    monkeypatch.setattr(log, "warning", say_and_add)
    result = precompute(config, cluster=threads.workplace, progress=once(threads.lose, after=0))
    assert (result.already_labelled, result.failed) == (0, [])
    assert content(config.cache.root / "sam") == content(whole.cache.root / "sam")
    assert [r.getMessage() for r in caplog.records if r.name == "samfed.cluster"] == [
        f"{threads.where} has no worker left; waiting up to 0.2 s",
        f"{threads.where} has a worker again",
    ]


def test_an_image_that_cannot_be_read(
    config: Config, threads: Threads, teacher: FakeTeacher
) -> None:
    """It is named as in process."""
    path = config.cache.root / "partition.json"
    partition = load_partition(path)
    image = partition.clients["site"].train[0]
    entry = partition.images[image].model_copy(update={"image": "images/none.png"})
    images = {**partition.images, image: entry}
    path.write_text(partition.model_copy(update={"images": images}).model_dump_json())
    result = precompute(config, cluster=threads.workplace)
    assert len(result.failed) == 1
    assert result.failed[0].startswith(f"{config.data.root / 'images/none.png'}: ")
    assert list(result.statistics) == ["server"]


def test_other_images_with_the_same_settings(
    config: Config, whole: Config, threads: Threads, teacher: FakeTeacher
) -> None:
    """Workers outlive runs: they read the partition that a run has, not an earlier one's."""
    path = config.cache.root / "partition.json"
    before, partition = path.read_bytes(), load_partition(path)
    client = partition.clients["site"]
    fewer = client.model_copy(update={"train": client.train[:20]})
    gone = set(client.train[20:])
    images = {name: entry for name, entry in partition.images.items() if name not in gone}
    changed = partition.model_copy(update={"clients": {"site": fewer}, "images": images})
    path.write_text(changed.model_dump_json())
    precompute(config, cluster=threads.workplace)
    path.write_bytes(before)
    result = precompute(config, cluster=threads.workplace)
    assert (result.failed, result.warnings) == ([], [])
    assert LabelStore(config.cache.root / "sam" / "site.zarr").done().all()


def test_a_tasks_own_timeout_is_not_the_clusters(
    config: Config, threads: Threads, teacher: FakeTeacher
) -> None:
    def slow(batch: int) -> None:
        raise TimeoutError("the file system is away")

    teacher.on_batch = slow
    with pytest.raises(TimeoutError, match="the file system is away"):
        precompute(config, cluster=threads.workplace)
    for owner in ("server", "site"):
        with writer_lock(store_lock(config.cache.root, owner)):
            pass  # nobody holds it any more


def test_a_worker_of_another_samfed_or_without_the_files(
    config: Config, teacher: FakeTeacher
) -> None:
    identity, task = load_job(config).identity, ChunkTask("site", 0, (0,), (("a", "b"),))
    ours = rf"{__version__} with labels of version {LABEL_VERSION}"
    with pytest.raises(SamfedError, match=rf"samfed {ours}, expected 0\.0\.0; install it"):
        run_task(Order(config.model_dump_json(), identity, "", version="0.0.0"), task)
    with pytest.raises(SamfedError) as caught:
        run_task(Order(config.model_dump_json(), identity, ""), task)
    assert f"{config.cache.root / 'sam' / 'site.zarr'} is not there" in str(caught.value)


def test_a_worker_of_another_samfed_is_named(
    config: Config, threads: Threads, teacher: FakeTeacher
) -> None:
    identity, task = load_job(config).identity, ChunkTask("site", 0, (0,), (("a", "b"),))
    order = Order(config.model_dump_json(), identity, "", version="0.0.0")
    (name,) = threads.client.cluster.workers
    with pytest.raises(SamfedError) as caught:
        list(Cluster(threads.client).results(partial(run_task, order), [("a chunk", task)]))
    assert str(caught.value).startswith(f"worker {name} on {socket.gethostname()}: ")


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda path: path.unlink(), "no such file"),
        (lambda path: path.write_bytes(path.read_bytes() + b" "), "other bytes"),
    ],
    ids=["missing", "another"],
)
def test_a_chunk_that_the_coordinator_does_not_see(
    config: Config,
    teacher: FakeTeacher,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Path], None],
    found: str,
) -> None:
    """As where each host has a disk of its own under the same path: no row is marked as done."""
    mark = LabelStore.mark_done
    file = config.cache.root / "sam" / "server.zarr" / "masks" / "c.0.0.0"

    def elsewhere(store: LabelStore, *args: Any, **options: Any) -> None:
        spoil(file)
        mark(store, *args, **options)

    monkeypatch.setattr(LabelStore, "mark_done", elsewhere)
    with pytest.raises(StoreError) as caught:
        precompute(config)
    assert str(caught.value) == (
        f"{file}: found {found}, expected what a worker wrote; put cache.root on a file system "
        "that every worker sees under the same path"
    )
    assert not LabelStore(file.parents[1]).done().any()


def test_only_workers_with_a_gpu() -> None:
    """Where some announce one, as with ``--resources GPU=1``, and a GPU is asked for."""

    def named(number: int) -> str:
        time.sleep(0.01)
        return str(distributed.get_worker().name)

    items = [(str(number), number) for number in range(12)]
    with gpu_workers(plain=0, gpu=1) as client:
        on_gpus = set(Cluster(client).results(named, items, on_gpus=True))
        anywhere = set(Cluster(client).results(named, items))
    assert (on_gpus, anywhere) == ({"gpu"}, {"plain", "gpu"})
    with gpu_workers(plain=0, other=0) as client:
        assert set(Cluster(client).results(named, items, on_gpus=True)) == {"plain", "other"}


def test_the_last_worker_with_a_gpu_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are no help: another device would make other labels."""
    monkeypatch.setattr("pipeline.cluster.LOOK_SECONDS", 0.1)
    monkeypatch.setattr("pipeline.cluster.WORKERS_SECONDS", 0.2)
    with gpu_workers(plain=0, gpu=1) as client:
        results = Cluster(client).results(str, [(str(n), n) for n in range(100)], on_gpus=True)
        next(results)
        client.sync(client.cluster.workers.pop("gpu").close, executor_wait=False)
        with pytest.raises(SamfedError, match="lost its last worker with a GPU and found no other"):
            list(results)


def test_what_a_task_is_told(config: Config, teacher: FakeTeacher) -> None:
    """A worker's share of the cores decodes; GPUs are asked for unless the device is the CPU."""
    told: list[tuple[int | None, int | None, bool]] = []

    class Asked(Cluster):
        def results(self, work: Any, items: Any, *, on_gpus: bool = False) -> Iterator[Any]:
            asked = Config.model_validate_json(work.args[0].settings).precompute
            told.append((asked.threads, asked.readers, on_gpus))
            return iter(())

    for device in ("auto", "cpu"):
        run_on = config.precompute.model_copy(update={"device": device, "threads": None})
        here = config.model_copy(update={"precompute": run_on})
        client: Any = None
        label = share_out(load_job(here), Asked(client, threads=3))
        assert list(label([], meter=Meter("", 0))) == []
    assert told == [(3, 3, True), (3, 3, False)]


def test_an_idle_worker_gives_the_teacher_back(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a while, and not while a task needs it; the next task loads it again."""
    loaded: list[weakref.ref[FakeTeacher]] = []

    def load(job: object) -> FakeTeacher:
        teacher = FakeTeacher()
        loaded.append(weakref.ref(teacher))
        return teacher

    stand_in(monkeypatch, FakeTeacher())
    monkeypatch.setattr("pipeline.labelling.cluster.load_backend", load)
    monkeypatch.setattr("pipeline.labelling.cluster.IDLE_SECONDS", 0.1)
    order = Order(config.model_dump_json(), load_job(config).identity, "")
    task = ChunkTask("site", 0, (0,), (("none.png", "0" * 64),))
    (config.cache.root / "sam" / "site.zarr").mkdir(parents=True)
    for _ in range(2):  # in one tenth of a second
        assert len(run_task(order, task).failed) == 1
    assert len(loaded) == 1
    until = time.monotonic() + 10
    while loaded[0]() is not None:
        assert time.monotonic() < until
        time.sleep(0.01)
    run_task(order, task)
    assert len(loaded) == 2


def test_repair_on_workers(
    config: Config, whole: Config, threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = FakeTeacher()
    shutil.copytree(whole.cache.root / "sam", config.cache.root / "sam")
    chunk = config.cache.root / "sam" / "site.zarr" / "masks" / "c.1.0.0"
    chunk.write_bytes(chunk.read_bytes()[:-1])

    def refuse(*args: object) -> None:
        raise SamfedError("a worker's finding")

    with monkeypatch.context() as patch:
        stand_in(patch, teacher)
        patch.setattr("pipeline.labelling.worker.load_teacher", refuse)
        with pytest.raises(SamfedError, match="a worker's finding"):
            repair(config, cluster=threads.workplace)
    assert LabelStore(chunk.parents[1]).pending() == [1]  # nothing damaged, only undone
    chunk.parents[1].joinpath("masks", "c.0.0.0").unlink()
    stand_in(monkeypatch, teacher, mirrors=True)
    result = repair(config, cluster=threads.workplace)
    assert result.labelled == 2 * 64
    assert content(config.cache.root / "sam") == content(whole.cache.root / "sam")
