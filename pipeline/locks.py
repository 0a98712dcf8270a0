"""One writer at a time: a lock file that names its holder."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import LockedStoreError


@contextmanager
def writer_lock(path: Path) -> Iterator[None]:
    """Hold the lock file ``path`` while the block runs.

    A lock left by a process of this host that is dead is taken over. Another host's processes
    cannot be seen from here, so its lock is left to the user to judge.

    Raises:
        LockedStoreError: another process holds it; says which, and what to do.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}
    written = path.with_name(f".{path.name}.{os.getpid()}")
    written.write_text(json.dumps(holder))
    try:
        for _ in range(2):  # the second try follows a dead holder's removal
            try:
                os.link(written, path)  # fails if it exists; never shows a half-written lock
                break
            except FileExistsError:
                _remove_if_dead(path)
        else:
            raise LockedStoreError(f"{path}: taken by another process at this moment; try again")
    finally:
        written.unlink(missing_ok=True)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _remove_if_dead(path: Path) -> None:
    try:
        holder = json.loads(path.read_text())
        host, pid, started = holder["host"], int(holder["pid"]), holder["started"]
    except FileNotFoundError:
        return  # released between the two looks
    except (ValueError, KeyError, TypeError) as error:
        raise LockedStoreError(
            f"{path}: an unreadable lock; if no samfed writes to this cache, delete it"
        ) from error
    if host != socket.gethostname():
        raise LockedStoreError(
            f"{path}: process {pid} on host '{host}' writes to this store; if it is dead, delete "
            "the lock"
        )
    if _started(pid) == started and started is not None:
        raise LockedStoreError(
            f"{path}: process {pid} writes to this store; wait for it or stop it"
        )
    path.unlink(missing_ok=True)


def _started(pid: int) -> str | None:
    """When a process of this host started, so that a reused pid is no match; None if dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return "alive" if not Path("/proc/self/stat").exists() and _signals(pid) else None
    return None if fields[0] == "Z" else fields[19]


def _signals(pid: int) -> bool:
    """Whether a process exists, where there is no /proc."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
