"""Unpacking archives that others made, without trusting what they say about themselves."""

from __future__ import annotations

import shutil
import stat
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from pipeline.disk import naming
from pipeline.errors import DataError, first_line
from pipeline.progress import Progress

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
MAX_FILES = 1_000_000
MAX_BYTES = 200 * 2**30
_BLOCK = 2**20
_DAMAGE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,  # a zip's unknown compression
    RuntimeError,
)


class _Member(NamedTuple):
    """An entry of an archive; ``fault`` is why it must not be unpacked."""

    name: str
    is_folder: bool
    size: int
    fault: str | None
    open: Callable[[], IO[bytes] | None]


def is_archive(path: Path) -> bool:
    """Tell whether ``path`` is named as an archive that ``unpack`` takes."""
    return path.name.lower().endswith(ARCHIVE_SUFFIXES)


def archive_stem(path: Path) -> str:
    """Return an archive's name without its ending."""
    ending = next(each for each in ARCHIVE_SUFFIXES if path.name.lower().endswith(each))
    return path.name[: -len(ending)]


def unpack(
    archive: Path,
    folder: Path,
    *,
    max_files: int = MAX_FILES,
    max_bytes: int = MAX_BYTES,
    progress: Progress | None = None,
) -> int:
    """Unpack a zip or tar archive into ``folder`` and return the bytes of its files.

    The kind of archive is told by its content. Nothing is written outside of ``folder``, and no
    file there is replaced. Links, devices and permissions are never made. When this raises, the
    folder holds a part of the archive, so the caller unpacks into a folder that it would discard.

    Args:
        max_files: entries allowed, folders included.
        max_bytes: bytes allowed in all files together, when unpacked.

    Raises:
        DataError: it is damaged, encrypted or no archive; a member would leave the folder, is a
            link or a device, or has the name of another but for upper and lower case or another
            Unicode form; or it exceeds a limit. OSError: it cannot be read, or the disk is full.
    """
    advance = progress or (lambda *_: None)
    folder.mkdir(parents=True, exist_ok=True)
    checks = _Checks(archive, max_files, max_bytes)
    try:
        for member in _members(archive):
            target = folder / checks.path(member)
            if member.is_folder:
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            source = member.open()
            if source is not None:
                with source, target.open("xb") as file, naming(target):
                    shutil.copyfileobj(source, file, _BLOCK)
                checks.verify_size(member, target.stat().st_size)
            advance("unpacking", checks.files, checks.files)
    except OSError as error:
        if error.errno is not None:
            raise
        raise _damaged(archive, error) from error  # as gzip's, which comes from no system call
    except _DAMAGE as error:
        raise _damaged(archive, error) from error
    return checks.bytes


def _damaged(archive: Path, error: Exception) -> DataError:
    return DataError(
        f"{archive}: damaged or unknown archive ({first_line(error)}); expected a whole "
        f"{' or '.join(ARCHIVE_SUFFIXES)}; get it again, or unpack it yourself and give the folder"
    )


def _members(archive: Path) -> Iterator[_Member]:
    """Yield an archive's entries in its own order; each is opened before the next is asked for."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as packed:
            for each in packed.infolist():
                yield _Member(
                    each.filename,
                    each.is_dir(),
                    each.file_size,
                    _zip_fault(each),
                    lambda each=each: packed.open(each),  # type: ignore[misc]
                )
    else:
        with tarfile.open(archive, "r:*") as tape:
            for entry in tape:
                fault = None if entry.isreg() or entry.isdir() else "a link or a device"
                yield _Member(
                    entry.name,
                    entry.isdir(),
                    entry.size,
                    fault,
                    lambda entry=entry: tape.extractfile(entry),  # type: ignore[misc]
                )


def _zip_fault(entry: zipfile.ZipInfo) -> str | None:
    if entry.flag_bits & 1:
        return "encrypted"
    kind = stat.S_IFMT(entry.external_attr >> 16)
    return None if kind in (0, stat.S_IFREG, stat.S_IFDIR) else "a link or a device"


@dataclass
class _Checks:
    """What was unpacked so far, against the limits and the names taken."""

    archive: Path
    max_files: int
    max_bytes: int
    files: int = 0
    bytes: int = 0
    names: dict[str, tuple[str, bool]] = field(default_factory=dict)

    def path(self, member: _Member) -> Path:
        """Count a member and return where it goes, relative to the folder."""
        self.files, self.bytes = self.files + 1, self.bytes + max(member.size, 0)
        if self.files > self.max_files:
            raise DataError(f"{self.archive}: over {self.max_files} entries; nothing of it is kept")
        if self.bytes > self.max_bytes:
            raise DataError(
                f"{self.archive}: over {self.max_bytes} bytes when unpacked; nothing of it is kept"
            )
        fault = member.fault or _name_fault(member.name, member.is_folder)
        if fault is not None:
            raise DataError(
                f"{self.archive}: member {member.name!a} is {fault}; expected plain files inside "
                "the archive's own folder; unpack it yourself and give the folder"
            )
        path = PurePosixPath(member.name)
        if path.parts:  # else it is the archive's own folder, which tar names ./
            self._claim(path, member.is_folder)
        return Path(*path.parts)

    def verify_size(self, member: _Member, size: int) -> None:
        """Refuse a member that held another number of bytes than it said."""
        if size != member.size:
            raise DataError(
                f"{self.archive}: member {member.name!a} holds {size} bytes and says "
                f"{member.size}; the archive is damaged, get it again"
            )

    def _claim(self, path: PurePosixPath, is_folder: bool) -> None:
        """Take a name and its folders', which no other may have on any file system."""
        folders = [parent for parent in path.parents if parent.parts] + [path] * is_folder
        taken = [(self._first(each, True), each) for each in folders]
        if not is_folder:
            taken.append((self._first(path, False), path))
        for first, each in taken:
            if first is not None:
                raise DataError(
                    f"{self.archive}: members {first!a} and {str(each)!a} have one name on some "
                    "systems; unpack it yourself, rename one, and give the folder"
                )

    def _first(self, path: PurePosixPath, is_folder: bool) -> str | None:
        """Return who else has this name: folders may be named again, as they are spelt."""
        key = unicodedata.normalize("NFC", str(path)).casefold()
        known = key in self.names
        first = self.names.setdefault(key, (str(path), is_folder))
        again = first == (str(path), True) and is_folder
        return first[0] if known and not again else None


def _name_fault(name: str, is_folder: bool) -> str | None:
    """Tell why a name cannot be one of a file below the folder, on any system."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
        return "a path that leaves the folder, or would on another system"
    if not name.isprintable() or name.encode(errors="ignore").decode() != name:
        return "not printable text"
    return None if path.parts or is_folder else "without a name"
