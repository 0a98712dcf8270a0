"""Stage one stops anywhere, by Ctrl-C (by kill -9: test_faults.py), and goes on: same bytes.

And what it is given: devices and checkpoints that cannot be used are refused in one line.
"""

from __future__ import annotations

import os
import shutil
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config
from PIL import Image
from teachers import FakeTeacher, Hungry, content, labelled_rows, run, stand_in, write_noise

from pipeline.config import Config
from pipeline.data.partition import load_partition
from pipeline.data.prepare import prepare
from pipeline.errors import ConfigError, LockedStoreError, NotFiniteError, SamfedError
from pipeline.labelling.backoff import MemoryAwareTeacher
from pipeline.labelling.maintenance import verify
from pipeline.labelling.precompute import precompute
from pipeline.runtime import resolve_device
from pipeline.sam.device import Finished, Pending
from pipeline.stores.label_store import LabelStore
from pipeline.stores.pseudo_labels import PseudoLabels

COUNT = 150


def settings(root: Path, cache: Path) -> Config:
    return tiny_config(
        root,
        cache,
        partition={"val_fraction": 0.02, "test_fraction": 0.02},
        precompute={"batch_size": 10},
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """150 images of one site, three shards of labels, done without a stop."""
    folder = tmp_path_factory.mktemp("stage_one")
    write_noise(folder / "data", count=COUNT, size=48)
    config = settings(folder / "data", folder / "cache")
    prepare(config)
    result = run(config, FakeTeacher())
    assert (result.already_labelled, result.failed, result.notices) == (0, [], [])
    assert LabelStore(folder / "cache" / "sam" / "site.zarr").chunks == 3
    return config


@pytest.fixture
def config(prepared: Config, tmp_path: Path) -> Config:
    """The same images and partition, nothing labelled."""
    (tmp_path / "cache").mkdir()
    shutil.copy(prepared.cache.root / "partition.json", tmp_path / "cache")
    return settings(prepared.data.root, tmp_path / "cache")


@pytest.fixture(scope="module")
def whole(prepared: Config) -> dict[str, bytes]:
    """The stores of a run that nothing stopped."""
    return content(prepared.cache.root / "sam")


# --------------------------------------------------------------------------- stops


@pytest.mark.parametrize("stop", [0, 1, 6, 7, 8, 13, 14, 15])
def test_ctrl_c_and_again(config: Config, whole: dict[str, bytes], stop: int) -> None:
    """Batch 0 is the server's, 1..7, 8..14 and 15 are the client's three chunks."""

    def interrupt(batch: int) -> None:
        if batch == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, FakeTeacher(interrupt))
    finished = labelled_rows(config)
    partition = load_partition(config.cache.root / "partition.json")
    server = len(partition.server.calibration)
    assert finished == (server + sum(64 * (stop > last) for last in (7, 14)) if stop else 0)
    teacher = FakeTeacher()
    result = run(config, teacher)
    assert content(config.cache.root / "sam") == whole
    total = labelled_rows(config)
    assert (result.already_labelled, result.labelled, result.failed) == (
        finished,
        total - finished,
        [],
    )
    assert teacher.images == total - finished
    again = FakeTeacher()
    assert run(config, again).already_labelled == total
    assert again.batches == 0


def test_batches_hold_images_of_one_shape(tmp_path: Path) -> None:
    """And are the same ones where a run is stopped and begun again."""
    write_noise(tmp_path / "data", count=90, size=48)
    for file in sorted((tmp_path / "data").rglob("*.png")):
        if int(file.stem) % 3 == 0:  # a third is 4:3
            Image.fromarray(np.asarray(Image.open(file))[:36]).save(file)
    config, shapes = settings(tmp_path / "data", tmp_path / "cache"), list[list[tuple[int, ...]]]()
    prepare(config)

    class Shaped(FakeTeacher):
        def label(self, images: Any, size: int) -> PseudoLabels:
            shapes.append([image.shape for image in images])
            return super().label(images, size)

    def teacher(stop: int | None = None) -> Shaped:
        def interrupt(batch: int) -> None:
            if batch == stop:
                raise KeyboardInterrupt

        made = Shaped(interrupt)
        made.card = made.card.model_copy(update={"frame": "content"})
        return made

    run(config, teacher())
    whole, batches = content(config.cache.root / "sam"), shapes.copy()
    assert {len({*batch}) for batch in batches} == {1}
    assert len({shape for batch in batches for shape in batch}) == 2
    # no chunk has more than one batch of each shape that is not full
    assert sum(len(batch) < 10 for batch in batches) <= 2 * 3
    shapes.clear()
    shutil.rmtree(config.cache.root / "sam")
    with pytest.raises(KeyboardInterrupt):
        run(config, teacher(stop=9))
    run(config, teacher())
    assert content(config.cache.root / "sam") == whole
    assert all(batch in batches for batch in shapes)


