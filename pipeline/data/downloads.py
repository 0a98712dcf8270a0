"""Downloads that go on where they stopped, of files whose sha256 is known before they are read.

The bytes gather in ``<name>.part``; ``<name>.part.version`` holds what the server calls its version
of the file (ETag, else Last-Modified). A later request asks for the rest of that version alone, so
a file that has changed meanwhile is received anew. The part takes its name last, once its sha256
is right.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import urljoin, urlsplit

from filelock import lock_descriptor

from pipeline.disk import file_sha256, flush, naming, write_bytes
from pipeline.errors import ConfigError, DataError, LockedStoreError, NetworkError, first_line
from pipeline.progress import Progress

if TYPE_CHECKING:
    import requests

PAUSES_SECONDS = (1, 4, 15)  # after which a request that failed is made again
_CHUNK = 1 << 16  # what was read of a chunk is lost where the connection breaks
_TIMEOUTS_SECONDS = (15, 60)  # to connect, and from one packet to the next
_MEGABYTE = 10**6
_log = logging.getLogger("samfed")


@dataclass(frozen=True)
class RemoteFile:
    """A file at a stable address.

    ``sha256`` is 64 hexadecimal digits; ``confirmed`` says whether independent sources agree on it.
    ``bytes`` is its size, None where only the server knows it.
    """

    url: str
    name: str
    sha256: str
    bytes: int | None = None
    confirmed: bool = True


def archive_lock(folder: Path) -> Path:
    """Return the lock of who receives or reads the archives in ``downloads/<name>`` of a cache."""
    return folder.parents[1] / "locks" / f"fetch-{folder.name}.lock"


def require_pooch() -> Any:
    """Return pooch, which is in the extra ``fetch``.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import pooch
    except ModuleNotFoundError as error:
        raise ConfigError(
            "samfed fetch: pooch is not installed; run pip install 'samfed[fetch]'"
        ) from error
    return pooch


def remote_bytes(file: RemoteFile) -> int | None:
    """Return a file's size, from the server where it is not known; None if that does not say.

    Raises:
        NetworkError: the server cannot be reached or does not have the file.
    """
    if file.bytes is not None:
        return file.bytes
    require_pooch()
    import requests

    try:
        with requests.head(
            file.url,
            headers={"Accept-Encoding": "identity"},
            hooks={"response": lambda response, **_: _check_redirect(response, file.url)},
            allow_redirects=True,
            timeout=_TIMEOUTS_SECONDS,
        ) as response:
            if response.status_code in (403, 405, 501):
                return None  # it gives files to whoever asks, but no heads
            response.raise_for_status()
            return _length(response)
    except requests.RequestException as error:
        raise _network_error(file, error, advice="run the same command later") from error


def partial_bytes(path: Path) -> int:
    """Return how much of the file ``path`` is there: all of it, the part, or nothing."""
    for each in (path, _part_of(path)):
        if each.is_file():
            return each.stat().st_size
    return 0


def download(
    file: RemoteFile,
    folder: Path,
    *,
    progress: Progress | None = None,
    pauses: Sequence[float] = PAUSES_SECONDS,
) -> Path:
    """Receive ``file`` into ``folder``, or only check it if it is there; return its path.

    Whatever ends it early leaves the part, and the same call continues. A request that fails is
    made again after each of ``pauses`` (seconds), and from the first pause on after every success.

    Raises:
        NetworkError: the server cannot be reached, refuses, or leads to an unsafe address.
        DataError: the bytes have another size or sha256. What was received is then removed, or
        gets another name if the digest is not confirmed; a file that was there before stays.
        LockedStoreError: another process receives the same file.
    """
    final = folder / file.name
    if final.is_file():
        _check_digest(file, final, advice="move it away and run the same command again")
        return final
    folder.mkdir(parents=True, exist_ok=True)
    part = _part_of(final)
    with _alone(part) as stream, naming(part):
        _receive(file, stream, _version_of(part), progress=progress, pauses=pauses)
        os.fsync(stream.fileno())
    _check_received(file, part)
    os.replace(part, final)
    flush(folder)
    _version_of(part).unlink(missing_ok=True)
    return final


