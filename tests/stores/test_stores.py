"""The stores: round trips, what is kept when things change, and every flipped bit found."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr
from numcodecs.blosc import compress
from numpy.typing import NDArray

from pipeline.errors import CorruptStoreError, IdentityError, StageError
from pipeline.stores import label_store as labels_module
from pipeline.stores.arrays import CHUNK_ROWS, chunk_file, read_rows, table_array
from pipeline.stores.decode import ChunkError, read_file
from pipeline.stores.image_store import read_image_store, write_image_store
from pipeline.stores.integrity import check_store
from pipeline.stores.label_store import (
    Identity,
    LabelStore,
    PseudoLabels,
    RowKey,
    check_identity,
    confidence_to_probability,
    open_label_store,
    read_labels,
)

SIZE = 8
IDENTITY = Identity(
    variant="vit_t",
    base_sha256="b" * 64,
    adapter_sha256="a" * 64,
    prompt="none",
    input_size=64,
    label_size=SIZE,
    num_classes=1,
)
OTHER = IDENTITY.model_copy(update={"adapter_sha256": "c" * 64})
COUNT = CHUNK_ROWS + 6  # a whole shard and a part of one
PROVENANCE = {"backend": "torch", "precision": "fp32"}


def keys(count: int = COUNT, start: int = 0) -> list[RowKey]:
    return [RowKey(f"caf\u00e9_{i:03d}", f"{i:064x}") for i in range(start, start + count)]


def labels_of(rows: Sequence[RowKey]) -> PseudoLabels:
    """Labels that depend on the image alone; every third mask is empty."""
    seeds = [int(row.sha256, 16) for row in rows]
    masks = [np.random.default_rng(s).integers(0, 2, (SIZE, SIZE)) * (s % 3 > 0) for s in seeds]
    sure = [np.random.default_rng(s + 1).integers(0, 256, (SIZE, SIZE)) for s in seeds]
    return PseudoLabels(
        masks=np.array(masks, np.uint8),
        confidences=np.array(sure, np.uint8),
        predicted_iou=np.array([s / 7 for s in seeds], np.float32),
    )


def fill(store: LabelStore, shards: Sequence[int] | None = None) -> LabelStore:
    for shard in range(store.chunks) if shards is None else shards:
        rows = list(store.chunk_rows(shard))
        store.write_chunk(shard, rows, labels_of([store.rows[row] for row in rows]))
        store.mark_done(shard, rows, [PROVENANCE | {"shard": str(shard)}])
    return store


def same(found: PseudoLabels, expected: PseudoLabels) -> None:
    for name in ("masks", "confidences", "predicted_iou"):
        value = getattr(found, name)
        assert value.dtype == getattr(expected, name).dtype
        np.testing.assert_array_equal(value, getattr(expected, name))


def content(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sam" / "client.zarr"


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return tmp_path / "archive"


# --------------------------------------------------------------------------- images


def pictures(count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("count", [1, CHUNK_ROWS, COUNT])
def test_image_store_round_trip(tmp_path: Path, count: int, labelled: bool) -> None:
    ids = [f"\u75c5\u5909 {i}" for i in range(count)]
    images = pictures(count)
    truth = images[..., 0] % 2
    rows = (
        (image, label if labelled else None) for image, label in zip(images, truth, strict=True)
    )
    write_image_store(tmp_path / "x.zarr", ids, rows, size=SIZE, num_classes=1)
    found = read_image_store(tmp_path / "x.zarr", image_ids=ids, size=SIZE, num_classes=1)
    assert found.image_ids == tuple(ids)
    assert len(found) == count
    np.testing.assert_array_equal(found.images, images)
    if labelled:
        np.testing.assert_array_equal(found.labels, truth)
    else:
        assert found.labels is None
        assert not (tmp_path / "x.zarr" / "labels").exists()


def test_images_of_another_size_or_partition_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.zarr"
    write_image_store(path, ["a", "b"], [(p, None) for p in pictures(2)], size=SIZE, num_classes=1)
    with pytest.raises(IdentityError) as size:
        read_image_store(path, image_ids=["a", "b"], size=16, num_classes=1)
    assert str(size.value) == f"{path}: image_size is 8, the run asks for 16; run `samfed prepare`"
    with pytest.raises(IdentityError) as classes:
        read_image_store(path, image_ids=["a", "b"], size=SIZE, num_classes=3)
    assert str(classes.value) == (
        f"{path}: num_classes is 1, the run asks for 3; run `samfed prepare`"
    )
    with pytest.raises(IdentityError, match="holds other images than the partition"):
        read_image_store(path, image_ids=["b", "a"], size=SIZE, num_classes=1)


def test_image_store_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    def rows() -> Iterator[tuple[NDArray[np.uint8], None]]:
        yield pictures(1)[0], None
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_image_store(tmp_path / "x.zarr", ["a", "b"], rows(), size=SIZE, num_classes=1)
    assert list(tmp_path.iterdir()) == []


def test_rows_that_do_not_match_the_ids_are_refused(tmp_path: Path) -> None:
    image = pictures(1)[0]
    with pytest.raises(ValueError, match="found 1 rows for 2 image ids"):
        write_image_store(
            tmp_path / "x.zarr", ["a", "b"], [(image, None)], size=SIZE, num_classes=1
        )
    mixed = [(image, image[..., 0]), (image, None)]
    with pytest.raises(ValueError, match="found 1 labels for 2 images"):
        write_image_store(tmp_path / "x.zarr", ["a", "b"], mixed, size=SIZE, num_classes=1)
    assert list(tmp_path.iterdir()) == []


def test_missing_image_store(tmp_path: Path) -> None:
    with pytest.raises(StageError) as caught:
        read_image_store(tmp_path / "x.zarr", image_ids=["a"], size=SIZE, num_classes=1)
    assert str(caught.value) == f"{tmp_path / 'x.zarr'}: not found; run `samfed prepare` first"


def test_a_flipped_bit_in_an_image_store_is_found(tmp_path: Path) -> None:
    store = tmp_path / "x.zarr"
    write_image_store(
        store, ["a", "b"], [(p, p[..., 0]) for p in pictures(2)], size=SIZE, num_classes=1
    )
    flip_all(
        store, lambda: read_image_store(store, image_ids=["a", "b"], size=SIZE, num_classes=1), 40
    )


# --------------------------------------------------------------------------- labels


def test_label_store_round_trip(path: Path) -> None:
    store = fill(LabelStore.create(path, IDENTITY, keys()))
    expected = labels_of(keys())
    assert not expected.masks[0].any()
    again = LabelStore(path)
    assert again.identity == IDENTITY
    assert again.rows == tuple(keys())
    assert len(again) == COUNT
    assert again.chunks == 2
    same(again.read(), expected)
    same(store.read(), expected)
    part = again.read(slice(60, 67))
    np.testing.assert_array_equal(part.masks, expected.masks[60:67])
    found = read_labels(path, rows=keys(), identity=IDENTITY)
    same(found, expected)


@pytest.mark.parametrize("start", [0, 3, 8, 63, 64, 69])
@pytest.mark.parametrize("stop", [1, 8, 37, 64, 66, COUNT])
def test_rows_are_those_that_zarr_reads(path: Path, start: int, stop: int) -> None:
    """Of every array: shards and chunks with a file each, whole, in part and past the end."""
    store = fill(LabelStore.create(path, IDENTITY, keys()))
    for name, array in store._arrays.items():
        found = read_rows(path, array, rows=slice(start, stop))
        expected = array[start:stop]
        assert found.dtype == expected.dtype, name
        np.testing.assert_array_equal(found, expected, err_msg=name)


def test_pending_and_provenance(path: Path) -> None:
    store = LabelStore.create(path, IDENTITY, keys())
    assert store.pending() == [0, 1]
    assert not store.done().any()
    assert store.provenance() == [[], []]
    fill(store, [1])
    assert store.pending() == LabelStore(path).pending() == [0]
    assert store.done().tolist() == [False] * CHUNK_ROWS + [True] * 6
    assert store.provenance() == [[], [PROVENANCE | {"shard": "1"}]]
    fill(store, [0])
    assert store.pending() == []
    assert store.done().all()


def test_an_unfinished_store_is_not_read(path: Path) -> None:
    store = fill(LabelStore.create(path, IDENTITY, keys()), [1])
    with pytest.raises(StageError) as caught:
        store.read()
    assert str(caught.value) == (
        f"{path}: 6 of 70 rows are labelled; run `samfed precompute-sam` to finish it"
    )
    assert len(store.read(slice(CHUNK_ROWS, COUNT)).predicted_iou) == 6


def test_a_part_of_a_shard_keeps_the_rest(path: Path) -> None:
    """An unreadable image leaves a gap, which a later run fills."""
    store = LabelStore.create(path, IDENTITY, keys())
    first, later = [0, 2, 5], [row for row in range(CHUNK_ROWS) if row not in (0, 2, 5)]
    for rows in (first, later):
        store.write_chunk(0, rows, labels_of([store.rows[row] for row in rows]))
        store.mark_done(0, rows, [PROVENANCE])
        if rows is first:
            assert np.flatnonzero(store.done()).tolist() == first
            assert store.pending() == [0, 1]
    assert store.pending() == [1]
    np.testing.assert_array_equal(
        store.read(slice(0, CHUNK_ROWS)).masks, labels_of(keys(CHUNK_ROWS)).masks
    )


def test_a_damaged_shard_is_not_completed(path: Path) -> None:
    store = LabelStore.create(path, IDENTITY, keys())
    store.write_chunk(0, [0], labels_of(keys(1)))
    store.mark_done(0, [0], [PROVENANCE])
    shard = path / "masks" / "c" / "0" / "0" / "0"
    damage = bytearray(shard.read_bytes())
    damage[5] ^= 1
    shard.write_bytes(bytes(damage))
    with pytest.raises(CorruptStoreError):
        store.write_chunk(0, [1], labels_of(keys(1, 1)))


@pytest.mark.parametrize("name", ["masks/c/1/0/0", "predicted_iou/c/1"])
def test_what_a_killed_run_left_is_not_read(path: Path, name: str) -> None:
    """The last shard is not full: zarr would merge new rows with the damaged old ones."""
    store = fill(LabelStore.create(path, IDENTITY, keys()))
    before = content(path)
    store = LabelStore(shutil.copytree(path, path.with_name("again.zarr")))
    store._arrays["done"][CHUNK_ROWS:] = np.zeros(6, np.uint8)
    file = store.path / name
    file.write_bytes(file.read_bytes()[:9])
    fill(store, store.pending())
    assert content(store.path) == before


def test_marks_are_not_set_beside_damaged_provenance(path: Path) -> None:
    store = LabelStore.create(path, IDENTITY, keys())
    (path / "provenance" / "c" / "0" / "0").unlink()
    with pytest.raises(CorruptStoreError):
        fill(store, [0])
    assert not store.done().any()


def test_labels_are_on_the_disk_before_their_marks(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut may take what was written but not flushed, in any order."""
    store = LabelStore.create(path, IDENTITY, keys())
    flushed: list[tuple[str, int]] = []

    def flush(file: Path) -> None:
        flushed.append((file.relative_to(path).parts[0], int(store.done().sum())))

    monkeypatch.setattr(labels_module, "flush", flush)
    fill(store, [0])
    assert flushed == [
        *((name, 0) for name in ("masks", "confidences", "predicted_iou", "provenance")),
        ("done", CHUNK_ROWS),
    ]


