"""What ``samfed prepare`` says of images and masks before anything is trained on them."""

from __future__ import annotations

import logging
import resource
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_config
from numpy.typing import NDArray
from PIL import Image

from pipeline.config import Config
from pipeline.data.prepare import prepare
from pipeline.data.survey import Seen, Survey
from pipeline.disk import file_sha256
from pipeline.errors import DataError

SIZE = 16
REQUEST = {"server_images": 4, "server_site": None, "calibration_min": 2}


def save(
    root: Path, kind: str, image_id: str, values: NDArray[np.uint8], **options: object
) -> None:
    (root / kind).mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(root / kind / f"{image_id}.png", **options)  # type: ignore[arg-type]


def part(rows: int) -> NDArray[np.uint8]:
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[:rows] = 255
    return mask


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two sites of ten images: north's masks cover 1/8 to 10/16 of them, south's are few."""
    rng = np.random.default_rng(0)
    rows = ["image_id,site"]
    for site in ("north", "south"):
        for i in range(10):
            name = f"{site}{i}"
            rows.append(f"{name},{site}")
            save(tmp_path / "data", "images", name, rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8))
            if site == "north":
                save(tmp_path / "data", "masks", name, part(2 if i < 5 else 4 if i < 9 else 10))
    (tmp_path / "data" / "sites.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "data"


def settings(root: Path) -> Config:
    data, partition = {"image_size": SIZE}, REQUEST | {"test_fraction": 0, "val_fraction": 0}
    return tiny_config(root, root.parent / "cache", data=data, partition=partition)


def test_prepare_reports_masks_by_site(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.fromarray(part(2)).convert("L").save(root / "masks" / "north0.png")
    result = prepare(settings(root))
    assert result.as_json()["data.root"]["sites"] == {
        "north": {
            "images": 10,
            "masks": 10,
            "foreground": {"median": 0.1875, "min": 0.125, "max": 0.625},
            "empty": 0,
            "over_half": 1,
        },
        "south": {"images": 10, "masks": 0, "foreground": None, "empty": 0, "over_half": 0},
    }
    assert result.text().splitlines()[1:3] == [
        "north: 10 images, 10 masks, foreground 18.8% (median; 12.5% to 62.5%), 0 empty, 1 over "
        "half of the image",
        "south: 10 images, 0 masks",
    ]
    assert result.as_json()["data.root"]["mask_decisions"] == {}
    assert "orientation" not in caplog.text


def test_prepare_says_how_many_masks_were_decided(root: Path) -> None:
    for name in ("north0", "north1"):
        palette = Image.fromarray((part(2) == 0).astype(np.uint8)).convert("P")
        palette.putpalette([255, 255, 255, 0, 0, 0])
        palette.save(root / "masks" / f"{name}.png")
    smooth = part(2)
    smooth[2] = 90
    save(root, "masks", "north2", smooth)
    result = prepare(settings(root))
    decided = {"palette by colour": 2, "thresholded at half of the maximum": 1}
    assert result.as_json()["data.root"]["mask_decisions"] == decided
    assert result.text().splitlines()[3] == (
        "masks: 2 palette by colour, 1 thresholded at half of the maximum"
    )
    assert result.as_json()["data.root"]["sites"]["north"]["foreground"]["min"] == 0.125


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (0, "all 10 masks are empty; look at one: is its foreground really 0?"),
        (16, "all 10 masks cover over 95 % of their images; look at one: are foreground and"),
    ],
)
def test_masks_that_all_show_nothing_are_a_warning(
    root: Path, caplog: pytest.LogCaptureFixture, rows: int, expected: str
) -> None:
    for i in range(10):
        save(root, "masks", f"north{i}", part(rows))
    with caplog.at_level(logging.WARNING, "samfed"):
        prepare(settings(root))
    assert [m.split(":")[0] for m in caplog.messages] == ["site 'north'", "the server's set"]
    assert expected in caplog.messages[0]
    assert expected.replace("10", "4") in caplog.messages[1]


def test_orientation_that_a_mask_lacks_is_a_warning(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    noise = np.random.default_rng(1).integers(0, 256, (2, SIZE, SIZE, 3), np.uint8)
    save(root, "images", "north4", noise[0], exif=exif)
    save(root, "images", "south4", noise[1], exif=exif)  # without a mask nothing can differ
    with caplog.at_level(logging.WARNING, "samfed"):
        prepare(settings(root))
    assert caplog.messages == [
        "1 images have another EXIF orientation than their masks (images/north4.png: 3, its mask: "
        "1) at equal sizes: a mask drawn on the stored pixels is upside down or mirrored; look at "
        "one, and save such images upright and without orientation"
    ]


def test_the_same_orientation_on_both_is_none(caplog: pytest.LogCaptureFixture) -> None:
    both = Seen("a", "images/x.png", foreground=0.2, orientation=3, mask_orientation=3)
    with caplog.at_level(logging.WARNING, "samfed"):
        Survey({"x": both}).warn(["x"])
    assert caplog.messages == []


def test_prepare_reads_every_file_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    original = Path.read_bytes

    def count(self: Path) -> bytes:
        read.append(self)
        return original(self)

    monkeypatch.setattr(Path, "read_bytes", count)
    partition = prepare(settings(root)).partition
    files = sorted(path for kind in ("images", "masks") for path in (root / kind).iterdir())
    assert sorted(path for path in read if path.parent.parent == root) == files
    monkeypatch.undo()
    for entry in partition.images.values():
        assert file_sha256(root / entry.image) == entry.image_sha256


def test_the_first_bad_file_is_named_and_leaves_nothing(root: Path) -> None:
    for name in ("north3", "north1", "south9"):
        (root / "images" / f"{name}.png").write_bytes(b"nothing")
    with pytest.raises(DataError) as caught:
        prepare(settings(root))
    assert str(caught.value).startswith(f"{root}/images/north1.png: ")
    assert not (root.parent / "cache").exists()


def test_a_full_disk_names_the_cache_and_leaves_nothing(root: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * SIZE**2 * 19, hard))  # of twenty frames
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            prepare(settings(root))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename == str(root.parent / "cache")
    left = [path for path in (root.parent / "cache").rglob("*") if path.is_file()]
    assert [path.name for path in left] == ["prepare.lock"]