def _part_of(final: Path) -> Path:
    return final.with_name(f"{final.name}.part")


def _version_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.version")


def _check_received(file: RemoteFile, part: Path) -> None:
    """Remove the part if its digest is wrong, or keep it by another name if ours may be wrong."""
    doubtful = part.with_name(f"{file.name}.unverified")
    try:
        _check_digest(
            file,
            part,
            advice="it is removed, as the publisher's file has changed or was damaged on the way"
            if file.confirmed
            else f"it is kept as {doubtful}, as the expected digest comes from one source alone; "
            "compare it with the publisher's",
        )
    except DataError:
        if file.confirmed:
            part.unlink()
        else:
            os.replace(part, doubtful)
        _version_of(part).unlink(missing_ok=True)
        raise


def _check_digest(file: RemoteFile, path: Path, *, advice: str) -> None:
    found = file_sha256(path)
    if found != file.sha256:
        raise DataError(
            f"{path}: sha256 is {found[:12]}..., expected {file.sha256[:12]}... "
            f"({file.url}); {advice}"
        )


@contextmanager
def _alone(part: Path) -> Iterator[BinaryIO]:
    """Open the part for one process at a time; the kernel frees it however that ends."""
    with part.open("ab") as stream:
        free = lock_descriptor(stream.fileno(), blocking=False)
        # who waited for the lock of a part that has got its name since would write into that file
        if not free or not part.exists() or not os.path.samefile(part, stream.fileno()):
            raise LockedStoreError(
                f"{part}: another process receives this file; wait for it, then run the same "
                "command again"
            )
        yield stream


def _receive(
    file: RemoteFile,
    stream: BinaryIO,
    version: Path,
    *,
    progress: Progress | None,
    pauses: Sequence[float],
) -> None:
    """Fill ``stream``, with as many requests as that takes."""
    require_pooch()
    import requests

    failures = 0
    while True:
        transfer, before = _Transfer(file, stream, version, progress), stream.tell()
        try:
            return transfer.run()
        except requests.RequestException as error:
            failures = 1 if stream.tell() > before + _CHUNK else failures + 1
            if not _may_pass(error) or failures > len(pauses):
                raise _network_error(file, error, advice=_manual(file, stream)) from error
            pause = pauses[failures - 1]
            _log.warning("%s: %s; trying again in %g s", file.name, _reason(error), pause)
            time.sleep(pause)


