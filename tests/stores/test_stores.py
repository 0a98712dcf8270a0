"""The stores: round trips, what is kept when things change, and every flipped bit found."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from pipeline.disk import write_bytes
from pipeline.errors import (
    CorruptStoreError,
    FormatError,
    IdentityError,
    StageError,
    StoreError,
)
from pipeline.stores.arrays import (
    CHUNK_ROWS,
    canonical_json,
    read_sealed,
    rows_per_chunk,
    write_sealed,
)
from pipeline.stores.image_store import read_image_store, write_image_store
from pipeline.stores.integrity import check_store, forget_damaged, mend_metadata
from pipeline.stores.label_store import (
    Identity,
    LabelStore,
    RowKey,
    RowQuality,
    check_identity,
    read_labels,
)
from pipeline.stores.opening import open_label_store
from pipeline.stores.pseudo_labels import LABEL_ARRAYS, PseudoLabels, confidence_to_probability

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
COUNT = CHUNK_ROWS + 6  # a whole chunk and a part of one
PROVENANCE = {"backend": "torch", "precision": "fp32"}
QUALITY = RowQuality(0.75, None, 0.0, 0.5, None)


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


def fill(store: LabelStore, chunks: Sequence[int] | None = None) -> LabelStore:
    for chunk in range(store.chunks) if chunks is None else chunks:
        rows = list(store.chunk_rows(chunk))
        store.write_chunk(chunk, rows, labels_of([store.rows[row] for row in rows]))
        quality = [QUALITY] * len(rows)
        store.mark_done(chunk, rows, [PROVENANCE | {"chunk": str(chunk)}], quality)
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


@pytest.mark.parametrize("size", [8, 512])
def test_long_rows_make_chunks_of_fewer(tmp_path: Path, size: int) -> None:
    """A chunk stays within 16 MiB, and its rows a power of two, which batches divide."""
    assert [rows_per_chunk(s * s) for s in (256, 512, 768, 1024, 8192)] == [64, 64, 16, 16, 1]
    path, count = tmp_path / "x.zarr", 18
    images = np.random.default_rng(0).integers(0, 4, (count, size, size, 3), dtype=np.uint8)
    ids = [str(i) for i in range(count)]
    write_image_store(path, ids, [(i, i[..., 0]) for i in images], size=size, num_classes=3)
    found = read_image_store(path, image_ids=ids, size=size, num_classes=3)
    np.testing.assert_array_equal(found.images, images)
    np.testing.assert_array_equal(found.labels, images[..., 0])
    chunk = path / "labels" / f"c.{1 if size == 512 else 0}.0.0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    (fault,) = check_store(path)
    assert (fault.what, fault.rows) == ("labels", range(16, 18) if size == 512 else range(18))


def test_every_flipped_bit_in_an_image_store_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.zarr"
    pairs = [(picture, picture[..., 0]) for picture in pictures(2)]
    write_image_store(path, ["a", "b"], pairs, size=SIZE, num_classes=1)
    for file in flips(path, 60):
        (fault,) = check_store(path)
        if file.name == "store.jsonl":  # which says everything twice
            assert (fault.what, fault.rows) == ("store.jsonl", None)
            read_image_store(path, image_ids=["a", "b"], size=SIZE, num_classes=1)
            continue
        if file.name == "zarr.json":  # whose text is also in store.jsonl
            assert (fault.what, fault.rows) == (file.relative_to(path).as_posix(), None)
            read_image_store(path, image_ids=["a", "b"], size=SIZE, num_classes=1)
            continue
        assert (fault.what, fault.rows) == (file.parent.name, range(2))
        with pytest.raises(CorruptStoreError) as caught:
            read_image_store(path, image_ids=["a", "b"], size=SIZE, num_classes=1)
        assert str(caught.value).startswith(f"{path}: ")
        assert str(caught.value).endswith("; run `samfed prepare`")  # which repair cannot mend
    assert check_store(path) == []


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
    np.testing.assert_array_equal(again.read_chunk(1).masks, expected.masks[CHUNK_ROWS:])
    assert again.quality() == [QUALITY] * COUNT
    found = read_labels(path, rows=keys(), identity=IDENTITY)
    same(found, expected)


def test_plain_zarr_reads_the_arrays(path: Path) -> None:
    store = fill(LabelStore.create(path, IDENTITY, keys()))
    group = zarr.open_group(path, mode="r")
    for name in LABEL_ARRAYS:
        array: Any = group[name]
        np.testing.assert_array_equal(array[:], getattr(store.read(), name))


def test_pending_and_provenance(path: Path) -> None:
    store = LabelStore.create(path, IDENTITY, keys())
    assert store.pending() == [0, 1]
    assert not store.done().any()
    assert store.provenance() == [[], []]
    fill(store, [1])
    assert store.pending() == LabelStore(path).pending() == [0]
    assert store.done().tolist() == [False] * CHUNK_ROWS + [True] * 6
    assert store.provenance() == [[], [PROVENANCE | {"chunk": "1"}]]
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


def test_a_part_of_a_chunk_keeps_the_rest(path: Path) -> None:
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
    np.testing.assert_array_equal(store.read_chunk(0).masks, labels_of(keys(CHUNK_ROWS)).masks)


def test_a_damaged_chunk_is_not_completed(path: Path) -> None:
    store = LabelStore.create(path, IDENTITY, keys())
    store.write_chunk(0, [0], labels_of(keys(1)))
    store.mark_done(0, [0], [PROVENANCE])
    flip(path / "masks" / "c.0.0.0", 5)
    with pytest.raises(CorruptStoreError):
        store.write_chunk(0, [1], labels_of(keys(1, 1)))


@pytest.mark.parametrize("name", ["masks/c.1.0.0", "predicted_iou/c.1"])
def test_what_a_killed_run_left_is_not_read(path: Path, name: str) -> None:
    """The last chunk is not full: zarr would merge new rows with the damaged old ones."""
    store = fill(LabelStore.create(path, IDENTITY, keys()))
    before = content(path)
    store.forget_chunk(1, keys()[CHUNK_ROWS:])
    (path / name).write_bytes(before[name][:9])
    fill(store, store.pending())
    assert content(path) == before


def test_a_kill_between_the_files_of_a_chunk_is_no_damage(path: Path) -> None:
    """Rows that were done stay done: the next run labels the others alone."""
    whole = fill(LabelStore.create(path.with_name("whole.zarr"), IDENTITY, keys()))
    store = LabelStore.create(path, IDENTITY, keys())
    store.write_chunk(1, [64, 65], labels_of(keys(2, 64)))
    store.mark_done(1, [64, 65], [PROVENANCE])
    shutil.copy(whole.path / "masks" / "c.1.0.0", path / "masks")
    assert check_store(path) == []
    np.testing.assert_array_equal(store.read_chunk(1).masks[:2], labels_of(keys(2, 64)).masks)


def test_labels_are_on_the_disk_before_their_marks(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut may take what was written but not flushed, in any order."""
    store = LabelStore.create(path, IDENTITY, keys())
    steps: list[tuple[str, str, int]] = []
    fsync, replace = os.fsync, os.replace

    def flushed(descriptor: int) -> None:
        at = Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(path)
        steps.append(("flush", at.as_posix().split(".")[0], int(store.done().sum())))
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        replace(source, target)
        steps.append(("rename", target.relative_to(path).as_posix(), int(store.done().sum())))

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    fill(store, [0])
    expected = []
    for folder, name in [
        ("masks", "c.0.0.0"),
        ("confidences", "c.0.0.0"),
        ("predicted_iou", "c.0"),
        ("chunks", "0.jsonl"),
    ]:
        expected += [("flush", f"{folder}/"), ("rename", f"{folder}/{name}"), ("flush", folder)]
    assert [step[:2] for step in steps] == expected
    assert [done for *_, done in steps] == [0] * 10 + [CHUNK_ROWS] * 2


