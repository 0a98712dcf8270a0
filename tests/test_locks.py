"""One writer at a time, and a dead one does not block for ever."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipeline.disk import writer_lock, writer_of
from pipeline.errors import LockedStoreError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "locks" / "client.lock"


def refusal(path: Path) -> str:
    before = path.read_bytes()
    with pytest.raises(LockedStoreError) as caught, writer_lock(path):
        pass
    assert path.read_bytes() == before  # left to its holder
    return str(caught.value)


def write(path: Path, **holder: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(holder))


def test_the_lock_names_its_holder_and_is_emptied(path: Path) -> None:
    with writer_lock(path):
        holder = json.loads(path.read_text())
        assert holder["pid"] == os.getpid()
        assert holder["host"] == socket.gethostname()
    assert list(path.parent.iterdir()) == [path]
    assert path.read_bytes() == b""


def test_a_second_writer_is_refused(path: Path) -> None:
    with writer_lock(path):
        assert refusal(path) == (
            f"{path}: process {os.getpid()} writes to this store; wait for it or stop it"
        )
    with writer_lock(path):
        pass


def test_a_second_process_is_refused(path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pipeline.disk import writer_lock\n"
        "with writer_lock(Path(sys.argv[1])):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        assert f"process {other.pid} writes to this store" in refusal(path)
        other.kill()  # it cannot clean up
        other.wait()
    assert json.loads(path.read_text())["pid"] == other.pid
    with writer_lock(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_of_many_that_find_a_dead_holder_one_gets_the_lock(path: Path) -> None:
    """Two that both saw the dead holder: neither may take what the other has just taken."""
    write(path, host=socket.gethostname(), pid=2**22 + 1, started="123")
    inode = path.stat().st_ino
    together, held, refused, others = threading.Barrier(8), [], [], threading.Semaphore(0)

    def take() -> None:
        together.wait()
        try:
            with writer_lock(path):
                held.append(1)
                for _ in range(7):  # until all others have tried
                    assert others.acquire(timeout=20)
        except LockedStoreError as error:
            refused.append(str(error))
            others.release()

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 1
    assert path.stat().st_ino == inode  # nobody unlinks a lock that another may hold
    assert len(refused) == 7
    assert all("writes to this store; wait for it or stop it" in text for text in refused)


def test_a_lock_of_another_host_is_refused(path: Path) -> None:
    write(path, host="elsewhere", pid=7, started="123")
    assert refusal(path) == (
        f"{path}: process 7 on host 'elsewhere' writes to this store; if it is dead, delete "
        "the lock"
    )


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', "7", "\udcff"])
def test_a_lock_that_names_nobody_is_free(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(text, errors="surrogateescape")
    with writer_lock(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_file_system_without_locks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(LockedStoreError) as caught, writer_lock(path):
        pass
    assert str(caught.value) == (
        f"{path}: cannot be locked (No locks available); put cache.root on a local disk"
    )


def test_who_writes(path: Path) -> None:
    """To ask takes the lock from nobody."""
    assert writer_of(path) is None
    assert not path.exists()
    with writer_lock(path):
        assert writer_of(path) == writer_of(path) == f"process {os.getpid()}"
    assert writer_of(path) is None
    write(path, host=socket.gethostname(), pid=2**22 + 1)  # killed
    path.chmod(0o444)
    assert writer_of(path) is None
    path.chmod(0o644)
    with writer_lock(path):
        pass
    write(path, host="elsewhere", pid=7)
    assert writer_of(path) == f"process 7 on host 'elsewhere' (if it is dead, delete {path})"


def test_a_look_at_a_lock_refuses_nobody(path: Path) -> None:
    """``writer_of`` holds the lock of a killed process for a moment."""
    write(path, host=socket.gethostname(), pid=2**22 + 1)
    with path.open() as looked_at:
        fcntl.flock(looked_at, fcntl.LOCK_SH)
        done = threading.Timer(0.02, fcntl.flock, (looked_at, fcntl.LOCK_UN))
        done.start()
        with writer_lock(path):
            pass
        done.join()


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_the_lock_is_released_after_an_error(path: Path, kind: type[BaseException]) -> None:
    with pytest.raises(kind), writer_lock(path):
        raise kind
    assert path.read_bytes() == b""
    with writer_lock(path):
        pass
