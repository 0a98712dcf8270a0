"""``samfed cache``: every damage is found and named, mended to the same bytes, and space freed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from noise_cache import config, finished, settings, whole
from teachers import FakeTeacher, content, stand_in, teacher_of

from pipeline.cluster import Cluster
from pipeline.config import Config
from pipeline.disk import writer_lock
from pipeline.errors import ConfigError, IdentityError, LockedStoreError, StageError
from pipeline.labelling.maintenance import (
    CacheInfo,
    Pruning,
    StoreInfo,
    info,
    prune,
    removable,
    verify,
)
from pipeline.labelling.precompute import precompute
from pipeline.labelling.repair import Repair, repair
from pipeline.stores.arrays import read_sealed, write_sealed
from pipeline.stores.integrity import Fault, check_store
from pipeline.stores.label_store import LabelStore

__all__ = ["config", "finished", "whole"]  # fixtures

ROOT = Path(__file__).parents[2]


@pytest.fixture
def teacher(config: Config, monkeypatch: pytest.MonkeyPatch) -> FakeTeacher:
    """Stands in for the teacher of ``config`` wherever stage one loads one."""
    teacher = teacher_of(config)
    stand_in(monkeypatch, teacher)
    return teacher


def store_of(config: Config) -> Path:
    return config.cache.root / "sam" / "site.zarr"


def lock_of(config: Config) -> Path:
    return config.cache.root / "locks" / "sam-site.lock"


def flip(file: Path, place: int, bit: int = 3) -> None:
    damaged = bytearray(file.read_bytes())
    damaged[place] ^= 1 << bit
    file.write_bytes(bytes(damaged))


# --------------------------------------------------------------------------- verify


def test_a_whole_cache_has_no_fault(config: Config) -> None:
    before = content(config.cache.root)
    seen: list[tuple[str, int, int]] = []
    found = verify(config, progress=lambda *step: seen.append(step))
    assert (found.stores, found.faults) == (8, [])
    assert found.bytes == sum(
        len(value)
        for name, value in before.items()
        if name.startswith(("images/", "oracle/", "sam/"))
    )
    assert seen == sorted(seen)
    assert 0 < seen[0][1] < seen[-1][1] == seen[-1][2]
    assert content(config.cache.root) == before | {"locks/prepare.lock": b""}


def test_all_that_is_wrong_is_listed(config: Config) -> None:
    """Verification goes on after the first fault, and names the rows of the chunks that fail."""
    store, cache = store_of(config), config.cache.root
    flip(store / "masks" / "c.0.0.0", 5)
    (store / "confidences" / "c.0.0.0").unlink()
    predicted_iou = store / "predicted_iou" / "c.1"
    predicted_iou.write_bytes(predicted_iou.read_bytes()[:-3])
    (cache / "sam" / "server.zarr" / "masks" / "c.0.0.0").write_bytes(b"")
    (cache / "oracle" / "site.zarr" / "zarr.json").unlink()
    found = [str(fault) for fault in verify(config).faults]
    rows = len(LabelStore(store)) - 1
    assert found == [
        f"{cache}/oracle/site.zarr: zarr.json: missing",
        f"{cache}/sam/server.zarr: masks rows 0..1: damaged",
        f"{store}: masks rows 0..63: damaged",
        f"{store}: confidences rows 0..63: missing",
        f"{store}: predicted_iou rows 64..{rows}: damaged",
    ]


def test_an_unfinished_store_is_whole(config: Config) -> None:
    store = LabelStore(store_of(config))
    rows = store.rows
    shutil.rmtree(store.path)
    LabelStore.create(store.path, store.identity, rows)
    assert verify(config).faults == []


def test_a_store_that_is_being_written_is_skipped(config: Config) -> None:
    """What is missing there may only not be there yet; who writes is said."""
    (store_of(config) / "masks" / "c.0.0.0").unlink()
    with writer_lock(lock_of(config)):
        found = verify(config)
    assert (found.stores, found.faults) == (7, [])
    assert found.skipped == [
        f"{store_of(config)}: not read; {lock_of(config)}: process {os.getpid()} holds this lock; "
        "wait for it or stop it"
    ]
    assert found.text().splitlines()[-1] == "7 stores read, 1 skipped, 0 faults"
    found = verify(config)
    assert (len(found.faults), found.skipped) == (1, [])
    assert found.text() == "8 stores read, 1 fault"


def test_nobody_writes_to_a_store_while_it_is_read(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(path: Path, advance: Callable[[int], None]) -> list[Fault]:
        with pytest.raises(LockedStoreError), writer_lock(lock_of(config)):
            pass
        return check_store(path, advance)

    monkeypatch.setattr("pipeline.labelling.maintenance.check_store", check)
    monkeypatch.setattr("pipeline.labelling.maintenance.image_stores", lambda cache: [])
    monkeypatch.setattr(
        "pipeline.labelling.maintenance.label_stores", lambda cache: [store_of(config)]
    )
    assert verify(config).faults == []


def test_a_cache_on_a_read_only_disk(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody here can write to it, so that nobody need be kept away."""
    shutil.rmtree(config.cache.root / "locks")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert (verify(config).stores, verify(config).faults) == (8, [])
    assert not (config.cache.root / "locks").exists()


