"""Real processes that start at once: forks of one that has imported everything.

Importing torch, torchvision and timm takes seconds. A test that kills commands, starts workers or
lets DVC run stages would pay that for each. A server pays it once, for all workers of pytest-xdist;
every process is then a fork of it with its own working folder, environment, session and output,
which ends, or can be killed, like any process.

``Forks.start`` starts one from here. ``Forks.bin`` is a folder of programs, ``samfed`` and
``python`` among them, to be put first on PATH: each becomes a fork that dies with the program.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock

ROOT = Path(__file__).parent.parent
PROGRAMS = Path(sys.executable).parent

#: What the server imports before it forks a program for the first time, beside samfed.
IMPORTS: dict[str, tuple[str, ...]] = {
    "python": (),
    "samfed": (),
    "dvc": ("dvc.cli.parser", "dvc.repo"),
    "flower-superlink": ("flwr.superlink.cli",),
    "flower-superexec": ("flwr.supercore.cli",),
    "flwr-serverapp": ("flwr.superlink.cli",),
}

# stands for a program; without site-packages it starts in hundredths of a second
SHIM = f"""\
#!{sys.executable} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect("ADDRESS")
    words = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
    order = {{"words": words, "cwd": os.getcwd(), "environment": dict(os.environ)}}
    socket.send_fds(server, [json.dumps(order).encode()], [0, 1, 2])
    with server.makefile() as replies:
        replies.readline()  # the process id
        code = int(replies.readline())
        sys.exit(code if code >= 0 else 128 - code)
"""


class Fork:
    """One running process, in a session of its own; it does not outlive this object."""

    def __init__(self, server: socket.socket) -> None:
        self._replies = server.makefile()
        server.close()  # the file keeps the connection
        self.pid = int(self._replies.readline())
        self._code: int | None = None

    def is_running(self) -> bool:
        """Whether the process has not ended yet."""
        return self._code is None and not select.select([self._replies], [], [], 0)[0]

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send the process a signal, if it is still there."""
        if self.is_running():
            with contextlib.suppress(ProcessLookupError):  # it has ended just now
                os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code; of a process that a signal ended, its negative number."""
        if self._code is None:
            if not select.select([self._replies], [], [], timeout)[0]:
                raise TimeoutError(f"process {self.pid} has not ended")
            with self._replies:
                self._code = int(self._replies.readline())
        return self._code


class Forks:
    """The server as tests see it; it ends with the last of them."""

    def __init__(self, address: Path) -> None:
        self._address = address
        self.bin = address.parent / "bin"
        self.python = self.bin / "python"  # for scripts, and modules with -m
        self._lease = self._connect()
        self._lease.sendall(b"{}")

    def _connect(self) -> socket.socket:
        server = socket.socket(socket.AF_UNIX)
        try:
            server.connect(str(self._address))
        except OSError:
            server.close()
            raise
        return server

    def start(
        self, *words: object, cwd: Path = ROOT, files: tuple[int | None, ...] = (None, None, None)
    ) -> Fork:
        """Start a program of ``bin`` with its arguments.

        Args:
            files: its standard input, output and errors; None is nothing.
        """
        order = {
            "words": [*map(str, words)],
            "cwd": str(cwd),
            "environment": dict(os.environ),
        }
        server = self._connect()
        with open(os.devnull, "r+b") as nothing:
            given = [nothing.fileno() if file is None else file for file in files]
            socket.send_fds(server, [json.dumps(order).encode()], given)
        return Fork(server)

    def talk(self, script: str, cwd: Path = ROOT) -> tuple[Fork, socket.socket]:
        """Start a Python script; return with it what its standard input and output speak to."""
        ours, theirs = socket.socketpair()
        with theirs:
            files = (theirs.fileno(), theirs.fileno(), sys.__stderr__.fileno())
            return self.start("python", script, cwd=cwd, files=files), ours

    def close(self) -> None:
        """Need the server no longer."""
        self._lease.close()


def connected(shared: Path) -> Forks:
    """Return the server of all processes that know the folder ``shared``; start it if need be."""
    note = shared / "forks.txt"
    with FileLock(shared / "forks.lock"):
        with contextlib.suppress(OSError):  # there is none yet, or it has ended
            return Forks(Path(note.read_text()))
        address = Path(tempfile.mkdtemp(prefix="samfed-forks-")) / "socket"
        (address.parent / "bin").mkdir()
        for name in IMPORTS:
            shim = address.parent / "bin" / name
            shim.write_text(SHIM.replace("ADDRESS", str(address)))
            shim.chmod(0o755)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        command = [sys.executable, __file__, str(address)]
        subprocess.run(
            command,
            env=environment,
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        note.write_text(str(address))
        return Forks(address)


# --------------------------------------------------------------------------- the server


def run_and_exit(words: list[str], cwd: str, environment: dict[str, str]) -> NoReturn:
    """Run a program in this process, and end it with the program's exit code."""
    code = 1
    try:
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(environment)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job has it ignored
        run(*words)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()  # Python's own, of semaphores above all
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)  # ONNX Runtime's exit handlers wait for threads that a fork does not have


def run(program: str, *words: str) -> None:
    """Do what the interpreter does for a program's words."""
    if program == "samfed":
        program, words = "python", ("-m", "pipeline", *words)
    if program != "python":
        sys.argv = [str(PROGRAMS / program), *words]
        runpy.run_path(sys.argv[0], run_name="__main__")
    elif words[0] == "-m":
        sys.argv = [*words[1:]]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [*words]
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")


def supervise(connection: socket.socket, order: dict[str, Any], files: list[int]) -> NoReturn:
    """Run the program in a child; tell its number and its exit code; kill it if nobody listens."""
    child = os.fork()
    if child == 0:
        connection.close()
        os.setsid()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        run_and_exit(**order)

    def kill_if_alone() -> None:
        connection.recv(1)  # nothing comes: it returns when the other side is closed
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)

    for file in files:
        os.close(file)
    threading.Thread(target=kill_if_alone, daemon=True).start()
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(f"{child}\n".encode())
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(f"{code}\n".encode())
    os._exit(0)


def import_samfed() -> None:
    """Import all of it, and what it imports on its way."""
    import pipeline.sam  # noqa: F401  (before segment_anything and timm import torchvision)

    for module in pkgutil.walk_packages([str(ROOT / "pipeline")], "pipeline."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def serve(listener: socket.socket) -> None:
    """Fork a program for every order, until no test needs this process any more."""
    leases: list[socket.socket] = []
    while ready := select.select([listener, *leases], [], [], None if leases else 60)[0]:
        if listener not in ready:
            leases = [lease for lease in leases if lease not in ready]
            if not leases:
                return
            continue
        connection, _ = listener.accept()
        content, files, *_ = socket.recv_fds(connection, 1 << 20, 3)
        order = json.loads(content or b"{}")
        if not order:
            leases.append(connection)
            continue
        for name in IMPORTS[order["words"][0]]:
            importlib.import_module(name)
        if os.fork() == 0:
            listener.close()
            supervise(connection, order, files)
        connection.close()
        for file in files:
            os.close(file)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # who has ended meanwhile
                pass


if __name__ == "__main__":
    import_samfed()
    gc.collect()
    gc.freeze()  # pages that no fork writes to are shared by all
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(sys.argv[1])
        listening.listen()
        if os.fork() == 0:  # who started this goes on, now that it is ready
            os.setsid()
            serve(listening)
            shutil.rmtree(Path(sys.argv[1]).parent)
        os._exit(0)
