"""Real processes of ``samfed`` that start at once: forks of one that has imported all of it.

Importing torch, torchvision and timm takes seconds. A test that kills commands, or lets DVC start
them, would pay that for each. The server of this module pays it once; every command is then a fork
of it with its own working folder and output, which ends, or can be killed, like any process.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parent.parent

# a command `samfed` for PATH; without site-packages it starts in hundredths of a second
SHIM = f"""\
#!{sys.executable} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect("ADDRESS")
    order = json.dumps({{"cwd": os.getcwd(), "arguments": sys.argv[1:]}})
    socket.send_fds(server, [order.encode()], [0, 1, 2])
    with server.makefile() as replies:
        replies.readline()  # the process id
        sys.exit(int(replies.readline()))
"""


class Fork:
    """One running command."""

    def __init__(self, server: socket.socket) -> None:
        self._replies = server.makefile()
        server.close()  # the file keeps the connection
        self.pid = int(self._replies.readline())

    def is_running(self) -> bool:
        """Whether the command has not ended yet."""
        return not select.select([self._replies], [], [], 0)[0]

    def kill(self, number: int) -> None:
        """Send the command a signal."""
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Return the exit code; of a command that a signal ended, its negative number."""
        with self._replies:
            return int(self._replies.readline())


class Forks:
    """The server as tests see it."""

    def __init__(self, folder: Path) -> None:
        self._address = folder / "socket"
        self.bin = folder / "bin"  # holds `samfed`, to be put first on PATH
        self.bin.mkdir()
        shim = self.bin / "samfed"
        shim.write_text(SHIM.replace("ADDRESS", str(self._address)))
        shim.chmod(0o755)

    def start(self, *arguments: str, cwd: Path = ROOT) -> Fork:
        """Start ``samfed`` with these arguments; its output is thrown away."""
        server = socket.socket(socket.AF_UNIX)
        server.connect(str(self._address))
        order = json.dumps({"cwd": str(cwd), "arguments": arguments})
        with open(os.devnull, "r+b") as nothing:
            socket.send_fds(server, [order.encode()], [nothing.fileno()] * 3)
        return Fork(server)


@contextlib.contextmanager
def start_server() -> Iterator[Forks]:
    """Start a server; it ends with this context, or with this process."""
    with tempfile.TemporaryDirectory() as name:
        forks = Forks(Path(name))
        command = [sys.executable, __file__, str(Path(name) / "socket")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        with subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as server:
            assert server.stdin is not None
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n"
            yield forks
            server.stdin.close()


def run_and_exit(cwd: str, arguments: list[str]) -> NoReturn:
    """Run a command in ``cwd`` and end this process with its exit code."""
    import cli

    code = 1
    try:
        os.chdir(cwd)
        cli.app(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # ONNX Runtime's exit handlers wait for threads that a fork does not have


def serve(address: str) -> None:
    """Fork a command for every connection, one after the other, until standard input ends."""
    import cli  # noqa: F401
    import pipeline.labelling.precompute
    import pipeline.results.evaluate
    import pipeline.results.report  # noqa: F401

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            with connection:
                order, files, *_ = socket.recv_fds(connection, 1 << 16, 3)
                child = os.fork()
                if child == 0:
                    listener.close()
                    for number, file in enumerate(files):
                        os.dup2(file, number)
                    run_and_exit(**json.loads(order))
                for file in files:
                    os.close(file)
                with contextlib.suppress(BrokenPipeError):  # whoever asked is gone
                    connection.sendall(f"{child}\n".encode())
                    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                    connection.sendall(f"{code}\n".encode())


if __name__ == "__main__":
    serve(sys.argv[1])
