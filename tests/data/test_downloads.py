"""Downloads against a server of our own: they break off, resume, are wrong, or lead astray."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from file_server import CONTENT, Site, serve
from filelock import lock_descriptor

from pipeline.data.downloads import download, remote_bytes
from pipeline.errors import DataError, LockedStoreError, NetworkError

PART, VERSION = "weights.bin.part", "weights.bin.part.version"


@pytest.fixture
def site() -> Iterator[Site]:
    with serve() as found:
        yield found


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def ranges(site: Site) -> list[str | None]:
    return [asked for _, asked in site.asked]


# --------------------------------------------------------------------------- whole files


def test_a_file_is_received_and_not_asked_for_again(site: Site, tmp_path: Path) -> None:
    shown: list[tuple[str, int, int, str]] = []

    def progress(what: str, done: int, total: int, note: str = "", /) -> None:
        shown.append((what, done, total, note))

    path = download(site.file, tmp_path / "new", progress=progress)
    assert path == tmp_path / "new" / "weights.bin"
    assert path.read_bytes() == CONTENT
    assert names(path.parent) == ["weights.bin"]
    assert shown[-1] == ("weights.bin", 0, 1, "MB")
    assert download(site.file, tmp_path / "new") == path
    assert site.asked == [("GET", None)]


def test_the_servers_size_is_used_where_none_is_known(site: Site) -> None:
    unknown = replace(site.file, bytes=None)
    assert remote_bytes(site.file) == len(CONTENT)
    assert site.asked == []
    assert remote_bytes(unknown) == len(CONTENT)
    site.status = [405]
    assert remote_bytes(unknown) is None
    site.status = [404]
    with pytest.raises(NetworkError, match="answers 404"):
        remote_bytes(unknown)


def test_a_wrong_digest_removes_what_was_received(site: Site, tmp_path: Path) -> None:
    site.content = CONTENT[::-1]
    with pytest.raises(DataError, match=r"sha256 is .* expected .* it is removed") as caught:
        download(site.file, tmp_path)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == []


def test_a_digest_that_may_be_wrong_itself_costs_no_file(site: Site, tmp_path: Path) -> None:
    site.content = CONTENT[::-1]
    with pytest.raises(DataError, match="one source alone"):
        download(replace(site.file, confirmed=False), tmp_path)
    assert names(tmp_path) == ["weights.bin.unverified"]


def test_a_wrong_file_that_was_there_stays(site: Site, tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"mine")
    with pytest.raises(DataError, match="move it away"):
        download(site.file, tmp_path)
    assert (tmp_path / "weights.bin").read_bytes() == b"mine"
    assert site.asked == []


@pytest.mark.parametrize("size", [len(CONTENT) - 1, len(CONTENT) + 1])
def test_a_wrong_size_is_refused_before_the_bytes(site: Site, tmp_path: Path, size: int) -> None:
    wrong = replace(site.file, bytes=size)
    with pytest.raises(DataError, match=rf"has 256,000 bytes, expected {size:,}"):
        download(wrong, tmp_path)
    assert (tmp_path / PART).read_bytes() == b""


def test_a_server_that_sends_without_end_is_stopped(site: Site, tmp_path: Path) -> None:
    site.content, site.chunked = CONTENT * 30, True
    with pytest.raises(DataError, match="sends more than the 256,000 bytes"):
        download(site.file, tmp_path)
    site.content = CONTENT
    assert download(site.file, tmp_path, pauses=[0]).read_bytes() == CONTENT


# --------------------------------------------------------------------------- the rest of a file


def test_a_dropped_connection_is_resumed(site: Site, tmp_path: Path) -> None:
    site.drops = [140_000, 70_000]
    assert download(site.file, tmp_path, pauses=[0, 0]).read_bytes() == CONTENT
    assert ranges(site) == [None, "bytes=131072-", "bytes=196608-"]
    assert names(tmp_path) == ["weights.bin"]


def test_a_later_call_continues(site: Site, tmp_path: Path) -> None:
    site.drops = [140_000]
    with pytest.raises(NetworkError) as caught:
        download(site.file, tmp_path, pauses=[])
    assert str(caught.value) == (
        f"{site.file.url}: the connection broke off; 131,072 bytes are kept and the same command "
        f"continues, or put the file, downloaded with a browser, at {tmp_path / 'weights.bin'}"
    )
    assert names(tmp_path) == [PART, VERSION]
    assert download(site.file, tmp_path).read_bytes() == CONTENT
    assert ranges(site) == [None, "bytes=131072-"]


def test_ctrl_c_keeps_the_part(site: Site, tmp_path: Path) -> None:
    big = CONTENT * 20
    site.content = big
    file = replace(site.file, sha256=hashlib.sha256(big).hexdigest(), bytes=len(big))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(file, tmp_path, progress=interrupt)
    kept = (tmp_path / PART).stat().st_size
    assert 0 < kept < len(big)
    assert download(file, tmp_path).read_bytes() == big
    assert ranges(site) == [None, f"bytes={kept}-"]


def test_a_part_that_is_whole_needs_no_request(site: Site, tmp_path: Path) -> None:
    (tmp_path / PART).write_bytes(CONTENT)
    assert download(site.file, tmp_path).read_bytes() == CONTENT
    assert site.asked == []


@pytest.mark.parametrize(
    ("change", "sent"),
    [
        (lambda site: setattr(site, "ranges", False), "a server that ignores ranges"),
        (lambda site: setattr(site, "etag", '"v2"'), "a file that has changed"),
    ],
)
def test_it_starts_anew(
    site: Site, tmp_path: Path, change: Callable[[Site], None], sent: str
) -> None:
    (tmp_path / PART).write_bytes(b"x" * 1000)
    (tmp_path / VERSION).write_text('"v1"')
    change(site)
    assert download(site.file, tmp_path).read_bytes() == CONTENT, sent
    assert ranges(site) == ["bytes=1000-"]


def test_a_date_tells_versions_apart_where_a_tag_is_weak(site: Site, tmp_path: Path) -> None:
    site.etag, site.modified, site.drops = None, "Thu, 26 Nov 2026 10:00:00 GMT", [70_000]
    with pytest.raises(NetworkError):
        download(site.file, tmp_path, pauses=[])
    assert (tmp_path / VERSION).read_text() == site.modified
    site.etag = 'W/"v1"'
    (tmp_path / VERSION).write_text('"old"')
    assert download(site.file, tmp_path).read_bytes() == CONTENT


def test_a_part_longer_than_the_file_is_dropped(site: Site, tmp_path: Path) -> None:
    (tmp_path / PART).write_bytes(CONTENT * 2)
    assert download(site.file, tmp_path, pauses=[0]).read_bytes() == CONTENT
    assert ranges(site) == ["bytes=512000-", None]


def test_two_processes_do_not_write_one_part(site: Site, tmp_path: Path) -> None:
    with (tmp_path / PART).open("ab") as other:
        assert lock_descriptor(other.fileno(), blocking=False)
        with pytest.raises(LockedStoreError, match="another process receives this file"):
            download(site.file, tmp_path)
    assert site.asked == []


# --------------------------------------------------------------------------- servers that fail


def test_a_missing_file_is_not_asked_for_again(site: Site, tmp_path: Path) -> None:
    site.status = [404] * 9
    with pytest.raises(NetworkError, match="the server answers 404"):
        download(site.file, tmp_path, pauses=[0, 0])
    assert len(site.asked) == 1


def test_a_busy_server_is_asked_again(
    site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    site.status = [500, 429]
    assert download(site.file, tmp_path, pauses=[0, 0]).read_bytes() == CONTENT
    assert len(site.asked) == 3
    assert "answers 500 Internal Server Error; trying again in 0 s" in caplog.text
    site.status = [500] * 9
    with pytest.raises(NetworkError, match="the server answers 500"):
        download(replace(site.file, name="other"), tmp_path, pauses=[0])


def test_without_a_network_it_is_one_line(site: Site, tmp_path: Path) -> None:
    nobody = replace(site.file, url="http://127.0.0.1:9/weights.bin", bytes=None)
    for call in (lambda: remote_bytes(nobody), lambda: download(nobody, tmp_path, pauses=[])):
        with pytest.raises(NetworkError, match=r"is there a network\?; ") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_redirects_stay_on_the_host_or_go_to_https(site: Site, tmp_path: Path) -> None:
    site.moved_to = "/elsewhere"
    (tmp_path / PART).write_bytes(CONTENT[:1000])
    assert download(site.file, tmp_path).read_bytes() == CONTENT
    assert ranges(site) == ["bytes=1000-"] * 2

    site.moved_to = site.address.replace("127.0.0.1", "localhost") + "/elsewhere"
    unknown = replace(site.file, name="other", bytes=None)
    for call in (lambda: remote_bytes(unknown), lambda: download(unknown, tmp_path)):
        with pytest.raises(
            NetworkError, match=r"leads to http://localhost:\d+, which is not https"
        ):
            call()
    assert (tmp_path / "other.part").read_bytes() == b""


def test_a_redirect_to_https_is_followed(site: Site, tmp_path: Path) -> None:
    """It ends here, as nobody speaks TLS at that address."""
    site.moved_to = re.sub("^http", "https", site.address) + "/elsewhere"
    with pytest.raises(NetworkError, match=re.escape(site.file.url)):
        download(site.file, tmp_path, pauses=[])
