"""One writer at a time: a locked file that names its holder."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import LockedStoreError

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