def test_an_unreadable_image(config: Config, whole: dict[str, bytes], tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(config.data.root, root)
    config = settings(root, config.cache.root)
    partition = load_partition(config.cache.root / "partition.json")
    path = root / partition.images[partition.clients["site"].train[70]].image
    good = path.read_bytes()
    path.write_bytes(good[:100])
    teacher = FakeTeacher()
    result = run(config, teacher)
    assert result.failed == [f"{path}: changed since `samfed prepare`; run `samfed prepare` again"]
    store = LabelStore(config.cache.root / "sam" / "site.zarr")
    assert np.flatnonzero(~store.done()).tolist() == [70]
    assert result.labelled == labelled_rows(config)
    assert teacher.images == result.labelled
    assert list(result.statistics) == ["server"]
    path.write_bytes(good)
    later = FakeTeacher()
    result = run(config, later)
    assert (result.failed, result.labelled, later.images) == ([], 1, 1)
    assert content(config.cache.root / "sam") == whole


class Overflowing(FakeTeacher):
    """Says NaN of an image of its last batches, as where numbers exceed float16."""

    def label(self, images: Any, size: int) -> PseudoLabels:
        labels = super().label(images, size)
        if self.batches > 5:
            labels.predicted_iou[0] = np.nan
        return labels


def test_labels_that_are_not_finite_are_not_stored(config: Config, whole: dict[str, bytes]) -> None:
    with pytest.raises(NotFiniteError, match="labels are not finite in None; use "):
        run(config, Overflowing())
    assert verify(config).faults == []
    before = labelled_rows(config)
    result = run(config, FakeTeacher())
    assert (result.already_labelled, result.failed) == (before, [])
    assert content(config.cache.root / "sam") == whole


def test_a_chunk_that_two_teachers_finish(config: Config, tmp_path: Path) -> None:
    """One identity, but another backend, where an image could not be read at first."""
    root = tmp_path / "data"
    shutil.copytree(config.data.root, root)
    config = settings(root, config.cache.root)
    partition = load_partition(config.cache.root / "partition.json")
    path = root / partition.images[partition.clients["site"].train[70]].image
    good = path.read_bytes()
    path.unlink()
    run(config, FakeTeacher())
    path.write_bytes(good)
    assert run(config, FakeTeacher(backend="other")).labelled == 1
    store = LabelStore(config.cache.root / "sam" / "site.zarr")
    first = {"backend": "fake"}
    assert store.provenance() == [[first], [first, {"backend": "other"}], [first]]


def test_a_second_writer_is_refused(config: Config, whole: dict[str, bytes]) -> None:
    refused: list[str] = []

    def second(batch: int) -> None:
        if batch in (0, 15):  # by the last chunk the server's store is finished, and free
            assert not batch or not (locks / "sam-server.lock").read_text()
            with pytest.raises(LockedStoreError) as caught:
                precompute(config, clients=["site"] if batch else ())
            refused.append(str(caught.value))

    locks = config.cache.root / "locks"
    run(config, FakeTeacher(second))  # the refused runs come to no batch of their own
    ends = "holds this lock; wait for it or stop it"
    assert refused == [
        f"{locks}/sam-{owner}.lock: process {os.getpid()} {ends}" for owner in ("server", "site")
    ]
    assert content(config.cache.root / "sam") == whole


def test_nothing_is_written_any_more_once_a_run_has_failed(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The threads of stage one are gone before its locks are free."""

    def full(*args: object, **named: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(LabelStore, "mark_done", full)
    with pytest.raises(OSError, match="disk full") as caught:
        run(config, FakeTeacher())
    pools = [t.name for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor")]
    assert (pools, caught.traceback[-1].name) == ([], "full")


# --------------------------------------------------------------------------- memory


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    RuntimeError("Failed to allocate memory for requested buffer of size 9"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_batches_shrink_when_memory_runs_out(
    config: Config, prepared: Config, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    result = run(config, Hungry(3, error))
    assert [record.getMessage() for record in caplog.records] == [
        f"out of memory; going on with batches of {size} (precompute.batch_size: 10)"
        for size in (5, 3)
    ]
    assert result.failed == []
    stores = [LabelStore(c.cache.root / "sam" / "site.zarr") for c in (config, prepared)]
    ours, whole = (store.read() for store in stores)
    assert np.array_equal(ours.masks, whole.masks)
    assert np.array_equal(ours.confidences, whole.confidences)
    fake = {"backend": "fake"}
    assert [store.provenance()[0] for store in stores] == [[fake | {"batch_size": "3"}], [fake]]


def test_a_chunk_records_its_own_batches(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of one dask worker share its teacher: one backs off while another is at its end."""
    teacher = Hungry(10, MemoryError())
    shared = MemoryAwareTeacher(teacher, 10)
    monkeypatch.setattr("pipeline.labelling.worker.load_backend", lambda job: shared)
    server = len(load_partition(config.cache.root / "partition.json").server.calibration)

    def other(what: str, done: int, total: int) -> None:
        if done == server + 74:  # one batch of the second shard
            teacher.capacity = 2
        if done == server + 64:  # the first shard is labelled, not written yet
            teacher.capacity = 3
            images = [np.zeros((32, 32, 3), np.uint8)] * 10
            task = threading.Thread(target=shared.label, args=(images, 32))
            task.start()
            task.join()

    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch, teacher)
        precompute(config, progress=other)
    store = LabelStore(config.cache.root / "sam" / "site.zarr")
    fake = {"backend": "fake"}
    three, two = fake | {"batch_size": "3"}, fake | {"batch_size": "2"}
    assert store.provenance() == [[fake], [three, two], [two]]


def test_memory_for_no_image_at_all(config: Config) -> None:
    with pytest.raises(SamfedError, match="memory does not suffice for one image"):
        run(config, Hungry(0, MemoryError()))
    assert labelled_rows(config) == 0


@pytest.mark.parametrize(
    "words", ["shapes cannot be multiplied", "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"]
)
def test_another_error_is_no_lack_of_memory(config: Config, words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        run(config, Hungry(3, RuntimeError(words)))


def test_what_a_failed_batch_holds_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes with the error's traceback, and torch can give back only what nobody holds."""
    held: list[weakref.ref[Activations]] = []
    freed: list[bool] = []

    class Activations:
        """What the batch needs memory for."""

    class Large(FakeTeacher):
        def label(self, images: Any, size: int) -> PseudoLabels:
            activations = Activations()
            held.append(weakref.ref(activations))
            if len(images) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().label(images, size)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(held[-1]() is None))
    images = [np.zeros((64, 64, 3), np.uint8)] * 2
    assert len(MemoryAwareTeacher(Large(), 2).label(images, 32).masks) == 2
    assert freed == [True]


# --------------------------------------------------------------------------- a device that lags


class Lagging(FakeTeacher):
    """Has labels only when somebody waits for them, as a GPU; notes when that is."""

    def __init__(self, on_batch: Callable[[int], None] = lambda batch: None) -> None:
        super().__init__(on_batch)
        self.steps: list[str] = []

    def begin(self, images: Any, size: int) -> Pending:
        number, labels = self.batches, self.label(images, size)
        self.steps.append(f"begin {number}")

        class OnItsWay(Finished):
            def done(self) -> bool:
                return False

            def result(wait) -> PseudoLabels:  # noqa: N805
                self.steps.append(f"fetch {number}")
                return labels

        return OnItsWay(labels)


def test_labels_are_fetched_one_batch_late(config: Config, whole: dict[str, bytes]) -> None:
    teacher = Lagging()
    run(config, teacher)
    assert content(config.cache.root / "sam") == whole
    expected = ["begin 0"]
    for number in range(1, teacher.batches):
        expected += [f"begin {number}", f"fetch {number - 1}"]
    assert teacher.steps == [*expected, f"fetch {teacher.batches - 1}"]


@pytest.mark.parametrize("stop", [8, 9])
def test_ctrl_c_while_labels_are_on_their_way(
    config: Config, whole: dict[str, bytes], stop: int
) -> None:
    """Batch 7 ends the client's first chunk: what was begun before is kept."""

    def interrupt(batch: int) -> None:
        if batch == stop:
            raise KeyboardInterrupt

    teacher = Lagging(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(config, teacher)
    assert teacher.steps[-1] == f"fetch {stop - 1}"
    partition = load_partition(config.cache.root / "partition.json")
    assert labelled_rows(config) == len(partition.server.calibration) + 64
    run(config, Lagging())
    assert content(config.cache.root / "sam") == whole


# --------------------------------------------------------------------------- devices, checkpoints


def test_a_cuda_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    assert resolve_device("cuda") == torch.device("cuda")
    for name in ("cuda:2", "cuda:9"):
        with pytest.raises(ConfigError) as caught:
            resolve_device(name)
        assert str(caught.value) == (
            f"device: '{name}' asked for, but torch finds 2 CUDA device(s), numbered from 0; "
            "use auto"
        )