def test_a_long_table_keeps_each_row_in_one_chunk(tmp_path: Path) -> None:
    """A missing chunk is found by the first of its row; zarr would split a table both ways."""
    group = zarr.create_group(store=tmp_path / "x.zarr")
    table_array(group, "image_ids", np.ones((200_000, 32), np.uint8))
    array: Any = group["image_ids"]
    assert array.chunks == (4096, 32)
    chunk_file(tmp_path / "x.zarr", array, 7).unlink()
    with pytest.raises(CorruptStoreError, match=r"image_ids rows 28672\.\.32767 are missing"):
        read_rows(tmp_path / "x.zarr", array)


def test_shard_order_does_not_change_the_bytes(tmp_path: Path) -> None:
    one = fill(LabelStore.create(tmp_path / "1.zarr", IDENTITY, keys()), [0, 1])
    two = fill(LabelStore.create(tmp_path / "2.zarr", IDENTITY, keys()), [1, 0])
    assert content(one.path) == content(two.path)


def test_provenance_that_is_too_long(path: Path) -> None:
    store = LabelStore.create(path, IDENTITY, keys(1))
    with pytest.raises(ValueError, match="at most 512"):
        store.mark_done(0, [0], [{"backend": "x" * 600}])
    assert store.pending() == [0]


