"""Files written whole or not at all, and digests of files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import DataError, StageError


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``path`` atomically: readers see the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON with sorted keys, atomically; the same value, same bytes."""
    write_bytes(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def read_json(path: Path, *, stage: str) -> Any:
    """Read a JSON file that ``stage`` (a samfed command) writes.

    Raises:
        StageError: the file is missing. DataError: it is not JSON.
    """
    if not path.is_file():
        raise StageError(f"{path}: not found; run `samfed {stage}` first")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(
            f"{path}: not valid JSON ({error}); delete it and run `samfed {stage}`"
        ) from error


@contextmanager
def folder_beside(final: Path) -> Iterator[Path]:
    """A new folder beside ``final`` that takes its place when the block ends without an error."""
    final.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    try:
        os.chmod(building, 0o777 & ~_umask())
        yield building
        _take_place(building, final)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _take_place(building: Path, final: Path) -> None:
    """Put ``building`` where ``final`` is; the old folder comes back if that fails."""
    if not final.exists():
        os.replace(building, final)
        return
    retired = Path(tempfile.mkdtemp(prefix=f".{final.name}.old.", dir=final.parent))
    try:
        os.replace(final, retired / final.name)
        try:
            os.replace(building, final)
        except BaseException:
            os.replace(retired / final.name, final)
            raise
    finally:
        shutil.rmtree(retired, ignore_errors=True)


def is_folder_name(name: str) -> bool:
    """Whether ``name`` may stand as one folder's name: it leads nowhere else, on any system."""
    return (
        bool(name)
        and not name.startswith(".")
        and name.isprintable()
        and not set(name) & set("/\\:")
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
