"""Plain data as bytes: tensors as safetensors, the rest as JSON; never pickle.

Whatever crosses between server and client, and whatever a run keeps on disk, is a dataclass (or a
dict or tuple) of tensors, numbers, strings, and dataclasses, dicts and tuples of these.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, TypeVar, get_args

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
from pydantic import ConfigDict, TypeAdapter
from torch import Tensor

from pipeline.disk import write_bytes
from pipeline.errors import CorruptStoreError, NotFiniteError

State = dict[str, Tensor]
Value = TypeVar("Value")

_CONFIG = ConfigDict(arbitrary_types_allowed=True, extra="forbid")


class Plain:
    """Base of dataclasses with tensors that ``from_bytes`` can check."""

    __pydantic_config__: ClassVar[ConfigDict] = _CONFIG


def to_bytes(value: Any) -> bytes:
    """Return plain data as bytes; equal data give equal bytes.

    A tensor is named by its place, its parts joined by "/", so that any reader of safetensors finds
    the weights of a network under their own names. No key contains a "/".
    """
    tensors: State = {}
    plain = {"type": type(value).__name__, "value": _take_out(value, (), tensors)}
    text = json.dumps(plain, sort_keys=True)
    whole = {name: value.contiguous() for name, value in tensors.items()}
    metadata = {"content": text, "sha256": _digest(text, whole)}
    # as one entry: safetensors writes several in random order. Its way for arrays gives the same
    # bytes as that for tensors in a quarter of the time, and takes entries that share their memory
    arrays = {name: value.numpy() for name, value in whole.items()}
    return safetensors.numpy.save(arrays, metadata={"samfed": json.dumps(metadata)})


def from_bytes(content: bytes, kind: Any) -> Any:
    """Return what ``to_bytes`` made of a value of type ``kind``, or of one of a union of types.

    Raises:
        ValueError: the bytes are not what was written, or the value is none of ``kind``.
    """
    try:
        tensors = safetensors.torch.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata = json.loads(header["__metadata__"]["samfed"])
        whole = _digest(metadata["content"], tensors) == metadata["sha256"]
        plain = json.loads(metadata["content"])
        value, found = plain["value"], plain["type"]
        for place, tensor in tensors.items() if whole else ():
            value = _put_in(value, place.split("/"), tensor)
    except Exception as error:  # many kinds: who made the bytes may have put in anything
        raise ValueError(f"damaged ({error})") from error
    if not whole:
        raise ValueError("damaged (sha256 differs)")
    for member in get_args(kind) if isinstance(kind, UnionType) else (kind,):
        if found == getattr(member, "__name__", None) or not is_dataclass(member):
            return _adapter(member).validate_python(value)
    raise ValueError(f"found {found}, expected {kind}")


def save(path: Path, value: Any) -> None:
    """Write plain data atomically.

    Raises:
        NotFiniteError: one of its tensors is not finite; nothing is written.
    """
    fault = not_finite(tensors_of(value))
    if fault is not None:
        raise NotFiniteError(f"{path}: not written: {fault}; lower the learning rate")
    write_bytes(path, to_bytes(value))


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name the first tensor that holds NaN or infinity; None if there is none."""
    floats = {name: value for name, value in tensors.items() if value.is_floating_point()}
    # all at once: a network has hundreds of entries
    if not floats or _finite(torch.cat([value.reshape(-1) for value in floats.values()])):
        return None
    return next(f"'{name}' is not finite" for name, value in floats.items() if not _finite(value))


def _finite(values: Tensor) -> bool:
    return bool(torch.isfinite(values).all())


def load(path: Path, kind: type[Value], *, stage: str = "federate") -> Value:
    """Read what ``save`` wrote of a value of type ``kind``; ``stage`` is the command that wrote it.

    Raises:
        CorruptStoreError: its bytes are not what was written.
    """
    try:
        value: Value = from_bytes(path.read_bytes(), kind)
    except ValueError as error:
        raise CorruptStoreError(f"{path}: {error}; delete it and run `samfed {stage}`") from error
    return value


def tensors_of(value: Any) -> State:
    """Return all tensors of plain data by their places."""
    tensors: State = {}
    _take_out(value, (), tensors)
    return tensors


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind) if is_dataclass(kind) else TypeAdapter(kind, config=_CONFIG)


def _take_out(value: Any, place: tuple[str, ...], tensors: State) -> Any:
    """Return ``value`` as JSON takes it; tensors go to ``tensors``, and None into their place."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, Tensor):
        tensors["/".join(place)] = value
        return None
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: _take_out(each, (*place, key), tensors) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_take_out(each, (*place, str(i)), tensors) for i, each in enumerate(value)]
    return value


def _put_in(value: Any, place: list[str], tensor: Tensor) -> Any:
    """Return ``value`` with ``tensor`` at its place."""
    if not place:
        return tensor
    key: Any = int(place[0]) if isinstance(value, list) else place[0]
    value[key] = _put_in(value[key], place[1:], tensor)
    return value


def _digest(text: str, tensors: State) -> str:
    """Return a sha256 over all that is said: safetensors has no checksum."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.numpy().data)
    return digest.hexdigest()