def test_rows_that_are_done_are_not_written_again(path: Path) -> None:
    """As by a worker that comes late: its bytes may be another device's."""
    store = fill(LabelStore.create(path, IDENTITY, keys()), [0])
    before = content(path)
    with pytest.raises(StoreError) as caught:
        store.write_chunk(0, [3], labels_of(keys(1)))
    assert str(caught.value) == f"{path}: rows of chunk 0 are labelled by now"
    assert content(path) == before


def test_chunk_order_does_not_change_the_bytes(tmp_path: Path) -> None:
    one = fill(LabelStore.create(tmp_path / "1.zarr", IDENTITY, keys()), [0, 1])
    two = fill(LabelStore.create(tmp_path / "2.zarr", IDENTITY, keys()), [1, 0])
    assert content(one.path) == content(two.path)


def test_rows_of_a_chunk_that_several_made(path: Path) -> None:
    """A record for each, once, in their order."""
    store = LabelStore.create(path, IDENTITY, keys())
    one, two = (PROVENANCE | {"backend": name} for name in ("one", "two"))
    span = store.chunk_rows(0)
    store.write_chunk(0, list(span), labels_of(keys()[span.start : span.stop]))
    store.mark_done(0, [0, 1], [one])
    alone = content(path)
    store.mark_done(0, [1], [one])
    assert content(path) == alone
    store.mark_done(0, [5, 7], [two, one])
    assert store.provenance() == [[one, two], []]


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
        check_identity(path, store.identity, IDENTITY.model_copy(update={field: new}))
    assert str(caught.value) == (
        f"{path}: {field} is {old}, the run asks for {new}; run `samfed precompute-sam`"
    )
    check_identity(path, store.identity, IDENTITY)


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