def test_image_stores_that_are_being_written(config: Config) -> None:
    with writer_lock(config.cache.root / "locks" / "prepare.lock"):
        assert len(verify(config).skipped) == 6


def test_no_store_at_all(tmp_path: Path) -> None:
    config = settings(tmp_path, tmp_path / "cache")
    with pytest.raises(StageError) as caught:
        verify(config)
    assert str(caught.value) == f"{tmp_path}/cache: found no store; run `samfed prepare` first"
    assert info(config) == CacheInfo()
    assert info(config).text() == "no label store"


# --------------------------------------------------------------------------- repair


def unlink(file: Path) -> None:
    file.unlink()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("damage", [lambda file: flip(file, 9), unlink, cut])
@pytest.mark.parametrize(
    ("name", "chunks"),
    [
        ("masks/c.0.0.0", [0]),
        ("confidences/c.1.0.0", [1]),
        ("predicted_iou/c.1", [1]),
        ("masks/zarr.json", []),
    ],
)
def test_repair_computes_what_failed_and_nothing_else(
    config: Config,
    teacher: FakeTeacher,
    whole: dict[str, bytes],
    name: str,
    chunks: list[int],
    damage: Callable[[Path], None],
) -> None:
    store = LabelStore(store_of(config))
    damage(store.path / name)
    result = repair(config)
    expected = sum(len(store.chunk_rows(chunk)) for chunk in chunks)
    assert (result.labelled, teacher.images) == (expected, expected)
    assert (result.remaining, result.failed) == ([], [])
    assert result.faults
    assert content(config.cache.root / "sam") == whole
    assert verify(config).faults == []
    assert not (config.cache.root / "archive").exists()
    assert repair(config) == Repair()


def test_repair_of_what_lies_beside_a_chunk(
    config: Config, teacher: FakeTeacher, whole: dict[str, bytes]
) -> None:
    """A flipped bit costs nothing, as all is said twice; a lost file costs its chunk."""
    file = store_of(config) / "chunks" / "0.jsonl"
    flip(file, 9)
    assert [fault.what for fault in repair(config).faults] == ["chunks/0.jsonl"]
    assert teacher.images == 0
    file.unlink()
    assert repair(config).labelled == 64
    assert content(config.cache.root / "sam") == whole


