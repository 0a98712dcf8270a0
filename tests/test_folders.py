"""Parts of a cache that lie elsewhere: behind links, and on mount points that cannot be renamed."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.disk import leftovers, write_bytes
from pipeline.folders import discard, folder_beside, is_occupied, move, recover_folder

ROOT = Path(__file__).parent.parent


def fill(folder: Path, *names: str) -> None:
    """Put files and a folder with one into a folder."""
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "file").write_text(name)


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def replaced(final: Path, *new: str) -> None:
    with folder_beside(final) as building:
        fill(building, *new)


# --------------------------------------------------------------------------- links


@pytest.fixture
def link(tmp_path: Path) -> Path:
    """``cache/images``, which leads to a folder on what may be another disk; relative."""
    (tmp_path / "cache").mkdir()
    link = tmp_path / "cache" / "images"
    link.symlink_to("../elsewhere/images")
    return link


@pytest.mark.parametrize("there", [True, False], ids=["full", "leads nowhere"])
def test_a_link_stays_and_its_folder_is_replaced(tmp_path: Path, link: Path, there: bool) -> None:
    if there:
        fill(tmp_path / "elsewhere" / "images", "old")
    replaced(link, "new")
    assert link.is_symlink()
    assert names(tmp_path / "elsewhere") == ["images", "images/new", "images/new/file"]
    assert names(tmp_path / "cache") == ["images"]


def test_a_kill_behind_a_link_is_made_good_there(tmp_path: Path, link: Path) -> None:
    fill(tmp_path / "elsewhere", ".images.retired", ".images.building")
    recover_folder(link)
    assert names(tmp_path / "elsewhere") == ["images", "images/file"]


def test_what_a_link_leads_to_is_moved_and_discarded(tmp_path: Path, link: Path) -> None:
    fill(tmp_path / "elsewhere" / "images", "old")
    move(link, tmp_path / "cache" / "archive" / "one")
    assert names(tmp_path / "cache" / "archive") == ["one", "one/old", "one/old/file"]
    assert names(tmp_path / "elsewhere") == []
    assert link.is_symlink()
    assert not is_occupied(link)
    move(tmp_path / "cache" / "archive" / "one", link)  # and back
    assert names(tmp_path / "elsewhere") == ["images", "images/old", "images/old/file"]
    discard(link)
    assert names(tmp_path / "elsewhere") == []
    assert link.is_symlink()


def test_a_link_in_the_place_of_a_file_is_replaced(tmp_path: Path) -> None:
    """DVC may put links into its cache there, whose files are shared with other checkouts."""
    (tmp_path / "shared").write_text("old")
    (tmp_path / "partition.json").symlink_to(tmp_path / "shared")
    write_bytes(tmp_path / "partition.json", b"new")
    assert (tmp_path / "partition.json").read_bytes() == b"new"
    assert (tmp_path / "shared").read_text() == "old"


def test_a_file_behind_a_folders_link_that_leads_nowhere(tmp_path: Path, link: Path) -> None:
    write_bytes(link / "sub" / "file", b"text")
    assert (tmp_path / "elsewhere" / "images" / "sub" / "file").read_bytes() == b"text"


def test_leftovers_behind_a_link_are_found(tmp_path: Path, link: Path) -> None:
    file = tmp_path / "elsewhere" / "images" / ".a.0123abcd.samfed-tmp"
    file.parent.mkdir(parents=True)
    file.write_text("half")
    assert leftovers(tmp_path / "cache", seconds=0) == [link / file.name]


# --------------------------------------------------------------------------- mount points


class Killed(BaseException):
    """A process that is dead does nothing more, in no ``finally`` either."""


@pytest.fixture(params=["mount", "bind mount"])
def mount(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that refuses renames as a mount point does; only of one is it known beforehand."""
    root, real = tmp_path / "cache" / "images", os.replace
    (root / "lost+found").mkdir(parents=True)

    def replace(source: Path, target: Path) -> None:
        if root in (Path(source), Path(target)):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(source))
        if (root in Path(source).parents) != (root in Path(target).parents):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(source))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    if request.param == "mount":
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == root)
    return root


def test_a_mount_point_gets_new_contents(mount: Path) -> None:
    fill(mount, "old", "both")
    inode = mount.stat().st_ino
    replaced(mount, "new", "both")
    assert mount.stat().st_ino == inode
    assert names(mount) == ["both", "both/file", "lost+found", "new", "new/file"]
    assert names(mount.parent) == ["images", *(f"images/{name}" for name in names(mount))]