@pytest.mark.parametrize("link", [None, "sam", "sam/client.zarr"])
def test_another_identity_moves_the_store_aside_and_back(
    tmp_path: Path, path: Path, archive: Path, link: str | None
) -> None:
    """Also where the stores, or this one, lie behind a link, which stays."""
    if link is not None:
        (tmp_path / link).parent.mkdir(exist_ok=True)
        (tmp_path / link).symlink_to(tmp_path / "elsewhere" / link)
    store, notice = open_label_store(path, IDENTITY, keys(), archive=archive)
    assert notice is None
    before = content(fill(store).path)
    store, notice = open_label_store(path, OTHER, keys(), archive=archive)
    retired = archive / f"{IDENTITY.digest}.zarr"
    assert notice == (
        f"{path}: adapter_sha256 is {'a' * 64}, the run asks for {'c' * 64}; "
        f"moved the old labels to {retired}"
    )
    assert store.pending() == [0, 1]
    assert content(retired) == before
    store, notice = open_label_store(path, IDENTITY, keys(), archive=archive)
    assert notice is not None
    assert notice.endswith(f"; took back labels made earlier from {retired}")
    assert content(path) == before
    assert not retired.exists()
    assert (archive / f"{OTHER.digest}.zarr").is_dir()
    if link is not None:
        assert (tmp_path / link).is_symlink()
        assert content(tmp_path / "elsewhere" / "sam" / "client.zarr") == before


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
    (other / "store.jsonl").unlink()  # damaged: not before one that is whole
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
    found = store.read_chunk(0)
    np.testing.assert_array_equal(found.masks[1:58], labels_of(old[3:60]).masks)
    np.testing.assert_array_equal(found.predicted_iou[1:58], labels_of(old[3:60]).predicted_iou)
    assert [mark is not None for mark in store.quality()] == done.tolist()
    assert list(path.parent.iterdir()) == [path]  # nothing half-built stays
    again, notice = open_label_store(path, IDENTITY, new, archive=archive)
    assert notice is None
    np.testing.assert_array_equal(again.done(), done)


def test_carried_rows_in_another_order(path: Path, archive: Path) -> None:
    """Rows from several old chunks, backwards, some of them not done."""
    old = keys(3 * CHUNK_ROWS)
    store = fill(open_label_store(path, IDENTITY, old, archive=archive)[0], [0, 2])
    store.write_chunk(1, [64, 70], labels_of([old[64], old[70]]))
    store.mark_done(1, [64, 70], [PROVENANCE | {"chunk": "1"}])  # not measured
    new = [*old[::-3], RowKey("new", "f" * 64)]
    store, notice = open_label_store(path, IDENTITY, new, archive=archive)
    kept = [i for i, row in enumerate(new[:-1]) if not 64 <= int(row.sha256, 16) < 128]
    kept = sorted({*kept, *(i for i, row in enumerate(new) if row in (old[64], old[70]))})
    assert notice == f"{path}: the images changed; kept the labels of {len(kept)} of 65"
    assert np.flatnonzero(store.done()).tolist() == kept
    found = store.read_chunk(0)
    for row in set(kept) - {64}:
        np.testing.assert_array_equal(found.masks[row], labels_of([new[row]]).masks[0])
    every = [PROVENANCE | {"chunk": str(chunk)} for chunk in (2, 0)]
    assert store.provenance() == [every, []]