def test_a_killed_repair_leaves_an_unfinished_store(
    config: Config, teacher: FakeTeacher, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No mark promises what is about to be removed."""
    flip(store_of(config) / "masks" / "c.0.0.0", 9)

    unlink = Path.unlink

    def stop(path: Path, missing_ok: bool = False) -> None:
        if "masks" in path.parts:
            raise KeyboardInterrupt
        unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", stop)
        with pytest.raises(KeyboardInterrupt):
            repair(config)
    store = LabelStore(store_of(config))
    assert store.pending() == [0]
    assert store.provenance() == [[], [{"backend": "fake"}]]
    precompute(config)
    assert teacher.images == 64
    assert content(config.cache.root / "sam") == whole


def test_a_repair_that_stops_while_it_labels(
    config: Config, teacher: FakeTeacher, whole: dict[str, bytes]
) -> None:
    """Nothing is damaged any more; that something is missing is said."""
    flip(store_of(config) / "masks" / "c.0.0.0", 9)

    def stop(batch: int) -> None:
        raise KeyboardInterrupt

    teacher.on_batch = stop
    with pytest.raises(KeyboardInterrupt):
        repair(config)
    advice = f"{store_of(config)}: some rows are not labelled yet; run `samfed precompute-sam`"
    assert repair(config) == Repair(notices=[advice])
    teacher.on_batch = lambda batch: None
    precompute(config)
    assert content(config.cache.root / "sam") == whole


def test_damage_of_metadata_hides_no_other(
    config: Config, teacher: FakeTeacher, whole: dict[str, bytes]
) -> None:
    (store_of(config) / "masks" / "zarr.json").unlink()
    flip(store_of(config) / "masks" / "c.1.0.0", 9)
    result = repair(config)
    assert [fault.what for fault in result.faults] == ["masks/zarr.json", "masks"]
    assert teacher.images == len(LabelStore(store_of(config))) - 64
    assert content(config.cache.root / "sam") == whole


def test_a_store_that_nothing_vouches_for_is_moved_aside(
    config: Config, teacher: FakeTeacher, whole: dict[str, bytes]
) -> None:
    for number in (1, 2):
        (store_of(config) / "store.jsonl").unlink()
        damaged = content(store_of(config))
        result = repair(config)
        aside = config.cache.root / "archive" / "site" / f"damaged-{number}.zarr"
        assert (result.faults, result.notices) == ([], [])  # nothing was mended
        assert result.text().splitlines() == [
            f"{store_of(config)}: cannot tell whose labels these are; moved them to {aside}, to "
            "label every image anew",
            f"0 faults mended, 1 store moved aside, {result.labelled} images labelled",
        ]
        assert content(aside) == damaged
        assert teacher.images == number * len(LabelStore(store_of(config)))
        assert content(config.cache.root / "sam") == whole


def test_metadata_of_another_teacher_stays_its_own(
    config: Config, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No teacher is needed to mend it, and no label becomes the present teacher's."""
    stand_in(monkeypatch, teacher_of(config, adapter_sha256="c" * 64))
    flip(store_of(config) / "masks" / "zarr.json", 9)
    assert len(repair(config).faults) == 1
    assert content(config.cache.root / "sam") == whole


def test_damaged_labels_of_another_teacher(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, teacher_of(config, adapter_sha256="c" * 64))
    flip(store_of(config) / "masks" / "c.0.0.0", 9)
    before = content(config.cache.root / "sam")
    result = repair(config)
    assert result.remaining == [
        f"{store_of(config)}: adapter_sha256 is {'a' * 64}, the run asks for {'c' * 64}; "
        "run `samfed precompute-sam`"
    ]
    assert content(config.cache.root / "sam") == before


def test_the_calibration_part_alone(
    config: Config, teacher: FakeTeacher, whole: dict[str, bytes]
) -> None:
    (config.cache.root / "sam" / "server.zarr" / "predicted_iou" / "c.0").unlink()
    shutil.rmtree(store_of(config))  # not labelled yet, and not repair's to label
    result = repair(config)
    assert result.labelled == teacher.images == 2
    server = {name: value for name, value in whole.items() if name.startswith("server")}
    assert content(config.cache.root / "sam") == server


def test_what_repair_cannot_mend(config: Config, teacher: FakeTeacher) -> None:
    cache = config.cache.root
    (cache / "sam" / "old.zarr").mkdir()
    flip(cache / "images" / "site" / "train.zarr" / "images" / "c.0.0.0.0", 9)
    content_of = read_sealed(store_of(config), "store.jsonl")
    write_sealed(store_of(config) / "store.jsonl", {**content_of, "format": 3})
    before = content(cache)
    result = repair(config)
    assert result.remaining == [
        f"{cache}/images/site/train.zarr: images rows 0..63: damaged; run `samfed prepare` again",
        f"{cache}/sam/old.zarr: 'old' is no client of the partition; remove it",
        f"{store_of(config)}: format 3, this samfed reads format 2; "
        "run `samfed precompute-sam`, which moves it to the archive and labels anew",
    ]
    assert teacher.images == 0
    assert {k: v for k, v in content(cache).items() if k not in before} == {
        "locks/sam-old.lock": b""
    }
    assert {k: v for k, v in content(cache).items() if k in before} == before


def test_repair_waits_for_no_writer(config: Config, teacher: FakeTeacher) -> None:
    flip(store_of(config) / "masks" / "c.0.0.0", 9)
    before = content(store_of(config))
    with (
        writer_lock(config.cache.root / "locks" / "sam-site.lock"),
        pytest.raises(LockedStoreError),
    ):
        repair(config)
    assert content(store_of(config)) == before


def test_repair_without_a_teacher(config: Config) -> None:
    flip(store_of(config) / "masks" / "c.0.0.0", 9)
    before = content(store_of(config))
    shutil.rmtree(config.cache.root / "teacher")
    with pytest.raises(StageError):
        repair(config)
    card = teacher_of(config, variant="other").card
    assert card.variant == "other"
    with pytest.raises(IdentityError):
        repair(config)
    assert content(store_of(config)) == before


def test_workers_are_asked_for_only_if_there_is_work(config: Config, teacher: FakeTeacher) -> None:
    """Where they cannot be had, nothing is damaged any more, and any stage one goes on."""

    @contextmanager
    def refuse() -> Iterator[Cluster]:
        raise ConfigError("no scheduler")
        yield

    assert repair(config, cluster=refuse()) == Repair()
    flip(store_of(config) / "masks" / "c.0.0.0", 9)
    with pytest.raises(ConfigError, match="no scheduler"):
        repair(config, cluster=refuse())
    assert verify(config).faults == []
    assert LabelStore(store_of(config)).pending() == [0]


# --------------------------------------------------------------------------- info


def test_info(config: Config) -> None:
    store = LabelStore(store_of(config))
    found = info(config)
    assert [each.owner for each in found.stores] == ["server", "site"]
    site = found.stores[1]
    assert site == StoreInfo(
        owner="site",
        path=str(store.path),
        state="complete",
        bytes=sum(map(len, content(store.path).values())),
        rows=len(store),
        done=len(store),
        identity=store.identity.model_dump() | {"digest": store.identity.digest},
        provenance=[{"backend": "fake", "chunks": 2}],
        differs=[],
    )
    assert found.text().splitlines()[3:] == [
        f"{store.path}: {len(store)} of {len(store)} rows, {site.bytes / 2**20:.1f} MiB, "
        "complete; of the present teacher and partition",
        f"  identity {store.identity.digest}: fake, prompt none, input 64 px, labels 16 px, "
        "1 class(es)",
        "  2 chunk(s) by backend fake",
    ]
    json.dumps(found.as_json())
    store.mark_done(1, [64], [{"backend": "other"}])
    lines = info(config).text().splitlines()[5:]
    assert lines == ["  2 chunk(s) by backend fake", "  1 chunk(s) by backend other"]


def test_info_of_what_is_not_as_it_should_be(config: Config) -> None:
    cache = config.cache.root
    store = LabelStore(store_of(config))
    other, rows = store.identity.model_copy(update={"prompt": "points"}), store.rows
    shutil.rmtree(store.path)
    LabelStore.create(store.path, other, rows[:70])
    (cache / "sam" / "server.zarr" / "chunks" / "0.jsonl").unlink()
    store.path.parent.joinpath("old.zarr").mkdir()
    old = cache / "archive" / "site" / "x.zarr"
    old.mkdir(parents=True)
    (old / "zarr.json").write_bytes(b"12345")
    found = info(config)
    states = {each.owner: (each.state, each.differs) for each in found.stores}
    assert states == {
        "old": ("damaged", None),
        "server": ("damaged", None),
        "site": ("unfinished", ["prompt", "images"]),
    }
    assert found.archive == [{"path": str(old), "bytes": 5}]
    text = found.text()
    assert f"{store.path}: 0 of 70 rows, " in text
    assert "unfinished; differs from the present run in prompt, images" in text
    assert f"{old}: moved aside, 0.0 MiB" in text
    shutil.rmtree(store.path)
    assert f"{store.path}: none of {len(rows)} rows yet" in info(config).text()
    shutil.rmtree(cache / "teacher")
    LabelStore.create(store.path, other, rows[:70])
    text = info(config).text()
    assert "unfinished; not compared: no teacher or no partition" in text


@pytest.mark.parametrize("name", ["teacher/card.json", "partition.json"])
def test_info_beside_a_damaged_file(config: Config, name: str) -> None:
    """It names the file, and shows the stores all the same."""
    (config.cache.root / name).write_text("{")
    found = info(config)
    (line,) = found.failures()
    assert line.startswith(f"{config.cache.root / name}: ")
    assert (found.exit_code, [store.state for store in found.stores]) == (3, ["complete"] * 2)
    assert "complete; not compared: no teacher or no partition" in found.text()


# --------------------------------------------------------------------------- prune


def test_prune(config: Config, whole: dict[str, bytes]) -> None:
    cache = config.cache.root
    aside = cache / "archive" / "site" / "0123.zarr"
    shutil.copytree(store_of(config), aside)
    run = cache / "archive" / "runs" / "sam_fed-0123"
    run.mkdir(parents=True)
    building, retired = (cache / "sam" / f".site.zarr.{end}" for end in ("building", "retired"))
    lost = cache / "sam" / ".gone.zarr.retired"  # its successor never came: no rubbish
    half = aside.with_name(".4567.zarr.building")
    for folder in (building, retired, lost, half):
        folder.mkdir()
    archives = cache / "downloads" / "busi"
    archives.mkdir(parents=True)
    found = removable(config)
    assert {(each.path, each.why) for each in found.found} == {
        (aside, "moved aside"),
        (archives, "archives that `samfed fetch` received"),
        *((path, "left by a killed run") for path in (half, building, retired)),
    }
    for name in ("sam-site", "fetch-busi"):
        with writer_lock(cache / "locks" / f"{name}.lock"), pytest.raises(LockedStoreError):
            prune(config, found)
        assert aside.exists()
    assert prune(config, found).removed == len(found.found)
    assert removable(config) == Pruning([])
    assert content(cache / "sam") == whole
    assert (run.is_dir(), lost.is_dir(), aside.exists()) == (True, True, False)
    assert prune(config, found).removed == 0


def test_prune_of_single_files_that_a_kill_left(config: Config, whole: dict[str, bytes]) -> None:
    """Only our own, and only old ones: a young one may be somebody's who writes it now."""
    cache = config.cache.root
    code = (
        "import os, sys; from pathlib import Path; from pipeline.disk import write_bytes\n"
        "os.fsync = lambda descriptor: os.kill(os.getpid(), 9)\n"
        "write_bytes(Path(sys.argv[1]), b'half')"
    )
    aside = cache / "archive" / "site" / "0123.zarr"
    shutil.copytree(store_of(config), aside)
    finals = [cache / "partition.json", store_of(config) / "zarr.json", aside / "zarr.json"]
    for final in finals:
        done = subprocess.run([sys.executable, "-c", code, str(final)], cwd=ROOT)
        assert done.returncode == -9
    left = [path for path in cache.rglob(".*") if path.is_file()]
    assert {path.parent for path in left} == {path.parent for path in finals}
    others = [cache / ".notes.abcdefgh", cache / ".a.abcdefgh.tmp", cache / "b.abcdefgh.samfed-tmp"]
    for path in others:
        path.write_bytes(b"a user's")
    folder = cache / ".c.abcdefgh.samfed-tmp"
    folder.mkdir()
    assert {each.path for each in removable(config).found} == {aside}
    hours_ago = time.time() - 2 * 60 * 60
    for path in [*left, *others, folder]:
        os.utime(path, (hours_ago, hours_ago))
    found = removable(config)
    wanted = {path for path in left if aside not in path.parents}
    assert len(wanted) == 2
    assert {each.path for each in found.found} == {
        aside,
        *wanted,
    }  # what goes with it is not named twice
    assert {(each.bytes, each.why) for each in found.found if each.path in wanted} == {
        (4, "left by a killed run")
    }
    with writer_lock(cache / "locks" / "prepare.lock"):
        assert prune(config, found).removed == len(found.found)
    assert content(cache / "sam") == whole
    assert all(path.exists() for path in [*others, folder])


def test_prune_keeps_what_came_back_meanwhile(config: Config) -> None:
    aside = config.cache.root / "archive" / "site" / "0123.zarr"
    shutil.copytree(store_of(config), aside)
    found = removable(config)
    shutil.rmtree(store_of(config))
    aside.rename(store_of(config))
    assert prune(config, found).removed == 0
    assert verify(config).faults == []