def test_rows_of_a_shard_that_several_made(path: Path) -> None:
    """A record for each, in their order, and as long as the shard has a row of theirs."""
    store = LabelStore.create(path, IDENTITY, keys())
    one, two = (PROVENANCE | {"backend": name} for name in ("one", "two"))
    store.mark_done(0, [0, 1], [one])
    alone = content(path)
    store.mark_done(0, [1], [one])
    assert content(path) == alone
    store.mark_done(0, [5, 7], [two, one])
    assert store.provenance() == [[one, two], []]
    assert not any(fault.what == "provenance" for fault in check_store(path))
    store.mark_done(0, [0, 1, 5, 7], [two])  # all of them again
    assert store.provenance() == [[two], []]


def test_more_records_than_a_shard_has_room_for(path: Path) -> None:
    store = LabelStore.create(path, IDENTITY, keys())
    records = [{"backend": f"{number}" * 120} for number in range(6)]
    for row, record in enumerate(records):
        store.mark_done(0, [row], [record])
    omitted = {"omitted": "earlier records"}
    assert store.provenance()[0] == [omitted, *records[-3:]]
    store.mark_done(0, [6], [records[0]])
    assert store.provenance()[0] == [omitted, *records[-2:], records[0]]
    assert not any(fault.what == "provenance" for fault in check_store(path))


