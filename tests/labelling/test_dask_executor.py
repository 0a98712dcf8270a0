"""Stage one on dask workers that are threads of this process: they come and go in no time."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import distributed
import pytest
from conftest import tiny_config
from dask_processes import thread_workers
from teachers import FakeTeacher, content, on_workers, run, stand_in, write_noise

from pipeline.config import Config
from pipeline.data.partition import load_partition
from pipeline.data.prepare import prepare
from pipeline.disk import writer_lock
from pipeline.errors import SamfedError
from pipeline.labelling.cluster import Order, run_task
from pipeline.labelling.job import load_job, store_lock
from pipeline.labelling.precompute import precompute
from pipeline.labelling.repair import repair
from pipeline.labelling.worker import ChunkTask
from pipeline.stores.label_store import LabelStore


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
    wait = threads.client.wait_for_workers

    def add_and_wait(count: int, timeout: float) -> None:
        threads.add()
        wait(count, timeout)

    monkeypatch.setattr(threads.client, "wait_for_workers", add_and_wait)
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
    with pytest.raises(SamfedError, match=r"expected 0\.0\.0; install it"):
        run_task(Order(config.model_dump_json(), identity, "", version="0.0.0"), task)
    with pytest.raises(SamfedError) as caught:
        run_task(Order(config.model_dump_json(), identity, ""), task)
    assert f"{config.cache.root / 'sam' / 'site.zarr'} is not there" in str(caught.value)


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
