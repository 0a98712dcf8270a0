"""Labelled images at their own resolution: the server's public set D_p, and test parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.config import Config
from pipeline.data.images import decode_mask, load_image, read_file
from pipeline.data.partition import Partition
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
    root = config.data.root
    for image_id in ids:
        entry = partition.images[image_id]
        if entry.mask is None:
            raise DataError(f"image '{image_id}' is in a labelled part but has no mask")
        image = load_image(root, entry.image, sha256=entry.image_sha256)
        file = read_file(root / entry.mask, sha256=entry.mask_sha256)
        size_hw, classes = image.shape[:2], config.data.num_classes
        mask = decode_mask(file, size_hw=size_hw, num_classes=classes)
        yield LabelledImage(image_id, image, mask)
