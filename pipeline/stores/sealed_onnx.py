"""ONNX files with metadata and a seal: the sha256 of all bytes before it. No torch is needed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import onnx

from pipeline.errors import CorruptStoreError

_SEAL = "samfed.sha256"


def sealed(body: bytes, properties: Mapping[str, str]) -> bytes:
    """Return a serialised model with ``properties`` and, last of all, the sha256 of what is before.

    Protobuf takes fields at the end of a message as part of it: they are metadata like any other.
    """
    body += _as_metadata(properties)
    return body + _as_metadata({_SEAL: hashlib.sha256(body).hexdigest()})


def _as_metadata(properties: Mapping[str, str]) -> bytes:
    entries = [onnx.StringStringEntryProto(key=k, value=v) for k, v in properties.items()]
    metadata: bytes = onnx.ModelProto(metadata_props=entries).SerializeToString()
    return metadata


def checked_properties(path: Path, *, advice: str) -> dict[str, str]:
    """Return the model's metadata, after every byte of the file has been checked.

    Raises:
        CorruptStoreError: it is not what was written; the line ends with ``advice``.
    """
    content = path.read_bytes()
    body = content[: -len(_as_metadata({_SEAL: "0" * 64}))]
    if content != sealed(body, {}):
        raise CorruptStoreError(f"{path}: damaged, or not written by samfed; {advice}")
    model = onnx.ModelProto.FromString(content)
    return {entry.key: entry.value for entry in model.metadata_props}
