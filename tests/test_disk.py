"""Files and folders appear whole or not at all; one writer at a time, no dead one blocks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipeline.disk import (
    file_sha256,
    flush,
    flush_tree,
    naming,
    read_json,
    to_json,
    tree_bytes,
    unlock,
    write_bytes,
    write_json,
    writer_lock,
)
from pipeline.errors import DataError, LockedStoreError, StageError
from pipeline.folders import discard, folder_beside, move, recover_folder


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


def test_a_file_is_flushed_before_it_has_its_name_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, steps = tmp_path / "file", list[tuple[str, bool]]()

    def fsync(descriptor: int) -> None:
        what = "folder" if os.fstat(descriptor).st_ino == tmp_path.stat().st_ino else "file"
        steps.append((what, path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    write_bytes(path, b"text")
    assert steps == [("file", False), ("folder", True)]


def test_a_folder_is_flushed_before_it_has_its_name_and_its_parent_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final, steps = tmp_path / "out", list[tuple[int, bool]]()
    monkeypatch.setattr(
        os, "fsync", lambda file: steps.append((os.fstat(file).st_ino, final.exists()))
    )
    with folder_beside(final) as building:
        (building / "file").write_text("text")
    paths = [(final / "file", False), (final, False), (tmp_path, True)]
    assert steps == [(path.stat().st_ino, there) for path, there in paths]


@pytest.mark.parametrize("other_file_system", [False, True])
def test_a_folder_is_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other_file_system: bool
) -> None:
    source, target = tmp_path / "cache" / "store", tmp_path / "archive" / "store-2"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "file").write_text("text")
    real = os.replace

    def replace(old: Path, new: Path) -> None:
        if Path(old).parent != Path(new).parent:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        real(old, new)

    if other_file_system:
        monkeypatch.setattr(os, "replace", replace)
    move(source, target)
    assert (target / "sub" / "file").read_text() == "text"
    assert os.listdir(target.parent) == ["store-2"]
    assert os.listdir(source.parent) == []


def test_a_move_that_stops_leaves_the_source_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "store", "text")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(OSError, match="No space left"):
        move(tmp_path / "store", tmp_path / "archive" / "store")
    assert (tmp_path / "store" / "file").read_text() == "text"
    assert os.listdir(tmp_path / "archive") == []


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
    for damaged in (b"{", b"\xff", b"[" * 100_000, b"1" * 5_000):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="not valid JSON") as caught:
            read_json(path, stage="prepare")
        assert "\n" not in str(caught.value)


def test_json_has_null_for_what_is_not_finite(tmp_path: Path) -> None:
    value = {"a": [1.5, float("nan"), (float("-inf"), None)], "b": {"c": float("inf"), "d": True}}
    write_json(tmp_path / "file", value)
    text = (tmp_path / "file").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": [1.5, None, [None, None]],
        "b": {"c": None, "d": True},
    }
    assert to_json({"b": 1, "a": 0.1}, sort_keys=False) == '{"b": 1, "a": 0.1}'


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


# --------------------------------------------------------------------------- locks


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
            f"{path}: process {os.getpid()} holds this lock; wait for it or stop it"
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
        assert f"process {other.pid} holds this lock" in refusal(path)
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
    assert all("holds this lock; wait for it or stop it" in text for text in refused)


CLEAR = "if it is dead, clear its locks with `samfed cache unlock --yes`"


def test_a_lock_of_another_host_is_refused(path: Path) -> None:
    write(path, host="elsewhere", pid=7)
    message = f"{path}: process 7 on host 'elsewhere' holds this lock"
    assert refusal(path) == f"{message}; {CLEAR}"


def test_locks_of_other_hosts_are_named_together_and_cleared_at_once(path: Path) -> None:
    """As after the restart of a container, which gives the host another name."""
    folder = path.parent
    for name, host in (("client", "old"), ("a", "old"), ("b", "older"), ("c", None)):
        write(folder / f"{name}.lock", **({"host": host, "pid": 7} if host else {}))
    write(folder / "killed.lock", host=socket.gethostname(), pid=2**22 + 1)
    before = refusal(path)
    assert before == (
        f"{path}: process 7 on host 'old' holds this lock (other hosts' names are also in "
        f"a.lock, b.lock); {CLEAR}"
    )
    found = unlock(folder, clear=False)
    assert found.text() == "\n".join(
        [
            f"{folder}/a.lock: process 7 on host 'old'",
            f"{folder}/b.lock: process 7 on host 'older'",
            f"{path}: process 7 on host 'old'",
            "give --yes to clear these, if nothing writes there",
        ]
    )
    assert refusal(path) == before
    cleared = unlock(folder, clear=True)
    assert cleared.as_json() == {
        "cleared": True,
        "locks": {str(p): h for p, h in found.holders.items()},
    }
    assert cleared.text().endswith("\ncleared")
    assert unlock(folder, clear=True).text() == "no lock names another host"
    with writer_lock(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_lock_that_the_kernel_holds_is_not_cleared(path: Path) -> None:
    """On some network file systems the kernel's lock reaches other hosts."""
    write(path, host="elsewhere", pid=7)
    with path.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert unlock(path.parent, clear=True).holders == {}
        assert refusal(path) == (
            f"{path}: process 7 on host 'elsewhere' holds this lock; wait for it or stop it"
        )
    assert list(unlock(path.parent, clear=True).holders) == [path]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"pid": 1}', "7", "\udcff", '{"pid": 1e999, "host": ""}', "[" * 9999]
)
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


def test_a_look_at_a_lock_refuses_nobody(path: Path) -> None:
    """``unlock`` holds the lock of a killed process for a moment."""
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


def test_a_forked_child_does_not_have_its_parents_lock(path: Path) -> None:
    """Neither does it free the lock when it ends, nor keep it when the parent is killed."""
    code = (
        "import os, sys, time; from pathlib import Path; from pipeline.disk import writer_lock\n"
        "path = Path(sys.argv[1])\n"
        "with writer_lock(path):\n"
        "    if not os.fork(): sys.exit()\n"
        "    os.wait()\n"
        "    child = os.fork()\n"
        # in one write each, so that the lines of parent and child cannot mix
        "    os.write(1, f'{child} {path.stat().st_size > 0}\\n'.encode())\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
    ) as parent:
        assert parent.stdout is not None
        children = sorted(parent.stdout.readline().split() for _ in range(2))
        child = next(int(number) for number, _ in children if number != b"0")
        try:
            assert {named for _, named in children} == {b"True"}
            assert f"process {parent.pid} holds this lock" in refusal(path)
            parent.kill()
            parent.wait()
            with writer_lock(path):
                pass
        finally:
            os.kill(child, signal.SIGKILL)
