"""Files written whole or not at all, digests of files, and locks for one writer at a time.

What is to last is written in this order: bytes, flush, rename, flush of the folder. (Folders:
``pipeline.folders``.)
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout, lock_descriptor

from pipeline.errors import DataError, LockedStoreError, StageError

_TEMPORARY = ".samfed-tmp"  # so that ours are known wherever they are found
_OUR_TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}" + re.escape(_TEMPORARY))
_NAME_BYTES = 200  # file systems take 255, and we add a suffix
_GLANCE_SECONDS = 0.1  # after which a lock that ``unlock`` looked at is free again


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError without a file, as that of a full disk, leave the block naming ``path``."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``path`` as ``writing`` does."""
    with writing(path) as file:
        file.write(content)


@contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file that becomes ``path`` atomically and durably when the block ends without error.

    Readers see the old file or the new, never a part. A link in its place is replaced: it may lead
    into DVC's cache, where nothing may change.
    """
    path = real(path.parent) / path.name
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_TEMPORARY}")
    try:
        with naming(path), temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)


def write_json(path: Path, value: Any, **how: Any) -> None:
    """Write ``value`` as indented ``to_json``, atomically; the same value, same bytes."""
    write_bytes(path, (to_json(value, indent=1, **how) + "\n").encode())


def to_json(value: Any, **how: Any) -> str:
    """Return ``value`` as JSON with sorted keys; NaN and infinity, which JSON lacks, become null.

    Args:
        how: what else ``json.dumps`` is told.
    """
    return json.dumps(_finite(value), allow_nan=False, **{"sort_keys": True, **how})


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path, *, stage: str) -> Any:
    """Read a JSON file that ``stage`` (a samfed command) writes.

    Raises:
        StageError: the file is missing. DataError: it is not JSON.
    """
    if not path.is_file():
        raise StageError(f"{path}: not found; run `samfed {stage}` first")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: not valid JSON ({error}); delete it and run `samfed {stage}`"
        ) from error


def real(path: Path) -> Path:
    """Return where ``path`` leads once its links are followed, whether or not it is there."""
    return Path(os.path.realpath(path))


def flush(path: Path) -> None:
    """Put a file's bytes, or a folder's entries, on the disk: a power cut then leaves them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
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
        for path in (*(Path(folder, name) for name in names), Path(folder)):
            flush(path)


def tree_bytes(root: Path) -> int:
    """Return the bytes of all files below ``root``, or of the file ``root``."""
    total = 0
    for path in [root] if root.is_file() else _files(root):
        with suppress(FileNotFoundError):  # a writer's temporary file, gone by now
            total += path.stat().st_size
    return total


def leftovers(root: Path, *, seconds: float = 60 * 60) -> list[Path]:
    """List temporary files below ``root`` that killed ``write_bytes`` left, untouched for an hour.

    A write takes seconds, so an old one is nobody's. (Locks would not tell: single files are
    written under many, or none.) Who knows that nobody else writes may list those of no age.
    """
    latest, found = time.time() - seconds, []
    for path in _files(root):
        with suppress(FileNotFoundError):  # written by now
            if _OUR_TEMPORARY.fullmatch(path.name) and path.lstat().st_mtime < latest:
                found.append(path)
    return sorted(found)


def is_folder_name(name: str) -> bool:
    """Tell whether ``name`` can be one folder's name that leads nowhere else, on any system."""
    fits = name.isprintable() and len(name.encode()) <= _NAME_BYTES
    return fits and re.fullmatch(r"[^./\\:][^/\\:]*", name) is not None


def is_site_name(name: str) -> bool:
    """Tell whether a client may have this name: a folder's, but not the server's, and trimmed."""
    return is_folder_name(name) and name == name.strip() and name.casefold() != "server"


