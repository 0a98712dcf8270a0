"""``samfed fetch``: terms before bytes, room on the disk, and what has no stable address."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import answer, call, fails
from file_server import CONTENT, Site, serve

import cli
from pipeline.data.fetching import Offer, fetch, offer
from pipeline.data.sources import SOURCES, Source
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
    assert (source.kind is None) != (source.variant is None)
    for file in source.files:
        assert re.fullmatch("[0-9a-f]{64}", file.sha256)
        assert file.url.startswith("https://")
        assert file.bytes is None or file.confirmed


def test_names_are_listed() -> None:
    listed = answer("fetch")
    assert set(listed) == set(SOURCES)
    assert listed["sam_vit_b"]["licence"] == "Apache-2.0"
    lines = call("fetch").stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(SOURCES)
    assert "by hand, from https://github.com/bowang-lab/MedSAM" in lines[4]


def test_an_unknown_name_is_one_line() -> None:
    assert fails(2, "fetch", "sam_vit_x").endswith("did you mean sam_vit_l?")
    assert fails(2, "fetch", "zzz").endswith("`samfed fetch` lists all names")


@pytest.mark.parametrize("name", [name for name in SOURCES if not SOURCES[name].files])
def test_what_has_no_address_says_where_it_is(name: str, tmp_path: Path) -> None:
    line = fails(1, "fetch", name)
    assert SOURCES[name].page in line
    assert "set sam.variant to vit_b and sam.checkpoint to the path of medsam_vit_b.pth" in line


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
    monkeypatch.setattr(cli, "can_ask", lambda: True)
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


def test_a_data_set_needs_room_for_its_images_too(site: Site, tmp_path: Path) -> None:
    source = Source("Set", "https://example.org", files=(site.file,), kind="kvasir-seg")
    arguments = {"cache": tmp_path / "cache", "sources": {"set": source}}
    offered = offer("set", out=tmp_path / "set", **arguments)
    with pytest.raises(DataError, match="needed for set"):
        fetch(offered, free=lambda _: 3 * len(CONTENT) - 1)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine").touch()
    with pytest.raises(DataError, match="is there already"):
        offer("set", out=tmp_path / "set", **arguments)


def test_errors_of_offers_have_their_kind(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        offer("zzz", out=None, cache=tmp_path)
    with pytest.raises(SamfedError):
        offer("medsam", out=None, cache=tmp_path)
