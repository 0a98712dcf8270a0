"""Folders that appear, move and go whole or not at all.

Links and mount points are the user's, who put a part of the cache elsewhere: they stay, and what is
behind them is replaced.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path

from pipeline.disk import flush, flush_tree, naming, real

_STUCK = (errno.EXDEV, errno.EBUSY)  # of a rename to another file system, or of a mount point


@contextmanager
def folder_beside(final: Path) -> Iterator[Path]:
    """Yield a new folder beside ``final`` that takes its place when the block ends without error.

    It is built as ``.<name>.building``, and the old folder is out of the way as ``.<name>.retired``
    for a moment; what a killed run left under these names is dealt with first. One at a time: the
    caller holds a lock. A folder that cannot be renamed (a mount point) gets new contents instead.
    """
    final = real(final)
    recover_folder(final)
    building, retired = _names_beside(final)
    building.mkdir(parents=True)
    try:
        with naming(final):
            yield building
            flush_tree(building)
        try:
            if os.path.lexists(final):
                os.replace(final, retired)
            os.replace(building, final)
        except OSError as error:
            if error.errno not in _STUCK and building.parent != final:
                raise
            _replace_contents(building, final, retired)
        flush(final.parent)
    finally:  # the old folder returns, or goes; an error in that is not the one to show
        with suppress(OSError):
            recover_folder(final)


def _replace_contents(building: Path, final: Path, retired: Path) -> None:
    """Give ``final``, which stays where it is, the contents of ``building``."""
    if os.path.lexists(retired):
        os.replace(retired, final)
    with naming(final):
        inside = final / f".{final.name}.building"
        if inside != building:
            inside.mkdir()
            _copy(building, inside)
            flush_tree(inside)
        os.replace(inside, final / f".{final.name}.whole")  # from here on a kill changes nothing
        flush(final)
        _finish_replacing(final)


def _finish_replacing(final: Path) -> None:
    """Do what is left of replacing the contents of ``final`` once the new ones are whole in it."""
    whole, moving = (final / f".{final.name}.{state}" for state in ("whole", "moving"))
    if os.path.lexists(whole):
        for old in _contents(final):
            _remove(old)
        flush(final)
        os.replace(whole, moving)
    if os.path.lexists(moving):
        for new in [*moving.iterdir()]:
            os.replace(new, final / new.name)
        moving.rmdir()
        flush(final)


def is_occupied(path: Path) -> bool:
    """Tell whether there is a file or a folder with something in it, unlike a new mount point."""
    return path.is_file() or (path.is_dir() and bool(_contents(path)))


def _contents(folder: Path) -> list[Path]:
    """List what may be replaced: not what a file system keeps for itself, nor what is half done."""
    return [p for p in folder.iterdir() if p.name != "lost+found" and not p.name.startswith(".")]


def recover_folder(final: Path) -> None:
    """Make good what a killed ``folder_beside`` left: the old folder returns if none replaced it.

    Whoever calls it holds the lock under which ``final`` is written.
    """
    final = real(final)
    building, retired = _names_beside(final)
    if final.is_dir():
        _finish_replacing(final)
        _remove(final / f".{final.name}.building")
    _remove(building)
    if os.path.lexists(retired):
        if not os.path.lexists(final):
            os.replace(retired, final)
            return
        os.replace(retired, building)  # a folder half removed is never taken for a whole one
        _remove(building)


def move(source: Path, target: Path) -> None:
    """Move a folder durably to ``target``, where nothing is yet.

    On another file system it is copied whole before it goes; a kill in between leaves both.
    """
    source, target = real(source), real(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno not in _STUCK:
            raise
        with folder_beside(target) as building:
            _copy(source, building)
        discard(source)
    flush(target.parent)
    flush(source.parent)


def _copy(source: Path, target: Path) -> None:
    """Copy what is in a folder to another one."""
    ignore = shutil.ignore_patterns("lost+found")
    shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True, ignore=ignore)


def discard(path: Path) -> None:
    """Remove a folder or file so that, wherever a kill comes, no half of it keeps its name.

    A mount point stays, with nothing in it, and a link, which then leads nowhere.
    """
    path = real(path)
    doomed, _ = _names_beside(path)
    _remove(doomed)
    try:
        os.replace(path, doomed)
        _remove(doomed)
    except OSError as error:
        if error.errno not in _STUCK and doomed.parent != path:
            raise
        with folder_beside(path):
            pass  # nothing takes the place of its contents


def unused_name(path: Path) -> Path:
    """Return ``path``, or the first of ``<stem>-2<suffix>``, ``-3``, ... that is not there."""
    others = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in count(2))
    return next(name for name in chain([path], others) if not os.path.lexists(name))


def _names_beside(final: Path) -> tuple[Path, Path]:
    """Return where ``final`` is built, on its own file system, and where the old one waits."""
    folder = final if os.path.ismount(final) else final.parent
    return folder / f".{final.name}.building", folder / f".{final.name}.retired"


def _remove(path: Path) -> None:
    """Remove a folder, a file or a link, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