def _files(root: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(root, followlinks=True):
        yield from (Path(folder, name) for name in names)


# --------------------------------------------------------------------------- locks

_CLEAR = "if it is dead, clear its locks with `samfed cache unlock --yes`"


@contextmanager
def writer_lock(path: Path) -> Iterator[None]:
    """Hold the lock file ``path`` while the block runs.

    The kernel holds the lock and releases it however the process ends, so a killed one blocks
    nobody; forked children do not have it. The file stays, and is empty while nobody writes. On a
    network file system the kernel's lock may not reach other hosts: a file that names another host
    is left to the user to judge (``unlock``).

    Raises:
        LockedStoreError: another process holds it, or this one already does; says which, and what
        to do.
    """
    real(path).parent.mkdir(parents=True, exist_ok=True)
    with _kernel_lock(path) as lock:
        holder, elsewhere = _holder(path)
        if elsewhere:
            others = ", ".join(other.name for other in _of_other_hosts(path.parent))
            also = f" (other hosts' names are also in {others})" if others else ""
            raise LockedStoreError(f"{path}: {holder} holds this lock{also}; {_CLEAR}")
        with naming(path):
            path.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        try:
            yield
        finally:
            if lock.is_locked:  # which it is not in a forked child
                with suppress(FileNotFoundError):  # somebody removed the folder
                    path.write_bytes(b"")


@dataclass(frozen=True)
class UnlockResult:
    """Lock files that name another host although the kernel here sees no lock on them."""

    holders: dict[Path, str]
    cleared: bool

    def text(self) -> str:
        """Return a line for each lock, and one for what became of them."""
        lines = [f"{path}: {holder}" for path, holder in self.holders.items()]
        end = "cleared" if self.cleared else "give --yes to clear these, if nothing writes there"
        return "\n".join([*lines, end if lines else "no lock names another host"])

    def as_json(self) -> dict[str, Any]:
        """Return the same for machines."""
        return {"cleared": self.cleared, "locks": {str(k): v for k, v in self.holders.items()}}


def unlock(folder: Path, *, clear: bool) -> UnlockResult:
    """Find, and ``clear`` if told, the locks in ``folder`` that other hosts hold or left behind."""
    found = _of_other_hosts(folder)
    for path in found if clear else ():
        with _kernel_lock(path):
            path.write_bytes(b"")
    return UnlockResult(found, clear)


@contextmanager
def _kernel_lock(path: Path) -> Iterator[FileLock]:
    lock = FileLock(path, timeout=_GLANCE_SECONDS, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire(poll_interval=_GLANCE_SECONDS / 4)
    except Timeout as error:
        holder = _holder(path)[0] or "another process"
        raise LockedStoreError(
            f"{path}: {holder} holds this lock; wait for it or stop it"
        ) from error
    except OSError as error:
        if error.filename is not None:  # the file cannot be opened
            raise
        raise LockedStoreError(
            f"{path}: cannot be locked ({error.strerror}); put cache.root on a local disk"
        ) from error
    try:
        yield lock
    finally:
        lock.release()


def _is_free(path: Path) -> bool:
    """Tell whether the kernel would give the lock; asks twice, as another may only look too."""
    with path.open("r+b" if os.access(path, os.W_OK) else "rb") as file:  # NFS wants the former
        for pause in (0, _GLANCE_SECONDS):
            time.sleep(pause)
            if lock_descriptor(file.fileno(), blocking=False):
                return True
    return False


def _of_other_hosts(folder: Path) -> dict[Path, str]:
    """Return the locks whose file names another host but which nobody holds here."""
    found = {}
    for path in sorted(folder.glob("*.lock")):
        holder, elsewhere = _holder(path)
        if holder is not None and elsewhere and _is_free(path):
            found[path] = holder
    return found


def _holder(path: Path) -> tuple[str | None, bool]:
    """Read whom the file names, and whether that host has another name than this one.

    It names nobody while it is not there, empty or half written.
    """
    try:
        holder = json.loads(path.read_bytes())
        process, host = f"process {int(holder['pid'])}", str(holder["host"])
    except (FileNotFoundError, ArithmeticError, LookupError, RecursionError, TypeError, ValueError):
        return None, False
    if host == socket.gethostname():
        return process, False
    return f"{process} on host '{host}'", True
