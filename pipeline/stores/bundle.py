"""One file that carries a part of a cache from the server to its sites.

A zip that any program opens, nothing in it compressed: ``manifest.json`` and the files that it
lists, each with its size and sha256. They are JSON, safetensors and ONNX; nothing in it is ever
executed, and nothing is taken from it before every file in it has been checked. What a zip says of
them beside (dates, a second copy of sizes) is not read: the sha256 of the whole covers it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline import __version__
from pipeline.disk import file_sha256, is_folder_name, to_json, writing
from pipeline.errors import DataError, FormatError
from pipeline.stores.label_store import LABEL_VERSION

FORMAT = 1
_MANIFEST = "manifest.json"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # zip's first: the same content gives the same bytes
_MANIFEST_BYTES = 2**20  # at most
_BLOCK = 2**20


class _DamageError(Exception):
    """A bundle is not what was written; the message says in what."""


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: int
    sha256: str


class _Manifest(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int
    kind: str
    labels: int  # LABEL_VERSION
    samfed: str
    files: dict[str, _File]


@dataclass(frozen=True)
class Bundle:
    """A bundle that was written or read."""

    path: Path
    kind: str
    sha256: str  # of the whole file
    files: dict[str, int]  # name and bytes of what is in it
    about: str = ""  # what it holds, as a sentence

    def text(self) -> str:
        """Return what it holds, and the digest that both sides can compare."""
        lines = [f"{name}: {size} bytes" for name, size in self.files.items()]
        return "\n".join([*lines, f"{self.path}: {self.about}", f"sha256 {self.sha256}"])

    def as_json(self) -> dict[str, Any]:
        """Return the same for machines."""
        return vars(self) | {"path": str(self.path)}


def write_bundle(path: Path, kind: str, contents: Mapping[str, Path | bytes]) -> Bundle:
    """Write files, or bytes, under their names into the bundle ``path``, atomically."""
    files = {name: _described(content) for name, content in contents.items()}
    manifest = _Manifest(
        format=FORMAT, kind=kind, labels=LABEL_VERSION, samfed=__version__, files=files
    )
    text = to_json(manifest.model_dump(), indent=1).encode()
    with writing(path) as target, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name, content in {_MANIFEST: text, **contents}.items():
            info = zipfile.ZipInfo(name, _EPOCH)
            with archive.open(info, "w", force_zip64=True) as entry:
                if isinstance(content, bytes):
                    entry.write(content)
                else:
                    with content.open("rb") as source:
                        shutil.copyfileobj(source, entry, _BLOCK)
    return Bundle(path, kind, file_sha256(path), {name: files[name].bytes for name in files})


def _described(content: Path | bytes) -> _File:
    if isinstance(content, bytes):
        return _File(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    return _File(bytes=content.stat().st_size, sha256=file_sha256(content))


@contextmanager
def unpacked(path: Path, kind: str, *, beside: Path) -> Iterator[tuple[Path, Bundle]]:
    """Yield a folder with the files of a bundle, all of them whole; it goes when the block ends.

    Args:
        kind: what must be in it. beside: an existing folder, on the file system to unpack to.

    Raises:
        DataError: the file is missing, damaged, or no bundle of this kind. FormatError: another
        samfed wrote it.
    """
    if not path.is_file():
        found = "found a folder, expected a file" if path.is_dir() else "no such file"
        raise DataError(f"{path}: {found}; run `samfed {kind} export` at the server")
    with TemporaryDirectory(dir=beside, prefix=f".{kind}-import-") as name:
        folder = Path(name)
        with _reading(path, kind), zipfile.ZipFile(path) as archive:
            manifest = _manifest(path, kind, archive)
            if sorted(archive.namelist()) != sorted([_MANIFEST, *manifest.files]):
                raise _DamageError("it holds other files than its manifest says")
            for each, expected in manifest.files.items():
                _unpack(archive, each, expected, folder)
        sizes = {each: file.bytes for each, file in manifest.files.items()}
        yield folder, Bundle(path, kind, file_sha256(path), sizes)


@contextmanager
def _reading(path: Path, kind: str) -> Iterator[None]:
    """Turn what bad bytes do to zip and JSON into one line."""
    try:
        yield
    except (
        _DamageError,
        zipfile.BadZipFile,
        ValueError,
        LookupError,
        EOFError,
        NotImplementedError,  # of zip: a feature that we never write
        RuntimeError,  # of zip: encrypted
    ) as error:
        reason = str(error) if isinstance(error, _DamageError) else "it is no zip of samfed's"
        raise DataError(
            f"{path}: damaged, or no file of `samfed {kind} export` ({reason}); copy it again"
        ) from error


def _manifest(path: Path, kind: str, archive: zipfile.ZipFile) -> _Manifest:
    info = archive.getinfo(_MANIFEST)
    if info.file_size > _MANIFEST_BYTES or info.compress_type != zipfile.ZIP_STORED:
        raise _DamageError("its manifest is too large")
    content = archive.read(info)
    try:
        raw = json.loads(content)
        found, made_by = (raw["kind"], raw["format"], raw["labels"]), raw["samfed"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise _DamageError("its manifest cannot be read") from error
    if found[0] != kind:
        raise DataError(f"{path}: found a {found[0]} export, expected a {kind} export")
    if found[1:] != (FORMAT, LABEL_VERSION):
        raise FormatError(
            f"{path}: of samfed {made_by} (format {found[1]}, labels {found[2]}), this is "
            f"samfed {__version__} (format {FORMAT}, labels {LABEL_VERSION}); install the server's"
        )
    try:
        return _Manifest.model_validate(raw)
    except ValidationError as error:
        raise _DamageError("its manifest says other things than expected") from error


def _unpack(archive: zipfile.ZipFile, name: str, expected: _File, folder: Path) -> None:
    """Write one file of a bundle, checked; no name leads out of ``folder``."""
    info = archive.getinfo(name)
    if not is_folder_name(name) or info.compress_type != zipfile.ZIP_STORED:
        raise _DamageError(f"{name!r} is no plain file")
    if info.file_size != expected.bytes:
        raise _DamageError(f"{name} has {info.file_size} bytes, expected {expected.bytes}")
    with archive.open(info) as source, (folder / name).open("xb") as target:
        shutil.copyfileobj(source, target, _BLOCK)
    if file_sha256(folder / name) != expected.sha256:
        raise _DamageError(f"{name} has another sha256 than the manifest says")
