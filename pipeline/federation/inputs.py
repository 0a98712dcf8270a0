"""What a run of stage two reads: the server's and the clients' stores, and what they amount to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config import Config, deciding_settings
from pipeline.data.partition import Partition, load_partition
from pipeline.disk import file_sha256
from pipeline.errors import SamfedError
from pipeline.federation.views import ClientData, ServerData, as_tensor
from pipeline.methods import METHODS
from pipeline.stores.image_store import ImageSet, read_image_store
from pipeline.stores.label_store import Identity, LabelStore, PseudoLabels, read_labels
from pipeline.stores.teacher_card import CARD_FILE, load_card

#: Raised whenever the same settings and data would give other models: a run of another version
#: cannot be continued. ``tests/federation/test_golden_run.py`` guards it.
RESULT_VERSION = 1


@dataclass(frozen=True)
class RunInputs:
    """Everything a run reads, in memory."""

    server: ServerData
    clients: tuple[ClientData, ...]
    validation: dict[str, ImageSet]  # of each client that has one; for reports only
    partition: str  # sha256 of partition.json
    fingerprint: str  # of the parameters, data and code that decide the result
    doubts: tuple[str, ...]  # warnings about SAM's labels, by client


def load_inputs(config: Config) -> RunInputs:
    """Read the image stores and, for the methods that use SAM, the finished label stores."""
    partition = load_partition(config.cache.root / "partition.json")
    train = _read_images(config, "server", "train", partition.server.train)
    calibration = _read_images(config, "server", "calibration", partition.server.calibration)
    uses_sam = METHODS[config.federate.method].uses_sam
    identity = _expected_identity(config, partition) if uses_sam else None
    masks = confidences = None
    if identity is not None:
        labels = _read_sam(config, partition, "server", partition.server.calibration, identity)
        masks, confidences = torch.from_numpy(labels.masks), torch.from_numpy(labels.confidences)
    server = ServerData(
        images=as_tensor(train),
        labels=_labels(train),
        calibration_images=as_tensor(calibration),
        calibration_labels=_labels(calibration),
        calibration_groups=tuple(
            partition.images[image_id].group for image_id in partition.server.calibration
        ),
        calibration_masks=masks,
        calibration_confidences=confidences,
    )
    clients = tuple(
        _load_client(config, partition, name, number, identity)
        for number, name in enumerate(partition.clients)
    )
    validation = {
        name: _read_images(config, name, "val", part.val)
        for name, part in partition.clients.items()
        if part.val
    }
    digest = file_sha256(config.cache.root / "partition.json")
    fingerprint = _fingerprint(config, identity)
    return RunInputs(server, clients, validation, digest, fingerprint, _doubts(config, partition))


def _expected_identity(config: Config, partition: Partition) -> Identity:
    """Whose labels the run asks for: the teacher's; the server's where no teacher is at hand."""
    teacher = config.cache.root / "teacher"
    if (teacher / CARD_FILE).is_file():
        card = load_card(teacher)
        card.check(config, partition.server_sha256(), path=teacher)
        return card.identity(
            label_size=config.data.image_size, precision=config.precompute.precision
        )
    return LabelStore(config.cache.root / "sam" / "server.zarr").identity


def _read_images(config: Config, owner: str, split: str, ids: Sequence[str]) -> ImageSet:
    path = config.cache.root / "images" / owner / f"{split}.zarr"
    return read_image_store(
        path,
        image_ids=ids,
        size=config.data.image_size,
        num_classes=config.data.num_classes,
    )


def _read_sam(
    config: Config, partition: Partition, owner: str, ids: Sequence[str], identity: Identity
) -> PseudoLabels:
    path = config.cache.root / "sam" / f"{owner}.zarr"
    return read_labels(path, rows=partition.row_keys(ids), identity=identity)


def _doubts(config: Config, partition: Partition) -> tuple[str, ...]:
    """Clients on whose mirrored images SAM contradicted itself in stage one."""
    floor, found = config.precompute.warn_consistency, []
    if not METHODS[config.federate.method].uses_sam:
        return ()
    for name in partition.clients:
        statistics = LabelStore(config.cache.root / "sam" / f"{name}.zarr").statistics
        if statistics is not None and statistics["flip_dice"] < floor:
            found.append(
                f"{name}: SAM is inconsistent, its labels of mirrored images have Dice "
                f"{statistics['flip_dice']:.2f}, below {floor:.2f}"
            )
    return tuple(found)


def _load_client(
    config: Config, partition: Partition, name: str, number: int, identity: Identity | None
) -> ClientData:
    method, ids = config.federate.method, partition.clients[name].train
    images = as_tensor(_read_images(config, name, "train", ids))
    truth = None
    audited = config.federate.audit and method != "supervised"  # which has no pseudo-labels
    if method == "oracle" or audited:
        stored = read_image_store(
            config.cache.root / "oracle" / f"{name}.zarr",
            image_ids=ids,
            size=config.data.image_size,
            num_classes=config.data.num_classes,
            stage="prepare --with-oracle",
        )
        truth = _labels(stored)
    if method == "oracle":
        return ClientData(name, images, masks=truth)
    if identity is None:
        return ClientData(name, images, truth=truth)
    labels = _read_sam(config, partition, name, ids, identity)
    rows: NDArray[np.int64] = np.arange(len(images))
    if method == "shuffled":  # the control: real labels, of the wrong images
        rows = np.random.default_rng([config.seed, 2, number]).permutation(len(images))
    return ClientData(
        name,
        images,
        masks=torch.from_numpy(labels.masks[rows]),
        confidences=torch.from_numpy(labels.confidences[rows]),
        truth=truth,
    )


def _labels(stored: ImageSet) -> Tensor:
    if stored.labels is None:
        raise SamfedError("a labelled part has no labels in its store; run `samfed prepare` again")
    return torch.from_numpy(stored.labels)


def _fingerprint(config: Config, identity: Identity | None) -> str:
    """sha256 over all that decides the result; where the run lies, and what only warns, is not."""
    chosen = deciding_settings(config, "run")
    chosen["partition"] = file_sha256(config.cache.root / "partition.json")
    chosen["labels"] = identity.digest if identity is not None else None
    chosen["version"] = RESULT_VERSION
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()
