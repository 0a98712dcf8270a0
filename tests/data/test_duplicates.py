"""An image that is there twice lies in one part; what looks alike is listed and changes nothing."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.config import Config
from pipeline.data.duplicates import close_pairs, find_duplicates, join_copies, perceptual_hash
from pipeline.data.partition import ImageEntry, Partition
from pipeline.data.prepare import prepare
from pipeline.errors import ConfigError


def entry(digest: int, group: str, site: str = "s") -> ImageEntry:
    return ImageEntry(image="images/x.png", site=site, group=group, image_sha256=f"{digest:064x}")


def groups(*members: tuple[int, str]) -> list[str]:
    """The groups of images with these digests after joining."""
    joined = join_copies({str(i): entry(*member) for i, member in enumerate(members)})
    return [each.group for each in joined.values()]


def test_groups_that_share_an_image_are_one() -> None:
    assert groups((1, "x"), (2, "x"), (2, "w"), (3, "w"), (3, "v"), (4, "u")) == ["v"] * 5 + ["u"]


def test_copies_within_a_group_change_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert groups((1, "x"), (1, "x"), (2, "y")) == ["x", "x", "y"]
    assert caplog.messages == []


@settings(max_examples=100, deadline=None, database=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 12), st.sampled_from("pqrstuvw")), min_size=1))
def test_joining_is_a_closure(images: list[tuple[int, str]]) -> None:
    before = {str(i): entry(*each) for i, each in enumerate(images)}
    after = join_copies(before)
    for key in ("image_sha256", "group"):  # what was together, and what is the same, is together
        found: dict[str, set[str]] = {}
        for image_id in before:
            found.setdefault(getattr(before[image_id], key), set()).add(after[image_id].group)
        assert all(len(names) == 1 for names in found.values())
    assert join_copies(after) == after
    assert {each.group for each in after.values()} <= {group for _, group in images}


# --------------------------------------------------------------------------- prepare


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty images of 16 pixels at two sites; the first ten of each site are the same."""
    rng, root = np.random.default_rng(0), tmp_path / "data"
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True)
    rows = ["image_id,site"]
    for i in range(20):
        pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        for site in ("north", "south"):
            name = f"{site}{i:02d}"
            if site == "south" and i >= 10:
                pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / f"{name}.png")
            Image.fromarray((pixels[:, :, 0] > 127).astype(np.uint8) * 255).save(
                root / "masks" / f"{name}.png"
            )
            rows.append(f"{name},{site}")
    (root / "sites.csv").write_text("\n".join(rows))
    return root


def request(folder: Path, cache: Path, **partition: Any) -> Config:
    drawn = {"server_images": 8, "server_site": "south", "calibration_min": 2} | partition
    return tiny_config(folder, cache, data={"image_size": 16}, partition=drawn)


def parts_of_copies(partition: Partition) -> set[int]:
    """In how many parts the ten images that are there twice lie."""
    place = {
        i: (owner, split)
        for owner in partition.owners
        for split, ids in partition.splits(owner).items()
        for i in ids
    }
    return {len({place[f"north{i:02d}"], place[f"south{i:02d}"]}) for i in range(10)}


def test_a_copy_cannot_leak(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    partition = prepare(request(folder, tmp_path / "cache")).partition
    assert parts_of_copies(partition) == {1}
    assert caplog.messages == [
        "10 images have the same bytes as one of another group, e.g. north00 and south00; 20 "
        "groups are joined to 10, the largest of 2 images, so that no copy lies in two parts; "
        "--allow-duplicates keeps the groups as they are"
    ]


def test_copies_are_named_where_they_are_allowed(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = request(folder, tmp_path / "cache")
    partition = prepare(config, allow_duplicates=True).partition
    assert 2 in parts_of_copies(partition)
    (message,) = caplog.messages
    assert " images lie in two parts under several names (same bytes), e.g. " in message
    caplog.clear()
    published = tmp_path / "published.json"
    shutil.copy(tmp_path / "cache" / "partition.json", published)
    again = prepare(request(folder, tmp_path / "again", file=str(published))).partition
    assert again == partition
    assert caplog.messages == [message]


# --------------------------------------------------------------------------- alike


def photograph(seed: int, size: int = 64) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)


def test_another_compression_is_alike_and_another_image_is_not(tmp_path: Path) -> None:
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    for seed in range(6):
        photograph(seed).save(root / "images" / f"i{seed}.png")
    photograph(2).save(root / "images" / "smaller.jpg", quality=70)
    shutil.copy(root / "images" / "i3.png", root / "images" / "copy.png")
    found = find_duplicates(tiny_config(root, tmp_path / "cache"), distance=4)
    assert [(p.first, p.second, p.same_bytes) for p in found.pairs] in (
        [("copy", "i3", True), ("i2", "smaller", False)],
        [("i2", "smaller", False), ("copy", "i3", True)],
    )
    assert found.text().startswith(
        "8 images: 2 pairs of different groups look alike (at most 4 of 64 bits differ), 0 of them "
        "in two parts\n"
    )
    assert "copy and i3: same bytes\n" in f"{found.text()}\n"
    assert json.loads(json.dumps(found.as_json()))["images"] == 8
    assert [path.name for path in tmp_path.iterdir()] == ["data"]  # nothing is written


def test_pairs_in_two_parts_come_first(folder: Path, tmp_path: Path) -> None:
    config = request(folder, tmp_path / "cache")
    prepare(config, allow_duplicates=True)
    pairs = find_duplicates(config, distance=0).pairs
    assert {(p.first[-2:], p.second[-2:]) for p in pairs} == {(f"{i:02d}",) * 2 for i in range(10)}
    apart = [p.parts is not None and p.parts[0] != p.parts[1] for p in pairs]
    assert apart == sorted(apart, reverse=True)
    assert apart[0]


def test_images_of_one_group_are_not_compared(folder: Path, tmp_path: Path) -> None:
    rows = [f"{path.stem},x,{path.stem[-2:]}" for path in (folder / "images").iterdir()]
    (folder / "sites.csv").write_text("\n".join(["image_id,site,group", *rows]))
    assert find_duplicates(request(folder, tmp_path / "cache"), distance=0).pairs == ()


@settings(max_examples=50, deadline=None, database=None, derandomize=True)
@given(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 15), max_size=30), st.integers(0, 40))
def test_close_pairs_are_those_of_a_loop(values: list[int], distance: int) -> None:
    expected = [
        (i, j, (a ^ b).bit_count())
        for i, a in enumerate(values)
        for j, b in enumerate(values)
        if i < j and (a ^ b).bit_count() <= distance
    ]
    assert sorted(close_pairs(np.array(values, np.uint64), distance)) == expected


def test_more_images_than_a_block() -> None:
    hashes = np.arange(3000, dtype=np.uint64) << np.uint64(20)
    hashes[2999] = hashes[0]
    assert list(close_pairs(hashes, 0)) == [(0, 2999, 0)]


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imagehash", None)
    with pytest.raises(ConfigError) as caught:
        perceptual_hash(np.zeros((8, 8, 3), np.uint8))
    assert str(caught.value) == (
        "samfed duplicates: imagehash is not installed; run pip install 'samfed[duplicates]'"
    )
