"""An HTTP server of one file on the loopback interface, which behaves as badly as a test wants."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from pipeline.data.downloads import RemoteFile

CONTENT = bytes(range(256)) * 1000


@dataclass
class Site:
    """A server of one file; tests set how it behaves and read what it was asked for."""

    content: bytes = CONTENT
    etag: str | None = '"v1"'
    modified: str | None = None
    ranges: bool = True
    chunked: bool = False
    drops: list[int] = field(default_factory=list)  # bytes after which each answer breaks off
    status: list[int] = field(default_factory=list)  # of each answer, before the good ones
    moved_to: str | None = None
    asked: list[tuple[str, str | None]] = field(default_factory=list)  # method and Range
    address: str = ""

    @property
    def file(self) -> RemoteFile:
        sha256 = hashlib.sha256(CONTENT).hexdigest()
        return RemoteFile(f"{self.address}/weights.bin", "weights.bin", sha256, len(CONTENT))


class Handler(BaseHTTPRequestHandler):
    """Answers as its server's ``site`` says."""

    server: Server

    def do_HEAD(self) -> None:
        self.answer(b"")

    def do_GET(self) -> None:
        self.answer(None)

    def answer(self, body: bytes | None) -> None:
        site = self.server.site
        site.asked.append((self.command, self.headers["Range"]))
        if site.status:
            self.send_error(site.status.pop(0))
        elif site.moved_to and self.path != "/elsewhere":
            self.send_response(302)
            self.send_header("Location", site.moved_to)
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self.send_content(site, body)

    def send_content(self, site: Site, body: bytes | None) -> None:
        start, version = 0, site.etag or site.modified
        if site.ranges and (asked := self.headers["Range"]):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if self.headers.get("If-Range", version) != version:
                start = 0
        if start > len(site.content):
            self.send_error(416)
            return
        rest = site.content[start:]
        self.send_response(206 if start else 200)
        if start:
            total = len(site.content)
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        for name, value in (("ETag", site.etag), ("Last-Modified", site.modified)):
            if value:
                self.send_header(name, value)
        if not site.chunked:
            self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        if body is None:
            self.wfile.write(rest[: site.drops.pop(0)] if site.drops else rest)

    def log_message(self, *_: object) -> None:
        """Stay silent."""


class Server(ThreadingHTTPServer):
    """Answers on the loopback interface, at a free port."""

    daemon_threads = True
    site: Site


@contextmanager
def serve() -> Iterator[Site]:
    """Serve a file while the block runs."""
    with Server(("127.0.0.1", 0), Handler) as server:
        server.site = Site(address=f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.site
        finally:
            server.shutdown()
            thread.join()
