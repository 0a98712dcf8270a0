"""What an exported teacher is, in a JSON file beside it: ``teacher.onnx.json``.

The model's own files, and their sha256, are named in it. It is written last, so that a model
without one that fits was never finished, or is an earlier samfed's. No torch is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.disk import file_sha256, is_folder_name
from pipeline.errors import CorruptStoreError, StageError

AGAIN = "run `samfed export-onnx` again"


class OnnxFile(BaseModel):
    """One file of a model, as it was written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: int
    sha256: str


class About(BaseModel):
    """What a model is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: str
    samfed: str  # the version that wrote it
    identity: dict[str, Any]  # of its labels, as in the label stores
    precision: Literal["fp32", "fp16"]
    opset: int


class Sidecar(About):
    """What a model is, and its files by name: the model, and its weights where they are apart."""

    files: dict[str, OnnxFile]


def sidecar_path(model: Path) -> Path:
    """Return where the sidecar of ``model`` lies."""
    return model.with_name(f"{model.name}.json")


def described(folder: Path, names: Sequence[str], about: About) -> Sidecar:
    """Return the sidecar of a model whose files lie in ``folder``."""
    return Sidecar(**about.model_dump(), files={name: _read(folder / name) for name in names})


def _read(file: Path) -> OnnxFile:
    return OnnxFile(bytes=file.stat().st_size, sha256=file_sha256(file))


def read_sidecar(model: Path) -> Sidecar:
    """Return what ``model`` is, after every byte of it has been checked.

    Raises:
        StageError: no model yet. CorruptStoreError: it, its weights or its sidecar is missing, or
        is not what was written.
    """
    path = sidecar_path(model)
    if not model.is_file():
        raise StageError(f"{model}: not found; run `samfed export-onnx` first")
    if not path.is_file():
        raise CorruptStoreError(
            f"{path}: not found, and without it nothing says what {model.name} is (an earlier "
            f"samfed's, or copied alone?); {AGAIN}"
        )
    try:
        sidecar = Sidecar.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise CorruptStoreError(f"{path}: damaged, or not written by samfed; {AGAIN}") from error
    if model.name not in sidecar.files or not all(map(is_folder_name, sidecar.files)):
        raise CorruptStoreError(f"{path}: does not describe {model.name}; {AGAIN}")
    for name, expected in sidecar.files.items():
        file = model.with_name(name)
        if not file.is_file():
            raise CorruptStoreError(f"{file}: missing; {path.name} names it; {AGAIN}")
        if _read(file) != expected:
            raise CorruptStoreError(
                f"{file}: damaged, or not the file that {path.name} describes; {AGAIN}"
            )
    return sidecar
