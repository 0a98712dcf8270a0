"""The embedded dataset: deterministic, exact masks, whole or absent."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.data import synthetic
from pipeline.data.synthetic import SITE_NAMES, write_dataset
from pipeline.errors import ConfigError, DataError
from pipeline.params import load_config


def make(out: Path, *, images_per_site: int = 3, seed: int = 5) -> dict[str, bytes]:
    """Write a tiny dataset; returns every file's bytes by its path inside ``out``."""
    write_dataset(out, images_per_site=images_per_site, size_px=48, seed=seed)
    files = (path for path in out.rglob("*") if path.is_file())
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset that tests only read."""
    out = tmp_path_factory.mktemp("synthetic") / "data"
    make(out)
    return out


def read_rows(out: Path) -> list[dict[str, str]]:
    with (out / "sites.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_same_seed_same_bytes_and_another_seed_differs(tmp_path: Path) -> None:
    first = make(tmp_path / "first")
    assert first == make(tmp_path / "second")
    assert first == make(tmp_path / "first"), "replacing a dataset changes nothing"
    other = make(tmp_path / "other", seed=6)
    assert other.keys() == first.keys()
    assert all(first[name] != other[name] for name in first if name.endswith(".png"))


def test_more_images_keep_the_earlier_ones(tmp_path: Path) -> None:
    few, more = make(tmp_path / "few", images_per_site=2), make(tmp_path / "more")
    assert {name: more[name] for name in few if name.endswith(".png")} == {
        name: few[name] for name in few if name.endswith(".png")
    }
    rows = read_rows(tmp_path / "more")
    assert all(row in rows for row in read_rows(tmp_path / "few"))


def test_images_masks_and_table_agree(tmp_path: Path) -> None:
    make(tmp_path / "data")
    rows = read_rows(tmp_path / "data")
    assert [row["site"] for row in rows] == [name for name in SITE_NAMES for _ in range(3)]
    for row in rows:
        name = f"{row['image_id']}.png"
        with Image.open(tmp_path / "data" / "images" / name) as image:
            assert (image.mode, image.height) == ("RGB", 48)
            size_wh = image.size
        with Image.open(tmp_path / "data" / "masks" / name) as picture:
            assert (picture.mode, picture.size) == ("L", size_wh)
            mask = np.asarray(picture)
        assert set(np.unique(mask)) == {0, 255}
        assert 0.03 < (mask > 0).mean() < 0.41
    assert rows[0]["image_id"] == "site_a_0001"


@pytest.mark.parametrize(
    ("site", "mean_rgb", "lesion_px"),
    [
        ("site_a", (160.81, 94.20, 84.80), 707),
        ("site_b", (155.12, 69.48, 43.17), 1004),
        ("site_c", (105.06, 94.19, 94.77), 217),
        ("site_d", (240.85, 185.81, 193.58), 442),
    ],
)
def test_images_of_this_version_are_as_they_were(
    shared: Path, site: str, mean_rgb: tuple[float, ...], lesion_px: int
) -> None:
    """Any other order of draws would show; another build of numpy may round a few pixels."""
    assert synthetic.GENERATOR_VERSION == 1, "a new version has new numbers here"
    with Image.open(shared / "images" / f"{site}_0003.png") as image:
        assert np.asarray(image).mean((0, 1)) == pytest.approx(mean_rgb, abs=0.2)
    with Image.open(shared / "masks" / f"{site}_0003.png") as mask:
        assert (np.asarray(mask) > 0).sum() == pytest.approx(lesion_px, abs=2)


def test_sites_differ_in_aspect_and_groups_never_span_sites(tmp_path: Path) -> None:
    make(tmp_path / "data", images_per_site=6)
    rows = read_rows(tmp_path / "data")
    sites_of: dict[str, set[str]] = {}
    for row in rows:
        sites_of.setdefault(row["group"], set()).add(row["site"])
    assert all(len(sites) == 1 for sites in sites_of.values())
    sizes = [sum(row["group"] == group for row in rows) for group in sites_of]
    assert set(sizes) <= {1, 2, 3}
    assert max(sizes) > 1, "no patient has two images: groups would not be exercised"
    with Image.open(tmp_path / "data" / "images" / "site_d_0001.png") as image:
        assert image.size == (64, 48)


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("photo.jpg", "mine", "a folder without a synthetic.json of samfed's"),
        ("synthetic.json", "not json", "a folder without a synthetic.json of samfed's"),
        ("synthetic.json", '{"generator": "x"}', "a folder without a synthetic.json of samfed's"),
    ],
)
def test_a_users_folder_is_refused(tmp_path: Path, name: str, content: str, found: str) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / name).write_text(content)
    expected = (
        f"{out}: found {found}, expected no such path, an empty folder or an earlier synthetic "
        "dataset; move it away or choose another output folder"
    )
    with pytest.raises(DataError, match=f"^{re.escape(expected)}$"):
        make(out)
    assert [path.name for path in out.iterdir()] == [name]
    assert (out / name).read_text() == content


def test_a_users_file_is_refused_and_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match="found a file, expected"):
        make(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "sites.csv" in make(tmp_path / "empty", images_per_site=1)


@pytest.mark.parametrize("existed", [False, True])
def test_an_interrupted_write_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existed: bool
) -> None:
    out, save, calls = tmp_path / "data", Image.Image.save, iter(range(9))
    before = make(out, images_per_site=1) if existed else {}

    def interrupted(image: Image.Image, *args: Any, **options: Any) -> None:
        if next(calls) == 7:
            raise KeyboardInterrupt
        save(image, *args, **options)

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(out)
    assert [path.name for path in tmp_path.iterdir()] == (["data"] if existed else [])
    assert all((out / name).read_bytes() == content for name, content in before.items())


@pytest.mark.parametrize("value", ["images_per_site=0", "size_px=31", "seed=-1"])
def test_settings_out_of_range(value: str) -> None:
    with pytest.raises(ConfigError, match=r"^--set synth\.\w+: found -?\d+, expected "):
        load_config(None, (f"synth.{value}",))


def test_the_card_records_the_arguments(tmp_path: Path) -> None:
    card = json.loads(make(tmp_path / "data", images_per_site=1)["synthetic.json"])
    assert card == {
        "generator": "samfed.synthetic",
        "version": synthetic.GENERATOR_VERSION,
        "images_per_site": 1,
        "size_px": 48,
        "seed": 5,
    }