def test_confidences_are_never_quite_certain() -> None:
    found = confidence_to_probability(np.array([0, 51, 255], np.uint8))
    np.testing.assert_allclose(found, [1 / 512, 0.2, 511 / 512], rtol=1e-6)
    assert found.dtype == np.float32


# --------------------------------------------------------------------------- identity


@pytest.mark.parametrize("field", list(Identity.model_fields))
def test_another_identity_names_field_and_both_values(path: Path, field: str) -> None:
    store = LabelStore.create(path, IDENTITY, keys(1))
    old = getattr(IDENTITY, field)
    new = old + 1 if isinstance(old, int) else "new"
    with pytest.raises(IdentityError) as caught:
        check_identity(store, IDENTITY.model_copy(update={field: new}))
    assert str(caught.value) == (
        f"{path}: {field} is {old}, the run asks for {new}; run `samfed precompute-sam`"
    )
    check_identity(store, IDENTITY)


def test_labels_of_another_size_or_other_images(path: Path) -> None:
    fill(LabelStore.create(path, IDENTITY, keys(2)))
    with pytest.raises(IdentityError) as size:
        read_labels(path, rows=keys(2), identity=IDENTITY.model_copy(update={"label_size": 16}))
    assert str(size.value) == (
        f"{path}: label_size is 8, the run asks for 16; run `samfed precompute-sam`"
    )
    with pytest.raises(IdentityError) as images:
        read_labels(path, rows=keys(2)[::-1], identity=IDENTITY)
    assert str(images.value) == (
        f"{path}: made for other images than the client now has; run `samfed precompute-sam`"
    )


def test_another_identity_moves_the_store_aside_and_back(path: Path, archive: Path) -> None:
    store, notice = open_label_store(path, IDENTITY, keys(), archive=archive)
    assert notice is None
    before = content(fill(store).path)
    store, notice = open_label_store(path, OTHER, keys(), archive=archive)
    retired = archive / f"{IDENTITY.digest}.zarr"
    assert notice == (
        f"{path}: adapter_sha256 was {'a' * 64}, now {'c' * 64}; moved the old labels to {retired}"
    )
    assert store.pending() == [0, 1]
    assert content(retired) == before
    store, notice = open_label_store(path, IDENTITY, keys(), archive=archive)
    assert notice is not None
    assert notice.endswith(f"; took back labels made earlier from {retired}")
    assert content(path) == before
    assert not retired.exists()
    assert (archive / f"{OTHER.digest}.zarr").is_dir()