def test_a_block_that_fails_leaves_a_mount_point_as_it_was(mount: Path) -> None:
    fill(mount, "old")
    before = names(mount.parent)

    def stop(building: Path) -> None:
        fill(building, "new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), folder_beside(mount) as building:
        stop(building)
    assert names(mount.parent) == before


def test_a_mount_point_is_emptied(mount: Path) -> None:
    fill(mount, "old")
    discard(mount)
    assert names(mount.parent) == ["images", "images/lost+found"]
    assert not is_occupied(mount)


def test_to_a_mount_point_and_away_from_it(mount: Path) -> None:
    fill(mount, "old")
    move(mount, mount.parent / "archive" / "one")
    assert names(mount.parent / "archive") == ["one", "one/old", "one/old/file"]
    assert not is_occupied(mount)
    move(mount.parent / "archive" / "one", mount)
    assert names(mount) == ["lost+found", "old", "old/file"]
    assert names(mount.parent / "archive") == []
    move(mount / "old", mount.parent / "archive" / "two")  # a store below it
    assert names(mount) == ["lost+found"]
    assert names(mount.parent / "archive") == ["two", "two/file"]


def test_a_kill_at_any_step_leaves_the_old_contents_or_the_new(
    mount: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, kill_at = 0, 0

    def counted(step: Callable[..., Any]) -> Callable[..., Any]:
        def take(*args: Any, **options: Any) -> Any:
            nonlocal steps
            steps += 1
            if kill_at and steps >= kill_at:
                raise Killed
            return step(*args, **options)

        return take

    def attempt() -> bool:
        nonlocal steps
        steps = 0
        with monkeypatch.context() as patch:
            for module, name in ((os, "replace"), (os, "mkdir"), (os, "rmdir"), (os, "unlink")):
                patch.setattr(module, name, counted(getattr(module, name)))
            patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
            try:
                replaced(mount, "new", "both")
            except Killed:
                return True
        return False

    found = []
    while True:
        shutil.rmtree(mount / "new", ignore_errors=True)
        shutil.rmtree(mount / "both", ignore_errors=True)
        fill(mount, *({"old", "both"} - set(os.listdir(mount))))
        kill_at += 1
        if not attempt():
            break
        recover_folder(mount)
        assert [path.name for path in mount.parent.iterdir()] == ["images"]
        found.append(names(mount))
    old = ["both", "both/file", "lost+found", "old", "old/file"]
    new = ["both", "both/file", "lost+found", "new", "new/file"]
    assert all(each in (old, new) for each in found)
    states = [each == new for each in found]
    assert states == sorted(states)  # once the new contents are there, they stay
    assert {True, False} == set(states)


REAL = """
import os, subprocess, sys
from pathlib import Path
from pipeline.folders import discard, folder_beside, move
cache = Path(sys.argv[1])
def mount(*how):
    subprocess.run(["mount", *how], check=True)
for how in (["-t", "tmpfs", "none"], ["--bind", str(cache / "disk")]):
    images = cache / ("images " + how[0].strip("-"))
    images.mkdir(); (cache / "disk").mkdir(exist_ok=True)
    mount(*how, str(images))
    for text in ("first", "second"):
        with folder_beside(images) as building:
            (building / "store").mkdir()
            (building / "store" / "file").write_text(text)
        assert (images / "store" / "file").read_text() == text
        assert os.listdir(images) == ["store"]
    move(images / "store", cache / "archive" / "store")
    assert os.listdir(images) == []
    move(cache / "archive" / "store", images / "store")
    assert (images / "store" / "file").read_text() == "second"
    assert os.listdir(cache / "archive") == []
    discard(images)
    assert os.listdir(images) == []
    subprocess.run(["umount", str(images)], check=True)
print(sorted(os.listdir(cache)))
"""


def test_real_mounts(tmp_path: Path) -> None:
    """A tmpfs and a bind mount, in a namespace of their own."""
    allowed = subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False)
    if allowed.returncode:
        pytest.skip(f"no mount namespace here: {allowed.stderr.decode().strip()}")
    command = ["unshare", "-rm", sys.executable, "-c", REAL, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.stderr == ""
    assert result.stdout == "['archive', 'disk', 'images bind', 'images t']\n"
