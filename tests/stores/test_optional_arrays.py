"""Arrays that a label store has where the settings ask for them, and stores that lack them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import IdentityError, StageError, StoreError
from pipeline.stores.arrays import read_store_file, rows_per_chunk
from pipeline.stores.integrity import check_store, forget_damaged
from pipeline.stores.label_store import Identity, LabelStore, RowKey, check_identity
from pipeline.stores.opening import open_label_store
from pipeline.stores.optional_arrays import (
    has_probabilities,
    read_probabilities,
    read_view_agreement,
)
from pipeline.stores.pseudo_labels import PseudoLabels, join

SIZE, CLASSES, COUNT = 8, 2, 70
ONE_VIEW = Identity(
    variant="vit_t",
    base_sha256="b" * 64,
    adapter_sha256="a" * 64,
    prompt="none",
    input_size=64,
    label_size=SIZE,
    num_classes=CLASSES,
)
VIEWS = ONE_VIEW.model_copy(update={"views": 4})
ARRAYS = ["masks", "confidences", "predicted_iou", "view_agreement", "probabilities"]


def keys(count: int = COUNT, start: int = 0) -> list[RowKey]:
    return [RowKey(f"{i:03d}", f"{i:064x}") for i in range(start, start + count)]


def labels_of(rows: Sequence[RowKey]) -> PseudoLabels:
    """Labels with all that can be asked for, which depend on the image alone."""
    parts = []
    for row in rows:
        rng = np.random.default_rng(int(row.sha256, 16))
        probabilities = rng.integers(0, 256, (1, CLASSES + 1, SIZE, SIZE), dtype=np.uint8)
        agreement = rng.random(1, dtype=np.float32)
        parts.append(
            PseudoLabels(
                masks=probabilities.argmax(axis=1).astype(np.uint8),
                confidences=probabilities.max(axis=1),
                predicted_iou=agreement / 2,
                view_agreement=agreement,
                probabilities=probabilities,
                flip_dice=agreement / 3,
            )
        )
    return join(parts)


def fill(store: LabelStore, chunks: Sequence[int] | None = None) -> LabelStore:
    for chunk in range(store.chunks) if chunks is None else chunks:
        rows = list(store.chunk_rows(chunk))
        store.write_chunk(chunk, rows, labels_of([store.rows[row] for row in rows]))
        store.mark_done(chunk, rows, [{"backend": "torch"}])
    return store


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sam" / "client.zarr"


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return tmp_path / "archive"


def test_identities_of_one_view_are_as_they_were() -> None:
    assert "views" not in ONE_VIEW.model_dump()
    assert ONE_VIEW.digest == "8a261f144c305e2e"
    assert VIEWS.model_dump()["views"] == 4
    assert VIEWS.digest != ONE_VIEW.digest
    assert Identity.model_validate(ONE_VIEW.model_dump()) == ONE_VIEW
    with pytest.raises(
        IdentityError, match=r"x\.zarr: views is 1, the run asks for 4; run `samfed"
    ):
        check_identity(Path("x.zarr"), ONE_VIEW, VIEWS)


@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("identity", [ONE_VIEW, VIEWS], ids=["one view", "views"])
def test_a_store_has_the_arrays_that_were_asked_for(
    path: Path, identity: Identity, probabilities: bool
) -> None:
    store = fill(LabelStore.create(path, identity, keys(), probabilities=probabilities))
    asked = [ARRAYS[3]] * (identity.views > 1) + [ARRAYS[4]] * probabilities
    assert [*store.arrays] == ARRAYS[:3] + asked
    assert read_store_file(path)["format"] == 2
    expected = labels_of(keys())
    found = LabelStore(path).read_chunk(1)
    for name in ARRAYS:
        value = getattr(found, name)
        if name in store.arrays:
            assert np.array_equal(value, getattr(expected, name)[64:])
        else:
            assert value is None
    assert store.read().probabilities is None  # only where they are asked for
    agreement = read_view_agreement(path)
    assert agreement.dtype == np.float32
    assert len(agreement) == COUNT
    if identity.views > 1:
        assert np.array_equal(agreement, expected.view_agreement)
    else:
        assert np.isnan(agreement).all()
    if probabilities:
        assert expected.probabilities is not None
        part = read_probabilities(path, range(3, 66))
        assert (part.dtype, part.shape) == (np.float32, (63, CLASSES + 1, SIZE, SIZE))
        assert np.array_equal((part * 255).round(), expected.probabilities[3:66])
    else:
        with pytest.raises(StageError, match=r"no class probabilities; .*probabilities=true"):
            read_probabilities(path, range(1))


def test_every_array_is_checked_and_forgotten_with_its_chunk(path: Path) -> None:
    store = fill(LabelStore.create(path, VIEWS, keys(), probabilities=True))
    assert check_store(path) == []
    for name in ARRAYS:
        file = path / store.chunk_files(1)[name]
        before = file.read_bytes()
        file.write_bytes(before[:-3] + bytes([before[-3] ^ 8]) + before[-2:])
        (fault,) = check_store(path)
        assert (fault.what, fault.rows, fault.reason) == (name, range(64, COUNT), "damaged")
        file.unlink()
        assert [each.reason for each in check_store(path)] == ["missing"]
        file.write_bytes(before)
    (path / store.chunk_files(0)["probabilities"]).unlink()
    forget_damaged(path, check_store(path), keys())
    assert not any((path / file).exists() for file in store.chunk_files(0).values())
    assert store.pending() == [0]
    with pytest.raises(StageError, match="6 of 70 rows are labelled"):
        read_view_agreement(path)
    fill(store, [0])
    assert check_store(path) == []


def test_a_chunk_with_probabilities_stays_within_its_bytes(path: Path) -> None:
    large = ONE_VIEW.model_copy(update={"label_size": 512, "num_classes": 3})
    assert LabelStore.create(path, large, keys()).rows_per_chunk == 64
    other = LabelStore.create(path.with_name("b.zarr"), large, keys(), probabilities=True)
    assert other.rows_per_chunk == rows_per_chunk(4 * 512 * 512) == 16


def test_labels_that_lack_what_the_store_has(path: Path) -> None:
    store = LabelStore.create(path, VIEWS, keys(2))
    bare = PseudoLabels(**{name: getattr(labels_of(keys(2)), name) for name in ARRAYS[:3]})
    with pytest.raises(StoreError, match="has the array view_agreement, which these labels lack"):
        store.write_chunk(0, [0, 1], bare)


# --------------------------------------------------------------------------- opening


def test_labels_without_probabilities_are_moved_aside_where_they_are_asked_for(
    path: Path, archive: Path
) -> None:
    fill(LabelStore.create(path, VIEWS, keys()))
    store, notice = open_label_store(path, VIEWS, keys(), archive=archive, probabilities=True)
    assert notice == (
        f"{path}: has no class probabilities, the run asks for them; moved the old labels to "
        f"{archive / VIEWS.digest}.zarr"
    )
    assert has_probabilities(store)
    assert len(store.pending()) == 2
    fill(store)
    # once they are there, they may stay
    again, notice = open_label_store(path, VIEWS, keys(), archive=archive)
    assert (notice, again.pending(), has_probabilities(again)) == (None, [], True)


def test_what_comes_back_from_the_archive_has_what_is_asked_for(path: Path, archive: Path) -> None:
    fill(LabelStore.create(archive / f"{VIEWS.digest}.zarr", VIEWS, keys()))
    kept = archive / f"{VIEWS.digest}-2.zarr"
    fill(LabelStore.create(kept, VIEWS, keys(), probabilities=True), [0])
    store, notice = open_label_store(path, VIEWS, keys(), archive=archive, probabilities=True)
    assert notice == f"took back labels made earlier from {kept}"
    assert store.pending() == [1]
    path.rename(kept)
    store, notice = open_label_store(path, VIEWS, keys(), archive=archive)
    assert notice == f"took back labels made earlier from {archive / VIEWS.digest}.zarr"
    assert store.pending() == []


def test_rows_to_come_of_a_store_with_probabilities_need_them(path: Path, archive: Path) -> None:
    fill(LabelStore.create(path, VIEWS, keys(), probabilities=True), [0])
    with pytest.raises(IdentityError) as caught:
        open_label_store(path, VIEWS, keys(), archive=archive)
    assert str(caught.value) == (
        f"{path}: keeps the probabilities of every class, and 6 of its rows are still to come; "
        "set precompute.probabilities to true until they are there"
    )
    assert LabelStore(path).pending() == [1]


def test_images_that_come_and_go_keep_all_arrays(path: Path, archive: Path) -> None:
    fill(LabelStore.create(path, VIEWS, keys(), probabilities=True))
    other = keys(30, start=50)  # 20 of them are there
    store, _ = open_label_store(path, VIEWS, other, archive=archive, probabilities=True)
    assert int(store.done().sum()) == 20
    found, expected = store.read_chunk(0), labels_of(other)
    for name in ARRAYS:
        assert np.array_equal(getattr(found, name)[:20], getattr(expected, name)[:20])
