"""Archives of every kind are unpacked, and what would leave the folder is refused by name."""

from __future__ import annotations

import io
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from pipeline.data.importers.archives import archive_stem, is_archive, unpack
from pipeline.errors import DataError

FILES = {"set/images/a.jpg": b"image", "set/masks/a.png": b"mask" * 100, "set/empty.txt": b""}


def zip_of(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def tar_of(path: Path, entries: list[tuple[tarfile.TarInfo, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for entry, content in entries:
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def pack(path: Path, files: dict[str, bytes]) -> Path:
    if path.suffix == ".zip":
        return zip_of(path, files)
    entries = [(tarfile.TarInfo(name), content) for name, content in files.items()]
    return tar_of(path, entries, "w" if path.suffix == ".tar" else "w:gz")


def read(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "A.TGZ"])
def test_every_kind_is_unpacked(tmp_path: Path, name: str) -> None:
    archive = pack(tmp_path / name, FILES)
    assert is_archive(archive)
    assert archive_stem(archive).lower() == "a"
    assert unpack(archive, tmp_path / "out") == 405
    assert read(tmp_path / "out") == FILES


def test_folders_may_be_named_again_and_by_themselves(tmp_path: Path) -> None:
    archive = zip_of(tmp_path / "a.zip", {"x/": b"", "x/y/": b"", "x/y/a": b"1", "x/b": b"2"})
    unpack(archive, tmp_path / "out")
    assert read(tmp_path / "out") == {"x/y/a": b"1", "x/b": b"2"}


def test_a_tar_of_a_folder_itself_is_unpacked(tmp_path: Path) -> None:
    (tmp_path / "in" / "x").mkdir(parents=True)
    (tmp_path / "in" / "x" / "a").write_bytes(b"1")
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as archive:
        archive.add(tmp_path / "in", ".")  # as `tar -C in -czf a.tgz .` does
    unpack(tmp_path / "a.tgz", tmp_path / "out")
    assert read(tmp_path / "out") == {"x/a": b"1"}


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize("name", ["../a", "x/../../a", "/a", "x\\..\\..\\a", "C:a", "a\nb"])
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, kind: str, name: str) -> None:
    archive = pack(tmp_path / f"a.{kind}", {name: b"x"})
    with pytest.raises(DataError, match=r"a\.(zip|tar): member '.+' is (a path|not printable)"):
        unpack(archive, tmp_path / "in" / "out")
    assert read(tmp_path).keys() == {archive.name}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, b"3"])
def test_links_and_devices_of_a_tar_are_refused(tmp_path: Path, kind: bytes) -> None:
    entry = tarfile.TarInfo("passwd")
    entry.type, entry.linkname = kind, "/etc/passwd"
    archive = tar_of(tmp_path / "a.tar", [(entry, b"")])
    with pytest.raises(DataError, match="member 'passwd' is a link or a device"):
        unpack(archive, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_link_of_a_zip_is_refused(tmp_path: Path) -> None:
    entry = zipfile.ZipInfo("passwd")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(entry, "/etc/passwd")
    with pytest.raises(DataError, match="member 'passwd' is a link or a device"):
        unpack(tmp_path / "a.zip", tmp_path / "out")


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize(
    ("first", "second"),
    [("x/a.png", "x/A.png"), ("x/\u00e9", "x/e\u0301"), ("X/a", "x/b"), ("x", "x/a")],
)
def test_names_that_collide_on_some_systems_are_both_named(
    tmp_path: Path, kind: str, first: str, second: str
) -> None:
    archive = pack(tmp_path / f"a.{kind}", {first: b"1", second: b"2"})
    with pytest.raises(DataError, match=r"members '.+' and '.+' have one name on some systems"):
        unpack(archive, tmp_path / "out")


def test_one_name_twice_is_refused(tmp_path: Path) -> None:
    archive = tar_of(
        tmp_path / "a.tar", [(tarfile.TarInfo("a"), b"1"), (tarfile.TarInfo("a"), b"")]
    )
    with pytest.raises(DataError, match="members 'a' and 'a' have one name"):
        unpack(archive, tmp_path / "out")


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_limits_hold_before_anything_over_them_is_written(tmp_path: Path, kind: str) -> None:
    archive = pack(tmp_path / f"a.{kind}", {"a": b"0" * 10, "b": b"0" * 10_000_000})
    with pytest.raises(DataError, match="over 1000 bytes when unpacked"):
        unpack(archive, tmp_path / "out", max_bytes=1000)
    assert read(tmp_path / "out") == {"a": b"0" * 10}
    with pytest.raises(DataError, match="over 1 entries"):
        unpack(archive, tmp_path / "other", max_files=1)


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_a_cut_or_changed_archive_is_called_damaged(tmp_path: Path, kind: str) -> None:
    archive = pack(tmp_path / f"a.{kind}", {"a": bytes(range(256)) * 400})
    content = archive.read_bytes()
    archive.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(DataError, match="damaged"):
        unpack(archive, tmp_path / "out")
    if kind == "zip":
        archive.write_bytes(content.replace(content[60:64], b"\0\0\0\0", 1))
        with pytest.raises(DataError, match="damaged"):
            unpack(archive, tmp_path / "other")


@pytest.mark.parametrize("content", [b"", b"<html>please sign in</html>"])
def test_what_is_no_archive_is_said_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.zip: damaged or unknown archive \(.+\)") as caught:
        unpack(tmp_path / "a.zip", tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_an_encrypted_zip_is_refused(tmp_path: Path) -> None:
    archive = zip_of(tmp_path / "a.zip", {"a": b"x"})
    content = bytearray(archive.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(content)
    with pytest.raises(DataError, match="member 'a' is encrypted"):
        unpack(archive, tmp_path / "out")


def test_no_file_is_replaced_and_a_missing_archive_is_an_os_error(tmp_path: Path) -> None:
    archive = zip_of(tmp_path / "a.zip", {"a": b"new"})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        unpack(archive, tmp_path / "out")
    assert (tmp_path / "out" / "a").read_bytes() == b"old"
    with pytest.raises(FileNotFoundError):
        unpack(tmp_path / "none.zip", tmp_path / "out")
