"""What stage two reads, made without a teacher: labels are the truth, spoilt a little.

For benchmarks alone: neither time nor memory depends on how good labels are, so none are computed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import Config
from pipeline.data.partition import Partition
from pipeline.data.prepare import prepare
from pipeline.stores.image_store import ImageSet, read_image_store
from pipeline.stores.label_store import Identity, LabelStore
from pipeline.stores.pseudo_labels import PseudoLabels

SERVER_IMAGES = 12
IMAGES_PER_CLIENT = 10  # two of them for validation
SMALL = {"encoder_depth": 3, "decoder_channels": [16, 8, 8]}

_SHIFT = 2  # px that labels lie beside the truth, so that SAM and client have conflicts


def small_clients(data: Path, cache: Path, clients: int, **federate: Any) -> dict[str, Any]:
    """Return settings of so many clients of ``IMAGES_PER_CLIENT`` images, whose rounds are short.

    Args:
        federate: what that section has beside.
    """
    return {
        "data": {"root": str(data), "image_size": 32},
        "cache": {"root": str(cache)},
        "partition": {
            "scheme": "sizes",
            "sizes": [IMAGES_PER_CLIENT] * clients,
            "server_images": SERVER_IMAGES,
            "server_site": None,
            "calibration_min": 4,
            "val_fraction": 0.2,
            "test_fraction": 0.0,
        },
        "agreement": {"warn_agreement": 0, "warn_coverage": 0},
        "model": SMALL,
        "federate": {
            "pretrain_steps": 2,
            "link_mbit": 1e6,  # two steps a round deserve a warning, which is not the point here
            "threads": 1,
            "device": "cpu",
            **federate,
        },
    }


def prepare_with_labels(config: Config, *, flipped: int = 0) -> Partition:
    """Run ``samfed prepare --with-oracle`` on ``data.root``, and finish each owner's label store.

    The last ``flipped`` clients take background for foreground (of one class).

    There is no teacher's card: stage two then asks for the labels of the server's own store.
    """
    # benchmarks repeat their images, to measure many
    partition = prepare(config, with_oracle=True, allow_duplicates=True).partition
    _label(config, partition, "server", partition.server.calibration)
    honest = len(partition.clients) - flipped
    for index, (name, part) in enumerate(partition.clients.items()):
        _label(config, partition, name, part.train, flipped=index >= honest)
    return partition


def _label(
    config: Config, partition: Partition, owner: str, ids: tuple[str, ...], *, flipped: bool = False
) -> None:
    root = config.cache.root
    identity = Identity(
        variant="generated",
        base_sha256="none",
        adapter_sha256="none",
        prompt="none",
        input_size=config.data.image_size,
        label_size=config.data.image_size,
        num_classes=config.data.num_classes,
    )
    server = root / "images" / "server" / "calibration.zarr"
    path = server if owner == "server" else root / "oracle" / f"{owner}.zarr"
    labels = _spoil(_read(config, path, ids))
    if flipped:
        labels.masks[:] = 1 - labels.masks
    store = LabelStore.create(root / "sam" / f"{owner}.zarr", identity, partition.row_keys(ids))
    for chunk in range(store.chunks):
        rows = store.chunk_rows(chunk)
        part = PseudoLabels(
            labels.masks[rows], labels.confidences[rows], labels.predicted_iou[rows]
        )
        store.write_chunk(chunk, rows, part)
        store.mark_done(chunk, rows, [{"backend": "generated"}])


def _read(config: Config, path: Path, ids: tuple[str, ...]) -> ImageSet:
    size, classes = config.data.image_size, config.data.num_classes
    return read_image_store(path, image_ids=ids, size=size, num_classes=classes)


def _spoil(truth: ImageSet) -> PseudoLabels:
    """Return the truth moved by a few pixels, less sure where that made it wrong."""
    if truth.labels is None:
        raise ValueError("there is no truth to spoil")
    masks = np.roll(truth.labels, (_SHIFT, _SHIFT), axis=(1, 2))
    noise = np.random.default_rng(0).integers(0, 30, masks.shape, dtype=np.uint8)
    confidences = np.where(masks == truth.labels, 225, 160).astype(np.uint8) + noise
    return PseudoLabels(masks, confidences, np.full(len(masks), 0.9, np.float32))
