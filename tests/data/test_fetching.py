"""``samfed fetch``: terms before bytes, room on the disk, and what has no stable address."""

from __future__ import annotations

import hashlib
import io
import re
import stat
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import answer, call, fails
from file_server import CONTENT, Site, serve
from PIL import Image

from pipeline.data.catalogue import SOURCES, WEIGHTS, Source
from pipeline.data.fetching import Offer, fetch, offer
from pipeline.errors import ConfigError, DataError, SamfedError
from pipeline.params import load_config


@pytest.fixture
def site() -> Iterator[Site]:
    with serve() as found:
        yield found


def weights_offer(site: Site, folder: Path) -> Offer:
    source = Source("Weights", "https://example.org", "MIT", (site.file,), variant="vit_b")
    return offer("tiny", out=folder, cache=folder / "cache", sources={"tiny": source})


# --------------------------------------------------------------------------- the table


@pytest.mark.parametrize("name", SOURCES)
def test_the_table_is_whole(name: str) -> None:
    source = SOURCES[name]
    assert source.page.startswith("http")
    named = [file.url for file in source.files if source.page.endswith(file.name)]
    assert named in ([], [source.page])  # an address is the same in both tables
    assert (source.kind is None) == (name in WEIGHTS)
    assert (source.variant is None) == (name not in WEIGHTS)
    for file in source.files:
        assert re.fullmatch("[0-9a-f]{64}", file.sha256)
        # one publisher has no TLS; the digest guards its bytes
        assert file.url.startswith("https://") or name == "jsrt"
        assert file.bytes is None or file.confirmed


def test_names_are_listed() -> None:
    listed = answer("fetch")
    assert set(listed) == set(SOURCES)
    assert listed["sam_vit_b"]["licence"] == "Apache-2.0"
    lines = call("fetch").stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(SOURCES)
    assert "by hand (https://github.com/bowang-lab/MedSAM)" in lines[4]


def test_an_unknown_name_is_one_line() -> None:
    assert fails(2, "fetch", "sam_vit_x").endswith("did you mean sam_vit_l?")
    assert fails(2, "fetch", "zzz").endswith("`samfed fetch` lists all names")


@pytest.mark.parametrize("name", [name for name in SOURCES if not SOURCES[name].files])
def test_what_has_no_address_says_where_it_is(name: str, tmp_path: Path) -> None:
    line = fails(1, "fetch", name)
    assert SOURCES[name].page in line
    if name in WEIGHTS:
        assert "set sam.variant to vit_b and sam.checkpoint to the path of medsam_vit_b.pth" in line
    else:
        assert f"run `samfed import {SOURCES[name].kind} " in line


# --------------------------------------------------------------------------- terms


def test_terms_are_shown_before_anything_is_asked_for(site: Site, tmp_path: Path) -> None:
    shown = weights_offer(site, tmp_path).text()
    assert shown.splitlines()[:3] == [
        "tiny: Weights",
        "licence: MIT (https://example.org)",
        f"weights.bin: 0.3 MB, sha256 {site.file.sha256[:12]}..., from {site.file.url}",
    ]
    assert site.asked == []


def test_a_script_must_accept_the_licence() -> None:
    line = fails(2, "fetch", "sam_vit_b")
    assert "give --yes to accept the licence of sam_vit_b, 375.0 MB: Apache-2.0 (https" in line


def test_a_person_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.console.can_ask", lambda: True)
    result = call("fetch", "sam_vit_b", "--out", tmp_path, stdin="n\n")
    assert result.exit_code == 1
    assert "licence: Apache-2.0" in result.stderr
    assert "375.0 MB" in result.stderr
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------- weights


def test_weights_come_with_the_settings_that_use_them(site: Site, tmp_path: Path) -> None:
    found = fetch(weights_offer(site, tmp_path / "weights"))
    path = tmp_path / "weights" / "weights.bin"
    assert path.read_bytes() == CONTENT
    _, settings = found.text().split("params.yaml\n")
    params = tmp_path / "params.yaml"
    params.write_text(settings)
    sam = load_config(params).sam
    assert (sam.variant, sam.checkpoint) == ("vit_b", path)
    assert found.as_json() == {"sam.variant": "vit_b", "sam.checkpoint": str(path)}


