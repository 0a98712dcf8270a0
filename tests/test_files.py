"""Files and folders appear whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pipeline.disk import (
    discard,
    file_sha256,
    flush,
    flush_tree,
    folder_beside,
    naming,
    read_json,
    recover_folder,
    tree_bytes,
    write_bytes,
    write_json,
)
from pipeline.errors import DataError, StageError


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    final = tmp_path / "out"
    for text in ("first", "second"):
        with folder_beside(final) as building:
            (building / "file").write_text(text)
    assert (final / "file").read_text() == "second"
    assert os.listdir(tmp_path) == ["out"]


def test_a_failed_folder_leaves_the_old_one(tmp_path: Path) -> None:
    final = tmp_path / "out"
    with folder_beside(final) as building:
        (building / "file").write_text("first")

    def stop(building: Path) -> None:
        (building / "file").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), folder_beside(final) as building:
        stop(building)
    assert (final / "file").read_text() == "first"
    assert os.listdir(tmp_path) == ["out"]


def test_the_old_folder_comes_back_if_the_new_one_cannot_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / "out"
    with folder_beside(final) as building:
        (building / "file").write_text("first")
    real = os.replace

    def refuse(source: Path, target: Path) -> None:
        if Path(source).name == ".out.building":
            raise OSError("disk gone")
        real(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk gone"), folder_beside(final) as building:
        (building / "file").write_text("second")
    assert (final / "file").read_text() == "first"
    assert os.listdir(tmp_path) == ["out"]


def make(folder: Path, text: str) -> None:
    folder.mkdir()
    (folder / "file").write_text(text)


@pytest.mark.parametrize(
    ("left", "expected"),
    [
        ({}, None),
        ({".out.building": "half"}, None),
        ({"out": "old", ".out.building": "half"}, "old"),
        ({".out.retired": "old", ".out.building": "new"}, "old"),
        ({"out": "new", ".out.retired": "old"}, "new"),
        ({"out": "new", ".out.building": "old, half removed"}, "new"),
    ],
)
def test_what_a_killed_run_leaves(
    tmp_path: Path, left: dict[str, str], expected: str | None
) -> None:
    """Each state that kill -9 can leave, in the order in which they come."""
    final = tmp_path / "out"
    for name, text in left.items():
        make(tmp_path / name, text)
    recover_folder(final)
    assert (final / "file").read_text() == expected if expected else not final.exists()
    assert os.listdir(tmp_path) == (["out"] if expected else [])
    for name, text in left.items():
        if name != "out":
            make(tmp_path / name, text)
    with folder_beside(final) as building:
        assert os.listdir(building) == []
        (building / "file").write_text("newest")
    assert (final / "file").read_text() == "newest"
    assert os.listdir(tmp_path) == ["out"]


def test_recovery_where_nothing_is(tmp_path: Path) -> None:
    recover_folder(tmp_path / "no" / "such" / "folder")
    assert os.listdir(tmp_path) == []


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"first")

    def refuse(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="disk full"):
        write_bytes(path, b"second")
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["file"]


def test_json_round_trip_and_errors(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    with pytest.raises(StageError) as missing:
        read_json(path, stage="prepare")
    assert str(missing.value) == f"{path}: not found; run `samfed prepare` first"
    write_json(path, {"b": 1, "a": [1.5]})
    assert read_json(path, stage="prepare") == {"a": [1.5], "b": 1}
    digest = file_sha256(path)
    write_json(path, {"a": [1.5], "b": 1})
    assert file_sha256(path) == digest
    path.write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        read_json(path, stage="prepare")


def test_a_folder_is_discarded_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed half-way, it is no longer there under its name."""
    folder = tmp_path / "out"
    make(folder, "old")
    assert tree_bytes(folder) == tree_bytes(folder / "file") == 3

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            discard(folder)
    assert os.listdir(tmp_path) == [".out.building"]
    recover_folder(folder)
    assert os.listdir(tmp_path) == []
    make(folder, "old")
    discard(folder)
    assert os.listdir(tmp_path) == []


def test_a_tree_is_flushed_from_its_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "sub", "text")
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: flushed.append(os.fstat(file).st_ino))
    flush_tree(tmp_path)
    paths = (tmp_path / "sub" / "file", tmp_path / "sub", tmp_path)
    assert flushed == [path.stat().st_ino for path in paths]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_a_folder_that_cannot_be_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Some network file systems have no such thing; a failing disk is another matter."""

    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    make(tmp_path / "sub", "text")
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match=os.strerror(number)):
        flush(tmp_path / "sub" / "file")
    if number == errno.EINVAL:
        flush(tmp_path / "sub")
    else:
        with pytest.raises(OSError, match=os.strerror(number)):
            flush(tmp_path / "sub")


def test_an_error_without_a_name_is_given_one(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full") as caught, naming(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "full")
    assert caught.value.filename == str(tmp_path / "a")
    with pytest.raises(FileNotFoundError) as named, naming(tmp_path / "a"):
        (tmp_path / "b").read_text()
    assert named.value.filename == str(tmp_path / "b")