@pytest.mark.parametrize("fuller", ["first", "second"])
def test_two_stores_aside_of_one_identity(path: Path, archive: Path, fuller: str) -> None:
    """As after a checkout of an old cache/sam: both are kept, and the fuller one comes back."""
    copies = archive / f"{IDENTITY.digest}.zarr", archive / f"{IDENTITY.digest}-2.zarr"
    fill(LabelStore.create(copies[0], IDENTITY, keys()), [0, 1] if fuller == "first" else [1])
    fill(LabelStore.create(path, IDENTITY, keys()), [0, 1] if fuller == "second" else [0])
    before = content(copies[0]), content(path)
    _, notice = open_label_store(path, OTHER, keys(), archive=archive)
    assert notice is not None
    assert notice.endswith(f"; moved the old labels to {copies[1]}")
    assert (content(copies[0]), content(copies[1])) == before
    store, notice = open_label_store(path, IDENTITY, keys(), archive=archive)
    assert notice is not None
    assert notice.endswith(f"; took back labels made earlier from {copies[fuller == 'second']}")
    assert store.done().all()
    other = copies[fuller == "first"]
    assert content(other) == before[fuller == "first"]
    (other / "zarr.json").unlink()  # damaged: not before one that is whole
    open_label_store(path, OTHER, keys(), archive=archive)
    store, _ = open_label_store(path, IDENTITY, keys(), archive=archive)
    assert store.done().all()
    assert other.is_dir()


def test_a_store_taken_back_for_other_images_says_both(path: Path, archive: Path) -> None:
    fill(open_label_store(path, IDENTITY, keys(3), archive=archive)[0])
    open_label_store(path, OTHER, keys(3), archive=archive)
    store, notice = open_label_store(path, IDENTITY, keys(4), archive=archive)
    assert notice is not None
    assert "took back labels" in notice
    assert "kept the labels of 3 of 4" in notice
    assert store.done().tolist() == [True] * 3 + [False]


def test_rows_are_kept_when_images_come_go_or_change(path: Path, archive: Path) -> None:
    old = keys()
    fill(open_label_store(path, IDENTITY, old, archive=archive)[0])
    new = [RowKey("new", "f" * 64), *old[3:60], RowKey(old[60].image_id, "e" * 64), *old[61:]]
    store, notice = open_label_store(path, IDENTITY, new, archive=archive)
    assert notice == f"{path}: the images changed; kept the labels of 66 of 68"
    assert store.rows == tuple(new)
    done = store.done()
    assert np.flatnonzero(~done).tolist() == [0, 58]
    found = store.read(slice(1, 58))
    np.testing.assert_array_equal(found.masks, labels_of(old[3:60]).masks)
    np.testing.assert_array_equal(found.predicted_iou, labels_of(old[3:60]).predicted_iou)
    assert list(path.parent.iterdir()) == [path]  # nothing half-built stays
    again, notice = open_label_store(path, IDENTITY, new, archive=archive)
    assert notice is None
    np.testing.assert_array_equal(again.done(), done)


def test_carried_rows_in_another_order(path: Path, archive: Path) -> None:
    """Rows from several old shards, backwards, some of them not done."""
    old = keys(3 * CHUNK_ROWS)
    store = fill(open_label_store(path, IDENTITY, old, archive=archive)[0], [0, 2])
    store.write_chunk(1, [64, 70], labels_of([old[64], old[70]]))
    store.mark_done(1, [64, 70], [PROVENANCE | {"shard": "1"}])
    new = [*old[::-3], RowKey("new", "f" * 64)]
    store, notice = open_label_store(path, IDENTITY, new, archive=archive)
    kept = [i for i, row in enumerate(new[:-1]) if not 64 <= int(row.sha256, 16) < 128]
    kept = sorted({*kept, *(i for i, row in enumerate(new) if row in (old[64], old[70]))})
    assert notice == f"{path}: the images changed; kept the labels of {len(kept)} of 65"
    assert np.flatnonzero(store.done()).tolist() == kept
    for row in kept:
        same(store.read(slice(row, row + 1)), labels_of([new[row]]))
    every = [PROVENANCE | {"shard": str(shard)} for shard in (2, 0)]
    assert store.provenance() == [every, []]


