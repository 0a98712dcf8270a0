"""The server's labelled images, at their own resolution."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.config import Config
from pipeline.data.images import load_image, read_mask
from pipeline.data.partition import Partition
from pipeline.disk import file_sha256
from pipeline.errors import DataError


@dataclass(frozen=True)
class LabelledImage:
    """An image (H, W, 3) uint8 at its own size, with its mask (H, W) uint8."""

    image_id: str
    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]


def load_labelled(
    config: Config, partition: Partition, ids: Sequence[str]
) -> Iterator[LabelledImage]:
    """Read labelled images at their own resolution, one at a time.

    Raises:
        DataError: an image or mask is missing, damaged, or changed since ``samfed prepare``.
    """
    for image_id in ids:
        entry = partition.images[image_id]
        if entry.mask is None:
            raise DataError(f"image '{image_id}' of the server's set has no mask")
        image = load_image(config.data.root, entry.image, sha256=entry.image_sha256)
        path = config.data.root / entry.mask
        if path.is_file() and file_sha256(path) != entry.mask_sha256:
            raise DataError(f"{path}: changed since `samfed prepare`; run `samfed prepare` again")
        mask = read_mask(
            path,
            size_hw=image.shape[:2],
            num_classes=config.data.num_classes,
        )
        yield LabelledImage(image_id, image, mask)
