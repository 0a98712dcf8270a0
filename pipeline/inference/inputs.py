"""What is predicted: image files and volumes, found, read and brought to the model's frame."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipeline.data.folder import IMAGE_SUFFIXES
from pipeline.data.images import read_image
from pipeline.data.importers.volumes import (
    read_volume,
    slicing_axis,
    to_grey,
    upright,
    window_of,
)
from pipeline.data.sites import read_spacing
from pipeline.disk import file_sha256
from pipeline.errors import DataError
from pipeline.inference.model import Model, Pixels

VOLUME_SUFFIXES = (".nii.gz", ".nii")
_SUFFIXES = (*IMAGE_SUFFIXES, *VOLUME_SUFFIXES)


@dataclass(frozen=True)
class Source:
    """A file to predict, and what its outputs are called: a relative path without an ending."""

    path: Path
    name: str
    spacing: tuple[float, ...] | None = None  # mm between rows and columns, where it is known

    @property
    def is_volume(self) -> bool:
        """Whether it is NIfTI."""
        return self.path.name.lower().endswith(VOLUME_SUFFIXES)


@dataclass(frozen=True)
class Picture:
    """A file that was read: an image is one slice, a volume has many."""

    source: Source
    sha256: str
    frames: tuple[Pixels, ...]  # of the slices, as the model takes them
    size_hw: tuple[int, int]  # of a slice at its own size
    coloured: bool
    spacing: tuple[float, ...] | None  # mm: rows and columns, or z, y and x of a volume
    axis: int = 0  # of a volume (Z, Y, X): along which it was cut


@dataclass(frozen=True)
class Unreadable:
    """A file that could not be read, and why."""

    source: Source
    reason: str


def find(paths: Sequence[Path], *, leave_out: Path) -> list[Source]:
    """Find the files to predict: those named, and all images and volumes in the folders named.

    A folder in the input layout stands for its ``images/``, with the millimetres of its
    ``spacing.csv``. Hidden files, and what lies in ``leave_out``, do not count.

    Raises:
        DataError: a path is not there, a folder holds nothing to predict, or two files would have
        outputs of one name.
    """
    found: dict[str, Source] = {}
    for path in paths:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder; expected images to predict")
        for source in _in_folder(path, leave_out) if path.is_dir() else [_source(path, path.name)]:
            other = found.setdefault(source.name, source)
            if other.path != source.path:
                raise DataError(
                    f"{source.path} and {other.path}: both would be written as '{source.name}'; "
                    "rename one, or give each in a call of its own, with another --out"
                )
    return list(found.values())


def _in_folder(folder: Path, leave_out: Path) -> list[Source]:
    base = folder / "images" if (folder / "images").is_dir() else folder
    avoided, found = leave_out.resolve(), list[Source]()
    for path in sorted(base.rglob("*")):
        inside = path.relative_to(base)
        hidden = any(part.startswith(".") for part in inside.parts)
        if hidden or not path.name.lower().endswith(_SUFFIXES) or path.is_dir():
            continue
        if avoided not in path.resolve().parents:
            found.append(_source(path, inside.as_posix()))
    if not found:
        raise DataError(f"{base}: nothing to predict; expected {' '.join(_SUFFIXES)} files")
    names = {source.name for source in found}
    spacing = read_spacing(folder / "spacing.csv", names, endings=IMAGE_SUFFIXES)
    return [replace(source, spacing=spacing.get(source.name)) for source in found]


def _source(path: Path, name: str) -> Source:
    ending = next((each for each in VOLUME_SUFFIXES if name.lower().endswith(each)), None)
    stem = name[: -len(ending)] if ending else name[: len(name) - len(Path(name).suffix)]
    return Source(path, unicodedata.normalize("NFC", stem))


def read(source: Source, model: Model) -> Picture | Unreadable:
    """Read a file and bring it to the model's frame; a reason where that is not possible.

    Raises:
        ConfigError: a volume, and SimpleITK is not installed.
    """
    try:
        return _read_volume(source, model) if source.is_volume else _read_image(source, model)
    except DataError as error:
        return Unreadable(source, str(error))
    except OSError as error:
        return Unreadable(source, f"{source.path}: cannot be read ({error.strerror})")


def _read_image(source: Source, model: Model) -> Picture:
    image = read_image(source.path)
    height, width, _ = image.pixels.shape
    coloured = bool((image.pixels != image.pixels[:, :, :1]).any())
    frames = (model.frame(image.pixels),)
    return Picture(source, image.sha256, frames, (height, width), coloured, source.spacing)


def _read_volume(source: Source, model: Model) -> Picture:
    """Cut a volume as ``samfed import nifti`` does, with one window for all of its slices."""
    volume, digest = read_volume(source.path), file_sha256(source.path)
    axis, window = slicing_axis(volume), window_of(volume.values, None)
    greys = (
        np.asarray(to_grey(upright(volume.values, axis, index), window))
        for index in range(volume.values.shape[axis])
    )
    frames = tuple(model.frame(np.repeat(grey[:, :, None], 3, axis=2)) for grey in greys)
    height, width = (size for each, size in enumerate(volume.values.shape) if each != axis)
    return Picture(source, digest, frames, (height, width), False, volume.spacing, axis)
