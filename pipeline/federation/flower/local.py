"""A whole deployment on one machine: a SuperLink and sites' nodes, as processes on loopback.

For the demo, for measurements and for tests: with TLS, and keys that are made and registered here.
Everything that is started lies in one folder, and ends with the block that started it.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import psutil
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from flwr.proto.control_pb2 import RegisterNodeRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from pipeline.errors import SamfedError
from pipeline.federation.flower import QUIET
from pipeline.federation.flower.link import Link

HERE = "127.0.0.1"
START_SECONDS = 120.0
_HOME = "FLWR_HOME"
_PYTHON = Path(sys.executable)
_PACKAGE = Path(__file__).parents[3]


@contextmanager
def deployed(
    folder: Path, *, nginx: str | None = None, python: Path = _PYTHON
) -> Iterator[Deployment]:
    """Start a SuperLink in ``folder``; end it, and every node of it, with the block.

    Args:
        nginx: a program that stands between it and the sites, set up as ``docs/nginx.conf``.
        python: the interpreter; Flower's commands lie beside it.
    """
    started = Deployment(folder, python=python)
    try:
        started.start_superlink()
        if nginx is not None:
            started.start_proxy(nginx)
        yield started
    finally:
        started.stop()


class Deployment:
    """A SuperLink that asks for registered keys, and the nodes of some clients."""

    def __init__(self, folder: Path, *, python: Path = _PYTHON) -> None:
        self._python, self._bin = python, python.parent
        self._folder, self._tls = folder.resolve(), folder.resolve() / "tls"
        self._home = self._folder / "flwr"
        self.certificate = make_certificate(self._tls)
        self.link = Link(f"{HERE}:{free_port()}", self.certificate)
        self._fleet = self.link  # where sites reach it
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._nodes: dict[str, tuple[Path, Path]] = {}

    @property
    def fleet(self) -> Link:
        """How sites reach it, if need be through a proxy."""
        return self._fleet

    def start_superlink(self) -> None:
        """Start it, and return when it answers.

        Raises:
            SamfedError: it ends at once, or stays mute.
        """
        port = self.link.address.rpartition(":")[2]
        self._start(
            "superlink",
            *(self._bin / "flower-superlink", "--host", HERE, "--port", port),
            *("--enable-supernode-auth", "--database", self._folder / "superlink.db"),
            *("--ssl-certfile", self.certificate, "--ssl-ca-certfile", self.certificate),
            *("--ssl-keyfile", self._tls / "server.key"),
        )
        began = time.monotonic()
        while not _answers(int(port)):
            ended = self._processes["superlink"].poll() is not None
            if ended or time.monotonic() - began > START_SECONDS:
                raise SamfedError(f"the SuperLink does not start; see {self.log('superlink')}")
            time.sleep(0.05)

    def start_proxy(self, nginx: str) -> None:
        """Let sites reach it through the documented proxy."""
        port = free_port()
        shutil.copy(self.certificate, self._tls / "server.pem")
        text = (_PACKAGE / "docs" / "nginx.conf").read_text()
        text = text.replace("listen 443", f"listen {HERE}:{port}")
        text = text.replace(f"{HERE}:8000", self.link.address)
        (self._tls / "nginx.conf").write_text(text)
        options = ("-p", self._tls, "-c", self._tls / "nginx.conf", "-g", "daemon off;")
        self._start("proxy", nginx, *options)
        self._fleet = Link(f"{HERE}:{port}", self.certificate)

    def add_node(self, name: str, params: Path) -> None:
        """Make and register a site's key, and start its node with the site's settings."""
        self._nodes[name] = params.resolve(), self.register(name)
        self.start_node(name)

    def register(self, name: str) -> Path:
        """Make and register a site's key; return its file."""
        path = self._folder / f"{name}.key"
        public = make_key(path).public_key()
        request = RegisterNodeRequest(public_key=public_key_to_bytes(public), name=name)
        with self.link.open(ControlHttpClient, "flwr CLI") as control, self.link.reaching():
            control.RegisterNode(request)
        return path

    def start_node(self, name: str) -> None:
        """Start a node that has been added; whoever starts a run waits for it."""
        params, key = self._nodes[name]
        self._start(
            name,
            *(self._python, "-m", "pipeline", "site", "run", "--params", params),
            *("--name", name, "--superlink", self._fleet.address, "--key", key),
            *("--root-certificates", self.certificate),
        )

    def kill(self, name: str) -> None:
        """Let ``superlink`` or a site's node die at once, as a machine that loses power does.

        The ServerApps of runs are on the SuperLink's machine.
        """
        self._processes[name].kill()
        self._processes[name].wait()
        if name == "superlink":
            self._kill_all(self._server_apps())

    def log(self, name: str) -> Path:
        """Return the file of what a process says."""
        return self._folder / f"{name}.log"

    def stop(self) -> None:
        """End all processes, and wait for them.

        Flower starts some of its own in sessions of their own, which outlive their parent for a
        while, and would go on writing to the folder. They are known by their FLWR_HOME.
        """
        for process in reversed(self._processes.values()):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        while ours := self.running():
            self._kill_all(ours)
        for process in self._processes.values():
            process.wait()

    def running(self) -> list[psutil.Process]:
        """Return the processes of this deployment, those too that Flower started."""
        every = psutil.process_iter(["environ"])  # None of one that has ended
        return [p for p in every if (p.info["environ"] or {}).get(_HOME) == str(self._home)]

    def _server_apps(self) -> list[psutil.Process]:
        """Return the processes that Flower started for runs at the server."""
        found = []
        for process in self.running():
            with suppress(psutil.Error):
                if any("flwr-serverapp" in word for word in process.cmdline()):
                    found.append(process)
        return found

    @staticmethod
    def _kill_all(processes: list[psutil.Process]) -> None:
        for each in processes:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(processes)

    def _start(self, name: str, *command: object) -> None:
        here = {
            _HOME: str(self._home),
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
            "PYTHONPATH": os.pathsep.join([str(_PACKAGE), os.environ.get("PYTHONPATH", "")]),
            "PATH": os.pathsep.join([str(self._bin), os.environ["PATH"]]),
        }
        with self.log(name).open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [*map(str, command)],
                cwd=self._folder,
                env=os.environ | QUIET | here,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches them through us, in order
            )


def make_certificate(folder: Path) -> Path:
    """Make a certificate for loopback that is its own authority, for a month.

    Returns:
        ``ca.pem`` in ``folder``; beside it lies ``server.key``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "samfed on one machine")])
    # nginx looks for a name in what it calls, never for an address
    names = [x509.IPAddress(ip_address(HERE)), x509.DNSName("localhost")]
    addresses = x509.SubjectAlternativeName(names)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=30))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(addresses, critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / "ca.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    _write_key(folder / "server.key", key, PrivateFormat.PKCS8)
    return folder / "ca.pem"


def make_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Make a site's private key, as ``ssh-keygen -t ecdsa -b 384`` does."""
    key = ec.generate_private_key(ec.SECP384R1())
    _write_key(path, key, PrivateFormat.OpenSSH)
    return key


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey, form: PrivateFormat) -> None:
    path.touch(mode=0o600)
    path.write_bytes(key.private_bytes(Encoding.PEM, form, NoEncryption()))


def free_port() -> int:
    """Return a port of loopback that nobody uses now."""
    with socket.socket() as free:
        free.bind((HERE, 0))
        port: int = free.getsockname()[1]
        return port


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HERE, port)) == 0
