"""What labels say of the teacher without truth: numbers by hand, and when to doubt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_config
from numpy.typing import NDArray
from teachers import FakeTeacher, content, run, write_noise

from pipeline.config import AugmentConfig, Config, PrecomputeConfig
from pipeline.data.images import read_image
from pipeline.data.partition import load_partition
from pipeline.data.prepare import prepare
from pipeline.labelling.quality import (
    FLIPPED_IMAGES,
    flip_sample,
    label_doubts,
    measure,
    statistics,
    statistics_table,
)
from pipeline.stores.label_store import LabelStore, RowKey, RowQuality
from pipeline.stores.pseudo_labels import PseudoLabels

SIZE = 16
FAIR: dict[str, Any] = {
    "images": 40,
    "confidence": 0.9,
    "foreground_confidence": 0.8,
    "area": 0.25,
    "area_std": 0.125,
    "empty": 0.5,
    "predicted_iou": 0.75,
    "flips": 16,
    "flip_dice": 0.7,
}


def left_halves(count: int) -> PseudoLabels:
    """Labels of class 2 in the left half, at 204/255 there; every fourth is empty."""
    masks = np.zeros((count, SIZE, SIZE), np.uint8)
    masks[:, :, : SIZE // 2] = 2
    masks[::4] = 0
    confidences = np.where(masks > 0, 204, 255).astype(np.uint8)
    return PseudoLabels(masks, confidences, np.linspace(0, 1, count, dtype=np.float32))


def test_statistics_by_hand() -> None:
    """A quarter of 80 images is empty, the others are half foreground at 204/255."""
    labels = left_halves(80)
    mirrored = {row: labels.masks[row][:, ::-1] for row in range(5)}
    background = 511 / 512  # 255, clipped
    share = 0.75 * 0.5
    assert statistics(measure(labels, mirrored)) == {
        "images": 80,
        "confidence": pytest.approx(share * 0.8 + (1 - share) * background, abs=1e-6),
        "foreground_confidence": pytest.approx(0.8, abs=1e-6),
        "area": pytest.approx(share),
        "area_std": pytest.approx(np.sqrt(0.75 * 0.25 - share**2)),
        "empty": 0.25,
        "predicted_iou": pytest.approx(0.5, abs=1e-6),
        "flips": 5,
        "flip_dice": 1.0,
    }


def test_a_teacher_that_loses_what_is_mirrored() -> None:
    """Of four mirrored images three had an object, which is lost (Dice 0); one is empty either
    way (Dice 1)."""
    nothing = np.zeros((SIZE, SIZE), np.uint8)
    quality = measure(left_halves(8), dict.fromkeys(range(4), nothing))
    assert [row.flip_dice for row in quality] == [1, 0, 0, 0, None, None, None, None]
    assert statistics(quality) is not None
    assert (statistics(quality) or {})["flip_dice"] == 0.25


def test_foreground_counts_by_its_pixels() -> None:
    rows = [RowQuality(0.9, 0.9, 0.3, 0.5, None), RowQuality(0.9, 0.5, 0.1, 0.5, None)]
    assert (statistics(rows) or {})["foreground_confidence"] == pytest.approx(0.8)


def test_no_foreground_anywhere_and_nothing_mirrored() -> None:
    found = statistics(measure(left_halves(1), {})) or {}
    assert (found["foreground_confidence"], found["flip_dice"]) == (None, None)
    assert (found["empty"], found["area"], found["flips"]) == (1, 0, 0)
    assert statistics_table({"a": found}).split()[-1] == "-"
    strict = Config(precompute=PrecomputeConfig(warn_consistency=1, warn_empty=1))
    assert label_doubts({"a": found}, strict) == []


def test_a_row_that_was_never_measured() -> None:
    assert statistics([*measure(left_halves(3), {}), None]) is None


def test_the_sample_is_the_images_own() -> None:
    """It does not depend on their order, and mostly stays when images come or go."""
    keys = [RowKey(str(i), f"{i * 7919 % 97:064x}") for i in range(90)]
    chosen = {keys[row] for row in flip_sample(keys)}
    assert len(chosen) == FLIPPED_IMAGES
    assert {keys[::-1][row] for row in flip_sample(keys[::-1])} == chosen
    assert len(chosen & {keys[:80][row] for row in flip_sample(keys[:80])}) > FLIPPED_IMAGES / 2
    assert flip_sample(keys[:3]) == {0, 1, 2}


def test_warnings_name_the_client() -> None:
    config = Config()
    assert label_doubts({"site_b": FAIR}, config) == []  # on the limit is not below it
    poor = FAIR | {"flip_dice": 0.52, "empty": 0.6}
    owners = {"site_a": poor | {"empty": 0.0}, "site_b": poor, "site_c": FAIR}
    assert [doubt.text for doubt in label_doubts(owners, config)] == [
        "SAM contradicts itself: its labels of mirrored images match those of the images with a "
        "Dice below precompute.warn_consistency 0.7: site_a (0.52), site_b (0.52); look at SAM's "
        "labels there with `samfed cache show`",
        "SAM finds nothing in more images than precompute.warn_empty 0.5: site_b (60% of 40); look "
        "at SAM's labels there with `samfed cache show`",
    ]


def test_mirror_images_say_nothing_of_a_teacher_that_never_saw_any() -> None:
    poor = FAIR | {"flip_dice": 0.52}
    for flips, count in (("none", 0), ("horizontal", 1), ("both", 1)):
        config = Config(augment=AugmentConfig(flips=flips))
        assert len(label_doubts({"site_b": poor}, config)) == count


def test_the_table() -> None:
    heading, line = statistics_table({"site_b": FAIR}).splitlines()
    assert heading.split() == (
        ["images", "confidence", "foreground", "area", "empty", "pred.", "IoU", "flip", "Dice"]
    )
    assert line.split() == (
        ["site_b", "40", "0.900", "0.800", "25.0%", "±", "12.5%", "50%", "0.750", "0.700"]
    )


# --------------------------------------------------------------------------- in stage one


class OneSided(FakeTeacher):
    """Sees nothing left of the middle; notes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def label(self, images: Any, size: int) -> PseudoLabels:
        assert all(image.flags.c_contiguous for image in images)
        self.sizes.append(len(images))
        labels = super().label(images, size)
        labels.masks[:, :, : size // 2] = 0
        return labels


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("noise") / "data"
    write_noise(folder, count=80, size=32)
    return folder


def settings(noise: Path, cache: Path, **precompute: Any) -> Config:
    config = tiny_config(
        noise,
        cache,
        partition={"val_fraction": 0.02, "test_fraction": 0.02},
        precompute={"batch_size": 64, **precompute},
        data={"image_size": 32},
    )
    prepare(config)
    return config


def brute_force(config: Config, owner: str, images: list[NDArray[np.uint8]]) -> float:
    """The mean Dice of one owner's sample, from its images and stored labels."""
    store = LabelStore(config.cache.root / "sam" / f"{owner}.zarr")
    stored, dice = store.read().masks, []
    for row in flip_sample(store.rows):
        again = OneSided().label([np.ascontiguousarray(images[row][:, ::-1])], 32).masks[0]
        a, b = again[:, ::-1] > 0, stored[row] > 0
        dice.append(2 * (a & b).sum() / (a.sum() + b.sum()))
    return float(np.mean(dice))


def test_stage_one_mirrors_a_sample_and_keeps_what_it_finds(
    noise: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In one batch beside each batch of labels; a second run reads it from the store."""
    config = settings(noise, tmp_path / "cache", warn_consistency=1)
    teacher = OneSided()
    first = run(config, teacher, mirrors=True)
    partition = load_partition(config.cache.root / "partition.json")
    count = len(partition.clients["site"].train)
    server = len(partition.server.calibration)
    assert teacher.sizes[:2] == [server, server]
    assert sum(teacher.sizes) == 2 * server + count + FLIPPED_IMAGES
    names = [partition.images[i].image for i in partition.clients["site"].train]
    images = [read_image(noise / name).pixels for name in names]
    assert first.statistics["site"]["flips"] == FLIPPED_IMAGES
    assert first.statistics["site"]["flip_dice"] == pytest.approx(
        brute_force(config, "site", images)
    )
    (line,) = first.warnings
    assert all(f" {owner} (" in line for owner in ("server", "site"))
    assert [record.getMessage() for record in caplog.records] == first.warnings
    before = content(config.cache.root / "sam")
    teacher = OneSided()
    again = run(config, teacher, mirrors=True)
    assert teacher.batches == 0
    assert (again.statistics, again.warnings) == (first.statistics, first.warnings)
    assert content(config.cache.root / "sam") == before


def test_labels_do_not_depend_on_the_mirrors(noise: Path, tmp_path: Path) -> None:
    found = []
    for mirrors in (True, False):
        config = settings(noise, tmp_path / str(mirrors))
        result = run(config, OneSided(), mirrors=mirrors)
        assert (result.statistics["site"]["flips"] > 0) == mirrors
        found.append(content(config.cache.root / "sam"))
    assert found[0].keys() == found[1].keys()
    differs = {name for name in found[0] if found[0][name] != found[1][name]}
    assert all("/chunks/" in name for name in differs)


def test_the_order_of_the_table_is_that_of_the_clients(tiny_images: Path, tmp_path: Path) -> None:
    """Also where one is finished before another that comes first."""
    config = tiny_config(tiny_images, tmp_path / "cache")
    prepare(config)
    result = run(config, FakeTeacher())
    assert list(result.statistics) == ["server", "site_a", "site_b", "site_c", "site_d"]
