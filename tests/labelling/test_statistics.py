"""What a finished store says of the teacher without truth: numbers by hand, and when to doubt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_config
from numpy.typing import NDArray
from teachers import STATISTICS, FakeTeacher, content, run

from pipeline.config import PrecomputeConfig
from pipeline.data.prepare import prepare
from pipeline.labelling.quality import (
    FLIPPED_IMAGES,
    measure,
    quality_warnings,
    statistics_table,
)
from pipeline.stores.label_store import Identity, LabelStore, PseudoLabels, RowKey
from pipeline.stores.opening import open_label_store

SIZE = 16
IDENTITY = Identity(
    variant="fake",
    base_sha256="b" * 64,
    adapter_sha256="a" * 64,
    prompt="none",
    input_size=64,
    label_size=SIZE,
    num_classes=2,
)
Image = NDArray[np.uint8]


def rows(count: int) -> list[RowKey]:
    return [RowKey(f"image_{i:03d}", f"{i:064x}") for i in range(count)]


def image_of(key: RowKey) -> Image:
    """An image whose label is its left half, or nothing for every fourth."""
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    if int(key.sha256, 16) % 4:
        image[:, : SIZE // 2] = 200
    return image


class Thresholds:
    """Labels what is bright as class 2; ``blind`` to what lies left of the middle."""

    def __init__(self, *, blind: bool = False) -> None:
        self.blind, self.sizes = blind, list[int]()

    def label(self, images: Sequence[Image], size: int) -> PseudoLabels:
        assert size == SIZE
        assert all(image.flags.c_contiguous for image in images)
        self.sizes.append(len(images))
        masks = 2 * (np.stack(images)[..., 0] > 100).astype(np.uint8)
        if self.blind:
            masks[:, :, : SIZE // 2] = 0
        confidences = np.where(masks > 0, 204, 255).astype(np.uint8)
        return PseudoLabels(masks, confidences, np.linspace(0, 1, len(masks), dtype=np.float32))


def finished(path: Path, count: int) -> LabelStore:
    store = LabelStore.create(path, IDENTITY, rows(count))
    for shard in range(store.chunks):
        inside = store.chunk_rows(shard)
        labels = Thresholds().label([image_of(store.rows[i]) for i in inside], SIZE)
        store.write_chunk(shard, list(inside), labels)
        store.mark_done(shard, list(inside), [{"backend": "fake"}])
    return store


def test_statistics_by_hand(tmp_path: Path) -> None:
    """80 images, two shards: a quarter is empty, the others are half foreground at 204/255."""
    statistics = measure(finished(tmp_path / "a.zarr", 80), Thresholds(), image_of, batch_size=5)
    background = 511 / 512  # 255, clipped
    share = 0.75 * 0.5
    predicted_iou = np.concatenate([np.linspace(0, 1, 64), np.linspace(0, 1, 16)])
    assert statistics == {
        "images": 80,
        "confidence": pytest.approx(share * 0.8 + (1 - share) * background, abs=1e-6),
        "foreground_confidence": pytest.approx(0.8, abs=1e-6),
        "area": pytest.approx(share),
        "area_std": pytest.approx(np.sqrt(0.75 * 0.25 - share**2)),
        "empty": 0.25,
        "predicted_iou": pytest.approx(predicted_iou.mean(), abs=1e-6),
        "flips": 16,
        "flip_dice": 1.0,
    }


def test_a_teacher_that_sees_one_side_contradicts_itself(tmp_path: Path) -> None:
    """Mirrored, the object lies on the right: a teacher blind to the left still finds it, and
    mirrored back it is where it was. Blind to the right of the mirrored image, it finds none."""
    store = finished(tmp_path / "a.zarr", 8)
    teacher = Thresholds(blind=True)
    assert measure(store, teacher, image_of, batch_size=3)["flip_dice"] == 1.0
    assert teacher.sizes == [3, 3, 2]

    def mirrored(key: RowKey) -> Image:
        return np.ascontiguousarray(image_of(key)[:, ::-1])

    # two of eight images are empty either way (Dice 1), in six the label is lost (Dice 0)
    found = measure(store, Thresholds(blind=True), mirrored, batch_size=8)
    assert (found["flips"], found["flip_dice"]) == (8, 0.25)


def test_no_foreground_anywhere(tmp_path: Path) -> None:
    store = LabelStore.create(tmp_path / "a.zarr", IDENTITY, rows(4)[:1])
    blank = np.zeros((1, SIZE, SIZE), np.uint8)
    store.write_chunk(0, [0], PseudoLabels(blank, blank + 128, np.zeros(1, np.float32)))
    store.mark_done(0, [0], [])
    statistics = measure(store, Thresholds(), image_of, batch_size=1)
    assert statistics["foreground_confidence"] is None
    assert (statistics["empty"], statistics["area"], statistics["flip_dice"]) == (1, 0, 1)
    assert " - " in statistics_table({"a": statistics})


def keep_statistics(store: LabelStore) -> dict[str, Any]:
    found = measure(store, Thresholds(), image_of, batch_size=8)
    store.set_statistics(found)
    return found


def test_kept_with_the_labels(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    teacher = Thresholds()
    store = finished(path, 20)
    assert store.statistics is None
    found = measure(store, teacher, image_of, batch_size=8)
    assert teacher.sizes == [8, 8]  # FLIPPED_IMAGES of the 20
    store.set_statistics(found)
    again = LabelStore(path)
    assert again.statistics == found
    assert again.read().masks.any()


def test_statistics_go_when_the_labels_change(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    store = finished(path, 20)
    whole = content(path)
    keep_statistics(store)
    labels = Thresholds().label([image_of(key) for key in store.rows], SIZE)
    store.forget_chunk(0, store.rows)
    store.write_chunk(0, list(range(20)), labels)
    store.mark_done(0, list(range(20)), [{"backend": "fake"}])
    assert store.statistics is None
    assert content(path) == whole
    keep_statistics(store)
    fewer, _ = open_label_store(path, IDENTITY, rows(12), archive=tmp_path / "archive")
    assert fewer.done().all()
    assert fewer.statistics is None
    assert keep_statistics(fewer)["images"] == 12


def statistics(**changes: Any) -> dict[str, Any]:
    return STATISTICS | changes


def test_warnings_name_the_client() -> None:
    config = PrecomputeConfig()
    assert quality_warnings("site_b", statistics(), config) == []  # on the floor is not below it
    assert quality_warnings("site_b", statistics(flip_dice=0.52, empty=0.6), config) == [
        "site_b: SAM contradicts itself: the labels of 16 mirrored images match its own with Dice "
        "0.52, below precompute.warn_consistency 0.7; look at them before you trust them",
        "site_b: SAM finds nothing in 60% of 40 images, above precompute.warn_empty 0.5; look at "
        "them before you trust its labels",
    ]


def test_the_table() -> None:
    heading, line = statistics_table({"site_b": statistics()}).splitlines()
    assert heading.split() == (
        ["images", "confidence", "foreground", "area", "empty", "pred.", "IoU", "flip", "Dice"]
    )
    assert line.split() == (
        ["site_b", "40", "0.900", "0.800", "25.0%", "±", "12.5%", "50%", "0.750", "0.700"]
    )


def test_a_stop_during_the_check_changes_no_byte(tiny_images: Path, tmp_path: Path) -> None:
    """Five owners, each a batch to label, then a batch to mirror: stop at the third mirror."""

    def interrupt(batch: int) -> None:
        if batch == 5:
            raise KeyboardInterrupt

    whole, stopped = (
        tiny_config(tiny_images, tmp_path / name, precompute={"batch_size": 8})
        for name in ("whole", "stopped")
    )
    for config in (whole, stopped):
        prepare(config)
    run(whole, FakeTeacher())
    with pytest.raises(KeyboardInterrupt):
        run(stopped, FakeTeacher(interrupt))
    stores = [LabelStore(path) for path in sorted((tmp_path / "stopped" / "sam").glob("*.zarr"))]
    assert [bool(store.done().all()) for store in stores] == [True, True, True, False, False]
    assert [store.statistics is not None for store in stores] == [True, True, False, False, False]
    run(stopped, FakeTeacher())
    assert content(tmp_path / "stopped" / "sam") == content(tmp_path / "whole" / "sam")


def test_an_image_that_is_gone_leaves_the_labels_unchecked(
    tiny_images: Path, tmp_path: Path
) -> None:
    config = tiny_config(tiny_images, tmp_path / "cache")
    prepare(config)
    run(config, FakeTeacher())
    store = LabelStore(tmp_path / "cache" / "sam" / "site_b.zarr")
    store.set_statistics(None)  # as a store made before there were any
    moved = tiny_config(tmp_path / "nowhere", tmp_path / "cache")
    result = run(moved, FakeTeacher())
    assert len(result.warnings) == 1
    assert result.warnings[0].startswith("site_b: the labels were not checked: ")
    assert str(tmp_path / "nowhere") in result.warnings[0]
    assert sorted(result.statistics) == ["server", "site_a", "site_c", "site_d"]


def test_stage_one_warns_and_measures_once(
    tiny_images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The fake teacher labels a corner, which mirroring moves: it contradicts itself."""
    floors = {"warn_consistency": 0.99, "warn_empty": 1}
    config = tiny_config(tiny_images, tmp_path / "cache", precompute=floors)
    prepare(config)
    first = run(config, FakeTeacher())
    assert sorted(first.statistics) == ["server", "site_a", "site_b", "site_c", "site_d"]
    doubted = [owner for owner, found in first.statistics.items() if found["flip_dice"] < 0.99]
    assert doubted
    assert [line.split(":")[0] for line in first.warnings] == doubted
    assert [record.getMessage() for record in caplog.records] == first.warnings
    before = content(tmp_path / "cache" / "sam")
    teacher = FakeTeacher()
    again = run(config, teacher)
    assert teacher.batches == 0
    assert (again.statistics, again.warnings) == (first.statistics, first.warnings)
    assert content(tmp_path / "cache" / "sam") == before
    store = LabelStore(tmp_path / "cache" / "sam" / "site_a.zarr")
    assert store.statistics == first.statistics["site_a"]
    assert first.statistics["site_a"]["flips"] == min(FLIPPED_IMAGES, len(store))
