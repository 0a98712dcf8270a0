"""One writer at a time, and a dead one does not block for ever."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import LockedStoreError
from pipeline.locks import writer_lock


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


def test_the_lock_names_its_holder_and_goes(path: Path) -> None:
    with writer_lock(path):
        holder = json.loads(path.read_text())
        assert holder["pid"] == os.getpid()
        assert holder["host"] == socket.gethostname()
    assert list(path.parent.iterdir()) == []


def test_a_second_writer_is_refused(path: Path) -> None:
    with writer_lock(path):
        assert refusal(path) == (
            f"{path}: process {os.getpid()} writes to this store; wait for it or stop it"
        )
    with writer_lock(path):
        pass


def test_a_second_process_is_refused(path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pipeline.locks import writer_lock\n"
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
    assert path.exists()
    with writer_lock(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_lock_of_a_dead_process_is_taken_over(path: Path) -> None:
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"],
        capture_output=True,
        check=True,
        text=True,
    )
    write(path, host=socket.gethostname(), pid=int(dead.stdout), started="123")
    with writer_lock(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()


def test_a_reused_process_number_is_another_process(path: Path) -> None:
    write(path, host=socket.gethostname(), pid=os.getpid(), started="not this one")
    if not Path("/proc/self/stat").exists():
        pytest.skip("start times are known from /proc only")
    with writer_lock(path):
        pass


def test_a_lock_of_another_host_is_refused(path: Path) -> None:
    write(path, host="elsewhere", pid=7, started="123")
    assert refusal(path) == (
        f"{path}: process 7 on host 'elsewhere' writes to this store; if it is dead, delete "
        "the lock"
    )


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', "7", "\udcff"])
def test_an_unreadable_lock_is_refused(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(text, errors="surrogateescape")
    assert refusal(path) == (
        f"{path}: an unreadable lock; if no samfed writes to this cache, delete it"
    )


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_the_lock_goes_after_an_error(path: Path, kind: type[BaseException]) -> None:
    with pytest.raises(kind), writer_lock(path):
        raise kind
    assert not path.exists()