def test_carrying_over_reads_each_old_shard_once(
    path: Path, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = keys(3 * CHUNK_ROWS)
    fill(open_label_store(path, IDENTITY, old, archive=archive)[0])
    reads: list[str] = []
    real = labels_module.read_rows

    def count(path: Path, array: Any, *, rows: slice = slice(None)) -> object:
        reads.append(array.basename)
        return real(path, array, rows=rows)

    monkeypatch.setattr(labels_module, "read_rows", count)
    open_label_store(path, IDENTITY, old[1:], archive=archive)
    assert reads.count("masks") <= 4  # and one for the new store's last shard
    assert reads.count("done") <= 7  # the old marks, and each new shard twice


# --------------------------------------------------------------------------- killed writers


@pytest.mark.parametrize("window", ["building", "retired", "replaced"])
def test_a_killed_carry_over_loses_no_labels(path: Path, archive: Path, window: str) -> None:
    fill(open_label_store(path, IDENTITY, keys(), archive=archive)[0])
    before = content(path)
    building = path.with_name(f".{path.name}.building")
    shutil.copytree(path, building)
    (building / "zarr.json").unlink()
    if window == "retired":
        path.rename(path.with_name(f".{path.name}.retired"))
    if window == "replaced":
        shutil.rmtree(building)
        shutil.copytree(path, path.with_name(f".{path.name}.retired"))
    store, notice = open_label_store(path, IDENTITY, keys(), archive=archive)
    assert notice is None
    assert content(path) == before
    assert store.pending() == []
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("moved", [False, True])
def test_partial_files_of_a_killed_writer_go(path: Path, archive: Path, moved: bool) -> None:
    fill(open_label_store(path, IDENTITY, keys(), archive=archive)[0])
    before = content(path)
    for name in ("masks/c/0/0/0", "done/c/0"):
        (path / name).with_suffix(f".{'0' * 32}.partial").write_bytes(b"half")
    if moved:
        open_label_store(path, OTHER, keys(), archive=archive)
    open_label_store(path, IDENTITY, keys(), archive=archive)
    assert content(path) == before


# --------------------------------------------------------------------------- damage


def read_everything(path: Path) -> None:
    store = LabelStore(path)
    assert len(store.rows) == len(store)
    store.done()
    store.provenance()
    store.read()


def flip_all(path: Path, read: Callable[[], object], flips: int) -> None:
    """Flip ``flips`` random bits, in every file at least once; each one must be found."""
    rng = np.random.default_rng(0)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    read()
    for number in range(max(flips, len(files))):
        file = files[number % len(files)]
        whole = file.read_bytes()
        place, bit = int(rng.integers(len(whole))), int(rng.integers(8))
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bit
        file.write_bytes(bytes(damaged))
        try:
            read()
        except CorruptStoreError as error:
            found = str(error)
        else:
            found = ""
        finally:
            file.write_bytes(whole)
        assert found.startswith(str(path)), f"{file} byte {place} of {len(whole)} bit {bit}"
        assert "\n" not in found
    read()


def test_a_flipped_bit_in_a_label_store_is_found(path: Path) -> None:
    fill(LabelStore.create(path, IDENTITY, keys()))
    flip_all(path, lambda: read_everything(path), 60)


@pytest.mark.parametrize(
    "name",
    [
        "masks/c/0/0/0",
        "confidences/c/1/0/0",
        "predicted_iou/c/1",
        "done/c/0",
        "provenance/c/0/0",
        "image_ids/c/0/0",
        "image_sha256/c/0/0",
        "masks/zarr.json",
        "zarr.json",
    ],
)
@pytest.mark.parametrize("what", ["missing", "truncated", "empty"])
def test_a_missing_or_truncated_file_is_found(path: Path, name: str, what: str) -> None:
    fill(LabelStore.create(path, IDENTITY, keys()))
    file = path / name
    whole = file.read_bytes()
    file.unlink()
    if what != "missing":
        file.write_bytes(whole[: len(whole) * 2 // 3] if what == "truncated" else b"")
    with pytest.raises(CorruptStoreError) as caught:
        read_everything(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_missing_shard_names_its_rows(path: Path) -> None:
    store = fill(LabelStore.create(path, IDENTITY, keys()))
    (path / "masks" / "c" / "1" / "0" / "0").unlink()
    with pytest.raises(CorruptStoreError) as caught:
        store.read()
    assert str(caught.value) == (
        f"{path}: masks rows 64..69 are missing; run `samfed cache repair`"
    )


def test_a_chunk_of_another_store_is_no_zeros(path: Path, tmp_path: Path) -> None:
    """A shard whose every chunk is marked missing would be read as zeros."""
    fill(LabelStore.create(path, IDENTITY, keys()))
    shard = path / "masks" / "c" / "0" / "0" / "0"
    shard.write_bytes(b"")
    with pytest.raises(CorruptStoreError):
        read_everything(path)


def test_a_damaged_chunk_names_its_rows(path: Path) -> None:
    store = fill(LabelStore.create(path, IDENTITY, keys()))
    shard = path / "masks" / "c" / "1" / "0" / "0"
    damaged = bytearray(shard.read_bytes())
    damaged[20] ^= 1
    shard.write_bytes(bytes(damaged))
    with pytest.raises(CorruptStoreError) as caught:
        store.read()
    assert str(caught.value) == (
        f"{path}: masks rows 64..69 are damaged (crc32c differs); run `samfed cache repair`"
    )


def test_a_chunk_that_a_shard_leaves_out_is_missing(path: Path) -> None:
    """zarr reads it as zeros, and an empty mask is a valid label."""
    store = fill(LabelStore.create(path, IDENTITY, keys()))
    masks = store.read().masks[:CHUNK_ROWS]
    masks[8:16] = 0
    store._arrays["masks"].with_config({"write_empty_chunks": False})[:CHUNK_ROWS] = masks
    assert not store._arrays["masks"][8:16].any()
    with pytest.raises(CorruptStoreError) as caught:
        store.read(slice(12, 20))
    assert str(caught.value) == (
        f"{path}: masks rows 12..15 are missing; run `samfed cache repair`"
    )
    np.testing.assert_array_equal(store.read(slice(16, 20)).masks, masks[16:20])


def checked(content: bytes) -> bytes:
    return content + google_crc32c.value(content).to_bytes(4, "little")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (compress(b"x" * 63, b"zstd", 5), "holds 63 bytes, expected 64"),
        (compress(b"x" * 65, b"zstd", 5), "holds 65 bytes, expected 64"),
        (compress(b"x" * 64, b"zstd", 5)[:-3], "takes 80 bytes, found 77"),
        (b"\0" * 4 + b"\x40\0\0\0" * 3, "takes 64 bytes, found 16"),
        (b"\xff" * 4 + b"\x40\0\0\0" * 15, "error during blosc decompression: -1"),
        (b"", "holds 0 bytes, expected 64"),
    ],
)
def test_a_chunk_that_only_its_crc_speaks_for(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "0").write_bytes(checked(content))
    with pytest.raises(ChunkError) as caught:
        read_file(tmp_path / "0", np.zeros(64, np.uint8), first=0, chunk_rows=64, chunks=None)
    assert caught.value.reason == f"damaged ({reason})"
    assert caught.value.rows == range(64)


@pytest.mark.parametrize("entry", [(0, 65), (65, 0), (2**64 - 2, 1), (2**63, 2**63)])
def test_an_index_that_points_outside(tmp_path: Path, entry: tuple[int, int]) -> None:
    index = np.array([(0, 64), entry], "<u8").tobytes()
    (tmp_path / "0").write_bytes(b"x" * 64 + checked(index))
    with pytest.raises(ChunkError, match="its index points outside"):
        read_file(tmp_path / "0", np.zeros(8, np.uint8), first=0, chunk_rows=8, chunks=2)


def test_no_store(path: Path) -> None:
    with pytest.raises(StageError) as caught:
        LabelStore(path)
    assert str(caught.value) == f"{path}: not found; run `samfed precompute-sam` first"


def test_an_image_store_is_no_label_store(tmp_path: Path) -> None:
    write_image_store(
        tmp_path / "x.zarr", ["a"], [(pictures(1)[0], None)], size=SIZE, num_classes=1
    )
    with pytest.raises(CorruptStoreError, match="not a label store"):
        LabelStore(tmp_path / "x.zarr")


def test_a_copied_store_is_the_same_store(path: Path, tmp_path: Path) -> None:
    fill(LabelStore.create(path, IDENTITY, keys()))
    shutil.copytree(path, tmp_path / "copy.zarr")
    same(LabelStore(tmp_path / "copy.zarr").read(), labels_of(keys()))


def test_rows_of_other_images_are_refused(path: Path) -> None:
    """What a late worker brings when the store was rebuilt meanwhile."""
    rows = keys()
    store = LabelStore.create(path, IDENTITY, rows)
    store.check_rows([1, 3], [rows[1].sha256, rows[3].sha256])
    with pytest.raises(IdentityError, match="row 3 is of another image by now"):
        store.check_rows([1, 3], [rows[1].sha256, rows[2].sha256])
