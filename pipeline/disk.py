"""Files written whole or not at all, digests of files, and locks for one writer at a time."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.errors import DataError, LockedStoreError, StageError

_TEMPORARY = ".samfed-tmp"  # so that ours are known wherever they are found
_OUR_TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}" + re.escape(_TEMPORARY))
_ABANDONED_SECONDS = 60 * 60


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError that names no file, as that of a full disk, leaves the block naming ``path``."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``path`` atomically: readers see the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(_TEMPORARY, prefix=f".{path.name}.", dir=path.parent)
    try:
        with naming(path), os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def leftovers(root: Path) -> list[Path]:
    """Temporary files below ``root`` that killed ``write_bytes`` left, untouched for an hour.

    A write takes seconds, so an old one is nobody's. (Locks would not tell: single files are
    written under many, or none.)
    """
    latest = time.time() - _ABANDONED_SECONDS
    named = (
        Path(folder, name)
        for folder, _, names in os.walk(root)
        for name in names
        if _OUR_TEMPORARY.fullmatch(name)
    )
    found = []
    for path in named:
        with suppress(FileNotFoundError):  # written by now
            if path.lstat().st_mtime < latest:
                found.append(path)
    return sorted(found)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON with sorted keys, atomically; the same value, same bytes."""
    write_bytes(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def read_json(path: Path, *, stage: str) -> Any:
    """Read a JSON file that ``stage`` (a samfed command) writes.

    Raises:
        StageError: the file is missing. DataError: it is not JSON.
    """
    if not path.is_file():
        raise StageError(f"{path}: not found; run `samfed {stage}` first")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(
            f"{path}: not valid JSON ({error}); delete it and run `samfed {stage}`"
        ) from error


@contextmanager
def folder_beside(final: Path) -> Iterator[Path]:
    """A new folder beside ``final`` that takes its place when the block ends without an error.

    It is built as ``.<name>.building``, and the old folder is out of the way as ``.<name>.retired``
    for a moment; what a killed run left under these names is dealt with first. One at a time: the
    caller holds a lock.
    """
    recover_folder(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    building, retired = _building(final), _retired(final)
    building.mkdir()
    try:
        with naming(final):
            yield building
        if os.path.lexists(final):
            os.replace(final, retired)
        os.replace(building, final)
    except BaseException:
        with suppress(OSError):  # the error that brought us here is the one to show
            recover_folder(final)
        raise
    with suppress(OSError):  # the new folder is in place; the next call tries again
        recover_folder(final)


def recover_folder(final: Path) -> None:
    """Make good what a killed ``folder_beside`` left: the old folder returns if none replaced it.

    Whoever calls it holds the lock under which ``final`` is written.
    """
    building, retired = _building(final), _retired(final)
    _remove(building)
    if not os.path.lexists(retired):
        return
    if not os.path.lexists(final):
        os.replace(retired, final)
        return
    os.replace(retired, building)  # so that a folder half removed is never taken for a whole one
    _remove(building)


def flush(path: Path) -> None:
    """Put a file's bytes, or a folder's entries, on the disk: a power cut then leaves them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network file systems cannot flush a folder; its files are flushed one by one
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def flush_tree(root: Path) -> None:
    """``flush`` every file and folder below ``root``, and ``root`` itself."""
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            flush(Path(folder, name))
        flush(Path(folder))


def tree_bytes(root: Path) -> int:
    """Bytes of all files below ``root``, or of the file ``root``."""
    total = 0
    for path in [root] if root.is_file() else root.rglob("*"):
        with suppress(FileNotFoundError):  # a writer's temporary file, gone by now
            total += path.stat().st_size if path.is_file() else 0
    return total


def discard(path: Path) -> None:
    """Remove a folder or file so that, wherever a kill comes, no half of it keeps its name."""
    doomed = _building(path)
    _remove(doomed)
    os.replace(path, doomed)
    _remove(doomed)


def unused_name(path: Path) -> Path:
    """``path`` itself, or the first of ``<stem>-2<suffix>``, ``-3``, ... that is not there."""
    number = 1
    name = path
    while os.path.lexists(name):
        number += 1
        name = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return name


def _building(final: Path) -> Path:
    return final.with_name(f".{final.name}.building")


def _retired(final: Path) -> Path:
    return final.with_name(f".{final.name}.retired")


def _remove(path: Path) -> None:
    """Remove a folder, a file or a link, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_folder_name(name: str) -> bool:
    """Whether ``name`` may stand as one folder's name: it leads nowhere else, on any system."""
    return (
        bool(name)
        and not name.startswith(".")
        and name.isprintable()
        and not set(name) & set("/\\:")
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# --------------------------------------------------------------------------- locks

_GLANCE_SECONDS = 0.1  # after which a lock that ``writer_of`` looked at is free again


@contextmanager
def writer_lock(path: Path) -> Iterator[None]:
    """Hold the lock file ``path`` while the block runs.

    The kernel holds the lock (flock) and releases it however the process ends, so a killed one
    blocks nobody. The file stays and is empty while nobody writes. On a network file system the
    lock may not reach other hosts: a file that names another host is left to the user to judge.

    Raises:
        LockedStoreError: another process holds it, or this one already does; says which, and what
        to do.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _acquire(path, descriptor)
        try:
            yield
        finally:
            os.ftruncate(descriptor, 0)
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked child may hold the file open
    finally:
        os.close(descriptor)


def writer_of(path: Path) -> str | None:
    """Who holds the lock file ``path``, as ``process 7``; None if nobody does.

    Changes nothing, and keeps a lock that somebody wants for as good as no time.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        host, pid = _holder(descriptor)
        if host is None:
            return None
        if host != socket.gethostname():
            return f"process {pid} on host '{host}' (if it is dead, delete {path})"
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # closing drops it
    except BlockingIOError:
        return f"process {pid}"
    finally:
        os.close(descriptor)
    return None  # the name of one that was killed


def _acquire(path: Path, descriptor: int) -> None:
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_GLANCE_SECONDS)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        host, pid = _holder(descriptor)
        _refuse_other_host(path, host, pid)
        process = "another process" if pid is None else f"process {pid}"
        raise LockedStoreError(
            f"{path}: {process} writes to this store; wait for it or stop it"
        ) from error
    except OSError as error:
        raise LockedStoreError(
            f"{path}: cannot be locked ({error.strerror}); put cache.root on a local disk"
        ) from error
    _refuse_other_host(path, *_holder(descriptor))
    content = json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode()
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, content, 0)


def _refuse_other_host(path: Path, host: str | None, pid: int | None) -> None:
    if host not in (None, socket.gethostname()):
        raise LockedStoreError(
            f"{path}: process {pid} on host '{host}' writes to this store; if it is dead, delete "
            "the lock"
        )


def _holder(descriptor: int) -> tuple[str | None, int | None]:
    """Host and pid that the file names; nobody while it is empty or half written."""
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return str(holder["host"]), int(holder["pid"])
    except (ValueError, KeyError, TypeError):
        return None, None