def test_an_unverified_digest_is_said_so(
    site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    offered = weights_offer(site, tmp_path)
    doubtful = replace(offered, files=(replace(site.file, confirmed=False),))
    assert "unverified sha256 (from one source alone)" in doubtful.text()
    fetch(doubtful)
    assert "weights.bin: its sha256 is unverified, from one source alone" in caplog.text


# --------------------------------------------------------------------------- the disk


def test_a_full_disk_is_told_before(site: Site, tmp_path: Path) -> None:
    offered = weights_offer(site, tmp_path / "weights")
    with pytest.raises(DataError, match=r"0\.0 GB are free, about 0\.0 GB are needed for tiny"):
        fetch(offered, free=lambda _: len(CONTENT) - 1)
    assert site.asked == []
    part = tmp_path / "weights" / "weights.bin.part"
    part.parent.mkdir()
    part.write_bytes(CONTENT[:1000])
    fetch(offered, free=lambda _: len(CONTENT) - 1000)


# --------------------------------------------------------------------------- data sets


def picture() -> bytes:
    file = io.BytesIO()
    pixels = np.zeros((8, 8), np.uint8)
    pixels[2:5, 2:5] = 255
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def archive(*members: str | zipfile.ZipInfo) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as packed:
        for each in members:
            packed.writestr(each, picture())
    return file.getvalue()


def kvasir_offer(site: Site, folder: Path, content: bytes) -> Offer:
    site.content = content
    digest = hashlib.sha256(content).hexdigest()
    file = replace(site.file, name="set.zip", sha256=digest, bytes=len(content))
    source = replace(SOURCES["kvasir-seg"], files=(file,))
    return offer("set", out=folder / "set", cache=folder / "cache", sources={"set": source})


def test_a_data_set_is_imported(
    site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = [f"Kvasir-SEG/{kind}/{name}.jpg" for kind in ("images", "masks") for name in "ab"]
    offered = kvasir_offer(site, tmp_path, archive(*names))
    result = fetch(offered)
    assert (result.as_json()["images"], result.as_json()["masks"]) == (2, 2)
    assert {path.name for path in (tmp_path / "set").iterdir()} >= {"images", "masks", "SOURCE.md"}
    assert "kvasir-seg" in (tmp_path / "set" / "SOURCE.md").read_text()
    kept = tmp_path / "cache" / "downloads" / "set"
    assert [path.name for path in kept.iterdir()] == ["set.zip"]
    assert f"the archives stay in {kept}" in caplog.text
    with pytest.raises(DataError, match="is there already"):
        kvasir_offer(site, tmp_path, site.content)
    fetch(replace(offered, out=tmp_path / "again"))
    assert site.asked == [("GET", None)]


def test_a_data_set_needs_room_for_its_images_too(site: Site, tmp_path: Path) -> None:
    offered = kvasir_offer(site, tmp_path, CONTENT)
    with pytest.raises(DataError, match="needed for set"):
        fetch(offered, free=lambda _: 3 * len(CONTENT) - 1)
    assert site.asked == []


def test_what_reads_volumes_is_there_before_they_are_received(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    assert "pip install 'samfed[medical]'" in fails(2, "fetch", "acdc", "--yes")


LINK = zipfile.ZipInfo("Kvasir-SEG/images/a.jpg")
LINK.external_attr = (stat.S_IFLNK | 0o777) << 16


@pytest.mark.parametrize(
    "member",
    ["../a.jpg", "/a.jpg", "C:/a.jpg", LINK],
    ids=lambda each: "link" if each is LINK else each,
)
def test_a_hostile_archive_writes_nothing(
    site: Site, tmp_path: Path, member: str | zipfile.ZipInfo
) -> None:
    names = ["Kvasir-SEG/images/b.jpg", "Kvasir-SEG/masks/b.jpg"]
    with pytest.raises(DataError, match=r"member .* is ") as caught:
        fetch(kvasir_offer(site, tmp_path, archive(*names, member)))
    assert "\n" not in str(caught.value)
    written = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {"set.zip", "fetch-set.lock"}


def test_errors_of_offers_have_their_kind(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        offer("zzz", out=None, cache=tmp_path)
    with pytest.raises(SamfedError):
        offer("medsam", out=None, cache=tmp_path)
