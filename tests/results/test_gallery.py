"""Which test images a page shows, and that they come back as they were."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import CorruptStoreError, StageError
from pipeline.results.gallery import (
    MAX_CLIENTS,
    GalleryImage,
    choose,
    load_gallery,
    save_gallery,
)
from pipeline.results.scores import Score
from pipeline.segmentation.metrics import image_metrics


def chosen_of(*found: int, client: str = "a", side: int = 16) -> list[GalleryImage]:
    """Choose among images whose model finds so many of 8 true pixels; image i is grey i."""
    truths = np.zeros((len(found), side, side), np.uint8)
    truths[:, 0, :8] = 1
    predictions = np.zeros_like(truths)
    for row, count in enumerate(found):
        predictions[row, 0, :count] = 1
    pairs = zip(predictions, truths, strict=True)
    metrics = [image_metrics(*pair, num_classes=1) for pair in pairs]
    scores = [Score(client, f"i{number}", "g", each) for number, each in enumerate(metrics)]
    images = np.stack([np.full((side, side, 3), i, np.uint8) for i in range(len(found))])
    return choose(scores, images, truths, predictions)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ((3, 8, 0, 5, 6), [("worst", "i2"), ("median", "i3"), ("best", "i1")]),
        ((4, 2), [("worst", "i1"), ("best", "i0")]),
        ((4,), [("worst", "i0")]),
    ],
)
def test_worst_median_and_best(found: tuple[int, ...], expected: list[tuple[str, str]]) -> None:
    shown = chosen_of(*found)
    assert [(each.rank, each.image_id) for each in shown] == expected
    for each in shown:
        number = int(each.image_id[1:])
        assert (each.image == number).all()
        assert each.prediction.sum() == found[number]
        assert each.dice == pytest.approx(2 * found[number] / (found[number] + 8))


def test_pictures_are_small_and_come_back(tmp_path: Path) -> None:
    path, shown = tmp_path / "gallery.safetensors", chosen_of(3, 8, 0, side=400)
    save_gallery(path, shown)
    assert path.stat().st_size < 3 * 5 * 160**2 + 4000
    for one, two in zip(shown, load_gallery(path), strict=True):
        assert one.image.shape == (160, 160, 3)
        for field in fields(GalleryImage):
            assert np.array_equal(getattr(one, field.name), getattr(two, field.name))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptStoreError, match="delete it and run `samfed evaluate`"):
        load_gallery(path)
    with pytest.raises(StageError, match="not found; run `samfed evaluate` first"):
        load_gallery(tmp_path / "none")


def test_of_many_clients_some_are_kept_the_worst_among_them(tmp_path: Path) -> None:
    shown = [each for i in range(40) for each in chosen_of(i % 8, 8, client=f"c{i:02d}", side=8)]
    save_gallery(tmp_path / "g", shown)
    kept = load_gallery(tmp_path / "g")
    assert len({each.client for each in kept}) == MAX_CLIENTS
    assert kept[0].client == "c00"
    assert {each.rank for each in kept} == {"worst", "best"}
