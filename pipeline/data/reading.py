"""Reading every image and mask of a folder once, on all cores, into the client's frame."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, NamedTuple, TypeVar

import numpy as np

from pipeline.config import DataConfig
from pipeline.cores import usable_cores
from pipeline.data.images import Pixels, read_image, resize_image, resize_mask
from pipeline.data.masks import read_mask
from pipeline.data.partition import ImageEntry, ImageFiles
from pipeline.data.survey import Seen
from pipeline.disk import naming
from pipeline.errors import DataError

T = TypeVar("T")
R = TypeVar("R")


class Frame(NamedTuple):
    """An image (S, S, 3) uint8 in the client's frame, and its mask (S, S) uint8 if it has one."""

    image: Pixels
    mask: Pixels | None


class Read(NamedTuple):
    """An image that was read: its files with their digests, what it showed, and its frame."""

    entry: ImageEntry
    seen: Seen
    frame: Frame
    size_hw: tuple[int, int]  # of the original, px


class FrameFile:
    """Frames by image id, kept in a file until it is known who owns which image."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._size = file, size
        self._rows: dict[str, tuple[int, bool]] = {}  # place of a frame, and whether it has a mask

    def add(self, image_id: str, frame: Frame) -> None:
        """Keep a frame."""
        mask = np.zeros(frame.image.shape[:2], np.uint8) if frame.mask is None else frame.mask
        self._rows[image_id] = (self._file.seek(0, os.SEEK_END), frame.mask is not None)
        self._file.write(frame.image.tobytes() + mask.tobytes())

    def read(self, image_id: str, *, labelled: bool) -> Frame:
        """Return a frame, with its mask if it is asked for.

        Raises:
            DataError: there is no mask.
        """
        place, has_mask = self._rows[image_id]
        if labelled and not has_mask:
            raise DataError(f"image '{image_id}' is in a labelled part but has no mask")
        self._file.seek(place)
        content = np.frombuffer(self._file.read(4 * self._size**2), np.uint8)
        image = content[: 3 * self._size**2].reshape(self._size, self._size, 3)
        mask = content[3 * self._size**2 :].reshape(self._size, self._size)
        return Frame(image, mask if labelled else None)


@contextmanager
def frame_file(folder: Path, *, size: int) -> Iterator[FrameFile]:
    """Yield an empty file of frames of ``size`` px; however the process ends, none is left.

    A folder that is made for it, and stays empty, goes again.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with naming(folder), TemporaryFile(dir=folder) as file:
            yield FrameFile(file, size)
    finally:
        if is_new:
            with suppress(OSError):  # it holds something now
                folder.rmdir()


def read_all(config: DataConfig, images: Mapping[str, ImageFiles]) -> Iterator[tuple[str, Read]]:
    """Read every image with its mask, in order; a few are read ahead.

    Raises:
        DataError: an image or mask is unusable.
    """
    found = map_ahead(lambda files: _read(config, files), images.values())
    yield from zip(images, found, strict=True)


def _read(config: DataConfig, files: ImageFiles) -> Read:
    image = read_image(config.root / files.image)
    size_hw = image.pixels.shape[0], image.pixels.shape[1]
    frame = resize_image(image.pixels, config.image_size)
    seen = Seen(files.site, files.image, orientation=image.orientation)
    if files.mask is None:
        entry = ImageEntry(**dict(files), image_sha256=image.sha256)
        return Read(entry, seen, Frame(frame, None), size_hw)
    mask = read_mask(
        config.root / files.mask,
        size_hw=size_hw,
        num_classes=config.num_classes,
        image_orientation=image.orientation,
    )
    seen = seen._replace(
        foreground=float((mask.pixels > 0).mean()),
        decisions=mask.decisions,
        mask_orientation=mask.orientation,
    )
    entry = ImageEntry(**dict(files), image_sha256=image.sha256, mask_sha256=mask.sha256)
    frames = Frame(frame, resize_mask(mask.pixels, config.image_size))
    return Read(entry, seen, frames, size_hw)


def map_ahead(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Apply a function on all cores, in order; results that wait are twice the cores at most."""
    cores = usable_cores()
    waiting = deque[Future[R]]()
    with ThreadPoolExecutor(cores) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * cores:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