def test_carrying_over_reads_each_old_chunk_once(
    path: Path, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = keys(3 * CHUNK_ROWS)
    fill(open_label_store(path, IDENTITY, old, archive=archive)[0])
    reads: list[int] = []
    real = LabelStore.read_chunk

    def count(store: LabelStore, chunk: int) -> PseudoLabels:
        reads.append(chunk)
        return real(store, chunk)

    monkeypatch.setattr(LabelStore, "read_chunk", count)
    open_label_store(path, IDENTITY, old[1:], archive=archive)
    assert reads == [0, 1, 2]


# --------------------------------------------------------------------------- killed writers


@pytest.mark.parametrize("window", ["building", "retired", "replaced"])
def test_a_killed_carry_over_loses_no_labels(path: Path, archive: Path, window: str) -> None:
    fill(open_label_store(path, IDENTITY, keys(), archive=archive)[0])
    before = content(path)
    building = path.with_name(f".{path.name}.building")
    shutil.copytree(path, building)
    (building / "store.jsonl").unlink()
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
    for name in ("masks/.c.0.0.0", "chunks/.0.jsonl"):
        (path / f"{name}.{'0' * 8}.samfed-tmp").write_bytes(b"half")
    if moved:
        open_label_store(path, OTHER, keys(), archive=archive)
    open_label_store(path, IDENTITY, keys(), archive=archive)
    assert content(path) == before


# --------------------------------------------------------------------------- other formats


@pytest.fixture
def of_format_1(path: Path) -> Path:
    """What identifies a store of format 1."""
    path.mkdir(parents=True)
    attributes = {"kind": "labels", "format": 1, "metadata_sha256": "0" * 64}
    group = {"attributes": attributes, "node_type": "group", "zarr_format": 3}
    (path / "zarr.json").write_bytes(canonical_json(group))
    return path


def test_a_store_of_format_1_says_what_to_do(of_format_1: Path) -> None:
    with pytest.raises(FormatError) as caught:
        LabelStore(of_format_1)
    reason = (
        "1, this samfed reads format 2; "
        "run `samfed precompute-sam`, which moves it to the archive and labels anew"
    )
    assert str(caught.value) == f"{of_format_1}: format {reason}"
    assert [str(fault) for fault in check_store(of_format_1)] == [
        f"{of_format_1}: format: {reason}"
    ]
    root = of_format_1 / "zarr.json"
    root.write_text(root.read_text().replace("labels", "images"))
    with pytest.raises(FormatError, match="run `samfed prepare`, which writes it anew"):
        read_image_store(of_format_1, image_ids=["a"], size=SIZE, num_classes=1)


def test_a_store_of_format_1_is_moved_and_kept(of_format_1: Path, archive: Path) -> None:
    before = content(of_format_1)
    store, notice = open_label_store(of_format_1, IDENTITY, keys(), archive=archive)
    retired = archive / "other-format.zarr"
    assert notice == (
        f"{of_format_1}: format 1, this samfed reads format 2; moved the old labels to {retired}"
    )
    assert content(retired) == before
    assert store.pending() == [0, 1]


# --------------------------------------------------------------------------- damage


def flip(file: Path, place: int, bit: int = 3) -> None:
    damaged = bytearray(file.read_bytes())
    damaged[place] ^= 1 << bit
    file.write_bytes(bytes(damaged))


def flips(path: Path, count: int) -> Iterator[Path]:
    """Flip ``count`` random bits one after another, in each file at least one; mend it after."""
    rng = np.random.default_rng(0)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    for number in range(max(count, len(files))):
        file = files[number % len(files)]
        whole = file.read_bytes()
        flip(file, int(rng.integers(len(whole))), int(rng.integers(8)))
        yield file
        file.write_bytes(whole)


def read_everything(path: Path) -> None:
    store = LabelStore(path)
    assert len(store.rows) == len(store)
    store.provenance()
    store.read()


@pytest.mark.parametrize("state", ["finished", "unfinished", "begun"])
def test_a_flipped_bit_costs_one_chunk_at_most(path: Path, state: str) -> None:
    """In every file of a store it is found, named and mended; what is lost is labelled anew."""
    store = fill(LabelStore.create(path, IDENTITY, keys()))
    if state == "unfinished":
        store.forget_chunk(1, keys()[CHUNK_ROWS:])
    if state == "begun":  # a chunk with rows to come, and one that a killed run wrote
        for chunk in range(2):
            store.forget_chunk(chunk, [keys()[row] for row in store.chunk_rows(chunk)])
        store.write_chunk(1, range(64, 70), labels_of(keys(6, 64)))
        store.write_chunk(0, [0, 2], labels_of([keys()[0], keys()[2]]))
        store.mark_done(0, [0, 2], [PROVENANCE])
    before, done, provenance = content(path), store.done(), store.provenance()
    for file in flips(path, 100):
        name = file.relative_to(path).as_posix()
        (fault,) = check_store(path)
        if file.parent.name in LABEL_ARRAYS and file.name != "zarr.json":
            lost = int(file.name.split(".")[1])
            assert (fault.what, fault.reason) == (file.parent.name, "damaged")
            assert fault.rows == store.chunk_rows(lost)
            forget_damaged(path, [fault], keys())
            mended, kept = LabelStore(path), 1 - lost
            assert (mended.rows, mended.identity) == (tuple(keys()), IDENTITY)
            assert not mended.done()[list(store.chunk_rows(lost))].any()
            assert mended.provenance()[kept] == provenance[kept]
            rows = list(store.chunk_rows(kept))
            np.testing.assert_array_equal(mended.done()[rows], done[rows])
            if state == "finished":
                fill(mended, mended.pending())
                assert content(path) == before
        else:
            of_zarr = file.name == "zarr.json"
            reason = "damaged" if of_zarr else "one of its two lines is damaged"
            assert (fault.what, fault.reason, fault.mendable) == (name, reason, True)
            LabelStore(path).done()  # nothing is lost
            mend_metadata(path)
            assert content(path) == before, name
        assert check_store(path) == []
        for each, whole in before.items():
            (path / each).write_bytes(whole)


@pytest.mark.parametrize(
    "name",
    [
        "masks/c.0.0.0",
        "confidences/c.1.0.0",
        "predicted_iou/c.1",
        "chunks/0.jsonl",
        "masks/zarr.json",
        "zarr.json",
    ],
)
@pytest.mark.parametrize("what", ["missing", "truncated", "empty"])
def test_a_missing_or_truncated_file_is_found(path: Path, name: str, what: str) -> None:
    store = fill(LabelStore.create(path, IDENTITY, keys()))
    whole = content(path)
    (path / name).unlink()
    if what != "missing":
        cut = len(whole[name]) * 2 // 3
        (path / name).write_bytes(whole[name][:cut] if what == "truncated" else b"")
    faults = check_store(path)
    assert all(("missing" in fault.reason) == (what == "missing") for fault in faults)
    if not faults[0].mendable:
        with pytest.raises(CorruptStoreError) as caught:
            read_everything(path)
        assert str(caught.value).startswith(f"{path}: ")
    mend_metadata(path)
    forget_damaged(path, faults, keys())
    store = LabelStore(path)
    assert fill(store, store.pending()).rows == tuple(keys())
    assert content(path) == whole


def test_all_faults_are_listed(path: Path) -> None:
    """Damage in one file hides no other one."""
    fill(LabelStore.create(path, IDENTITY, keys()))
    for name in ("zarr.json", "masks/zarr.json", "chunks/0.jsonl", "masks/c.1.0.0"):
        (path / name).unlink()
    flip(path / "store.jsonl", 9)
    assert [(fault.what, fault.rows) for fault in check_store(path)] == [
        ("store.jsonl", None),
        ("masks/zarr.json", None),
        ("zarr.json", None),
        ("chunks/0.jsonl", range(64)),
        ("masks", range(64, COUNT)),
    ]


def test_chunks_that_nobody_measured_are_read(path: Path) -> None:
    """The first stores of format 2 say nothing of quality."""
    fill(LabelStore.create(path, IDENTITY, keys()))
    state = read_sealed(path, "chunks/0.jsonl")
    del state["quality"]
    write_sealed(path / "chunks" / "0.jsonl", state)
    store = LabelStore(path)
    assert store.quality() == [None] * CHUNK_ROWS + [QUALITY] * 6
    assert store.done().all()
    assert check_store(path) == []


def test_what_cannot_be_mended(path: Path) -> None:
    """Nobody can tell whose labels these are; nothing is touched."""
    fill(LabelStore.create(path, IDENTITY, keys()))
    (path / "chunks" / "0.jsonl").unlink()
    with pytest.raises(CorruptStoreError):
        forget_damaged(path, check_store(path), keys()[1:])
    for place in (9, -9):
        flip(path / "store.jsonl", place)
    before = content(path)
    faults = check_store(path)
    assert [str(fault) for fault in faults] == [f"{path}: store.jsonl: damaged"]
    with pytest.raises(CorruptStoreError):
        mend_metadata(path)
    with pytest.raises(CorruptStoreError):
        forget_damaged(path, faults, keys())
    assert content(path) == before


@pytest.mark.parametrize("what", ["missing", "damaged"])
def test_an_error_names_the_rows(path: Path, what: str) -> None:
    store = fill(LabelStore.create(path, IDENTITY, keys()))
    chunk = path / "masks" / "c.1.0.0"
    chunk.unlink() if what == "missing" else flip(chunk, 12)
    with pytest.raises(CorruptStoreError) as caught:
        store.read()
    assert str(caught.value) == f"{path}: masks rows 64..69 are {what}; run `samfed cache repair`"


def test_a_whole_file_of_another_chunk_is_damage(path: Path) -> None:
    """Its own checksum is right; the sha256 beside the chunk tells."""
    fill(LabelStore.create(path, IDENTITY, keys(2 * CHUNK_ROWS)))
    shutil.copy(path / "masks" / "c.1.0.0", path / "masks" / "c.0.0.0")
    assert [str(fault) for fault in check_store(path)] == [f"{path}: masks rows 0..63: damaged"]


@pytest.mark.parametrize(
    "name", ["masks/c.0.0.0", "chunks/0.jsonl", "store.jsonl", "masks/zarr.json"]
)
@pytest.mark.parametrize(
    "error", [PermissionError(13, "denied"), OSError(116, "Stale file handle")]
)
def test_what_cannot_be_read_is_not_called_damaged(
    path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: OSError
) -> None:
    fill(LabelStore.create(path, IDENTITY, keys()))
    real = Path.open

    def refuse(file: Path, *args: Any, **options: Any) -> Any:
        if file == path / name:
            raise error
        return real(file, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)
    # no label is read by way of a zarr.json
    for use in (check_store,) if "zarr" in name else (check_store, read_everything):
        with pytest.raises(type(error)) as caught:
            use(path)
        assert caught.value.errno == error.errno


def test_a_lack_of_memory_is_no_damage(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Repair would remove good labels."""
    store = fill(LabelStore.create(path, IDENTITY, keys()))

    def lack(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(zarr.Array, "get_basic_selection", lack)
    with pytest.raises(MemoryError):
        store.read()


def test_no_store(path: Path) -> None:
    with pytest.raises(StageError) as caught:
        LabelStore(path)
    assert str(caught.value) == f"{path}: not found; run `samfed precompute-sam` first"


def test_a_store_of_another_kind(tmp_path: Path, path: Path) -> None:
    images = tmp_path / "x.zarr"
    write_image_store(images, ["a"], [(pictures(1)[0], None)], size=SIZE, num_classes=1)
    with pytest.raises(CorruptStoreError, match="not a store of labels; remove it and rerun"):
        LabelStore(images)
    LabelStore.create(path, IDENTITY, keys(1))
    with pytest.raises(CorruptStoreError, match="not a store of images; remove it and rerun"):
        read_image_store(path, image_ids=["a"], size=SIZE, num_classes=1)


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


def test_nothing_is_written_any_more_once_a_store_could_not_be_made(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """zarr writes a folder's file beside that of its array: none may go on in a thread."""
    writers: list[str] = []

    def write(file: Path, content: bytes) -> None:
        writers.append(threading.current_thread().name)
        if file.parent.name == "masks":
            raise OSError(28, "No space left on device")
        write_bytes(file, content)

    monkeypatch.setattr("pipeline.stores.arrays.write_bytes", write)
    with pytest.raises(OSError, match="No space left"):
        LabelStore.create(path, IDENTITY, keys())
    assert writers == ["zarr_io", "zarr_io"]  # the loop itself, one after the other
    assert list(path.parent.iterdir()) == []