class _Transfer:
    """One request for what is not there yet of a file; also the display that pooch advances."""

    def __init__(
        self, file: RemoteFile, stream: BinaryIO, version: Path, progress: Progress | None
    ) -> None:
        self.file, self.stream, self.version, self.progress = file, stream, version, progress
        self.total = 0  # pooch sets it, to the bytes of this answer
        self.expected = file.bytes
        self.offset = stream.seek(0, os.SEEK_END)
        self.response: requests.Response | None = None

    def run(self) -> None:
        """Append the rest to the stream.

        Raises:
            requests.RequestException: it broke off or was refused. DataError: the size is wrong.
            NetworkError: it leads to an unsafe address.
        """
        if self.offset and self.offset == self.expected:
            return
        pooch = require_pooch()
        get = pooch.HTTPDownloader(
            progressbar=self,
            chunk_size=_CHUNK,
            headers=self._headers(),
            hooks={"response": self._arrive},
            timeout=_TIMEOUTS_SECONDS,
        )
        try:
            get(self.file.url, self.stream, None)
        finally:
            if self.response is not None:
                self.response.close()

    def _headers(self) -> dict[str, str]:
        headers = {"Accept-Encoding": "identity"}  # else neither sizes nor ranges are the file's
        if self.offset:
            headers["Range"] = f"bytes={self.offset}-"
            if self.version.is_file():
                headers["If-Range"] = self.version.read_text(encoding="latin-1")
        return headers

    def _arrive(self, response: requests.Response, **_: Any) -> None:
        """Look at an answer's head before its bytes: does it continue the part, or start anew?"""
        self.response = response
        if response.is_redirect:
            _check_redirect(response, self.file.url)
        elif response.status_code == 416 or _start(response) not in (None, self.offset):
            self._restart()  # the part is longer than the file, or the server sends another range
            response.status_code, response.reason = 503, "the answer does not continue the part"
        elif response.ok:
            if response.status_code == 200:
                self._restart()
            length = _length(response)
            self._check_size(None if length is None else self.offset + length)
            self._keep_version(response)

    def _restart(self) -> None:
        self.stream.truncate(0)
        self.offset = self.stream.seek(0)

    def _check_size(self, offered: int | None) -> None:
        if offered is None:
            return
        if self.file.bytes not in (None, offered):
            raise DataError(
                f"{self.file.url}: has {offered:,} bytes, expected {self.file.bytes:,}; the "
                "publisher has changed the file, or a page was sent instead of it"
            )
        self.expected = offered

    def _keep_version(self, response: requests.Response) -> None:
        """Remember which file this is; a weak ETag does not promise the same bytes."""
        tag = response.headers.get("ETag", "W/")
        version = response.headers.get("Last-Modified", "") if tag.startswith("W/") else tag
        if version:
            write_bytes(self.version, version.encode("latin-1"))
        else:
            self.version.unlink(missing_ok=True)

    def update(self, _: int) -> None:
        """Show how far it is, and stop a server that sends without end."""
        done = self.stream.tell()
        if self.expected is not None and done > self.expected:
            raise DataError(f"{self.file.url}: sends more than the {self.expected:,} bytes it has")
        if self.progress is not None:
            total = self.expected or done
            self.progress(self.file.name, done // _MEGABYTE, -(-total // _MEGABYTE), "MB")

    def reset(self) -> None:
        """Do nothing: pooch resets a display before it fills it."""

    def close(self) -> None:
        """Do nothing: the display is the caller's."""


def _length(response: requests.Response) -> int | None:
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else None


def _start(response: requests.Response) -> int | None:
    """Return where the range of a partial answer starts; -1 if it does not say, None if whole."""
    if response.status_code != 206:
        return None
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(found[1]) if found else -1


def _check_redirect(response: requests.Response, origin: str) -> None:
    """Let an answer lead to https, or elsewhere on the same host, and nowhere else."""
    if not response.is_redirect:
        return
    target = urlsplit(urljoin(response.url, response.headers["Location"]))
    first = urlsplit(origin)
    same = (target.scheme, target.hostname) == (first.scheme, first.hostname)
    if target.scheme != "https" and not same:
        response.close()
        raise NetworkError(
            f"{origin}: leads to {target.scheme}://{target.netloc}, which is not https; nothing "
            "was read from there"
        )


def _may_pass(error: requests.RequestException) -> bool:
    """Tell whether the same request may succeed in a while."""
    import requests

    if isinstance(error, requests.HTTPError) and error.response is not None:
        return error.response.status_code >= 500 or error.response.status_code in (408, 429)
    passing = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
    return isinstance(error, passing) and not isinstance(error, requests.exceptions.SSLError)


def _reason(error: requests.RequestException) -> str:
    """Say in a few words what went wrong, as the libraries below do not."""
    import requests

    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"the server answers {error.response.status_code} {error.response.reason}"
    kinds = {
        requests.exceptions.SSLError: "its certificate cannot be verified",
        requests.exceptions.ProxyError: "the proxy cannot be reached",
        requests.Timeout: "the server does not answer",
        requests.exceptions.ChunkedEncodingError: "the connection broke off",
    }
    found = (text for kind, text in kinds.items() if isinstance(error, kind))
    if isinstance(error, requests.ConnectionError):
        return next(found, "the server cannot be reached; is there a network?")
    return next(found, first_line(error))


def _manual(file: RemoteFile, stream: BinaryIO) -> str:
    final = Path(stream.name).with_name(file.name)
    kept = (
        f"{stream.tell():,} bytes are kept and the same command continues"
        if (stream.tell())
        else "run the same command later"
    )
    return f"{kept}, or put the file, downloaded with a browser, at {final}"


def _network_error(
    file: RemoteFile, error: requests.RequestException, *, advice: str
) -> NetworkError:
    return NetworkError(f"{file.url}: {_reason(error)}; {advice}")
