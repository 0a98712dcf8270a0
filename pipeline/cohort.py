"""What a run of stage two reads: the server's and the clients' stores, and what they amount to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.card import CARD_FILE, load_card
from pipeline.config import SAM_METHODS, Config
from pipeline.errors import SamfedError
from pipeline.files import file_sha256
from pipeline.partition import Partition, load_partition
from pipeline.stores.images import ImageSet, read_image_store
from pipeline.stores.labels import Identity, Labels, LabelStore, read_labels
from pipeline.training import ClientData, ServerData

_DECIDING_MODULES = (
    "aggregation",
    "agreement",
    "augment",
    "federation",
    "losses",
    "models",
    "training",
)


@dataclass(frozen=True)
class Cohort:
    """Everything a run reads, in memory."""

    server: ServerData
    clients: tuple[ClientData, ...]
    validation: dict[str, ImageSet]  # of each client that has one; for reports only
    partition: str  # sha256 of partition.json
    fingerprint: str  # of the parameters, data and code that decide the result


def load_cohort(config: Config) -> Cohort:
    """Read the image stores and, for the methods that use SAM, the finished label stores."""
    partition = load_partition(config.cache.root / "partition.json")
    train = _read_images(config, "server", "train", partition.server.train)
    calibration = _read_images(config, "server", "calibration", partition.server.calibration)
    uses_sam = config.federate.method in SAM_METHODS
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
    return Cohort(server, clients, validation, digest, _fingerprint(config, identity))


def _expected_identity(config: Config, partition: Partition) -> Identity:
    """Whose labels the run asks for: the teacher's; the server's where no teacher is at hand."""
    teacher = config.cache.root / "teacher"
    if (teacher / CARD_FILE).is_file():
        card = load_card(teacher)
        card.check(config, partition, path=teacher)
        return card.identity(label_size=config.data.image_size)
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
) -> Labels:
    path = config.cache.root / "sam" / f"{owner}.zarr"
    return read_labels(path, rows=partition.row_keys(ids), identity=identity)


def _load_client(
    config: Config, partition: Partition, name: str, number: int, identity: Identity | None
) -> ClientData:
    method, ids = config.federate.method, partition.clients[name].train
    images = as_tensor(_read_images(config, name, "train", ids))
    if method == "oracle":
        truth = read_image_store(
            config.cache.root / "oracle" / f"{name}.zarr",
            image_ids=ids,
            size=config.data.image_size,
            num_classes=config.data.num_classes,
            stage="prepare --with-oracle",
        )
        return ClientData(name, images, masks=_labels(truth))
    if identity is None:
        return ClientData(name, images)
    labels = _read_sam(config, partition, name, ids, identity)
    rows: NDArray[np.int64] = np.arange(len(images))
    if method == "shuffled":  # the control: real labels, of the wrong images
        rows = np.random.default_rng([config.seed, 2, number]).permutation(len(images))
    return ClientData(
        name,
        images,
        masks=torch.from_numpy(labels.masks[rows]),
        confidences=torch.from_numpy(labels.confidences[rows]),
    )


def as_tensor(stored: ImageSet) -> Tensor:
    """Stored images as (N, 3, S, S) uint8."""
    return torch.from_numpy(stored.images).permute(0, 3, 1, 2).contiguous()


def _labels(stored: ImageSet) -> Tensor:
    if stored.labels is None:
        raise SamfedError("a labelled part has no labels in its store; run `samfed prepare` again")
    return torch.from_numpy(stored.labels)


def _fingerprint(config: Config, identity: Identity | None) -> str:
    """sha256 over all that decides the result; where the run lies and runs is left out."""
    settings: dict[str, Any] = json.loads(config.model_dump_json())
    chosen = {name: settings[name] for name in ("seed", "data", "model", "agreement", "federate")}
    del chosen["data"]["root"], chosen["federate"]["name"]
    chosen["model"]["encoder_weights"] = _content(config)
    chosen["partition"] = file_sha256(config.cache.root / "partition.json")
    chosen["labels"] = identity.digest if identity is not None else None
    chosen["code"] = _code_digest()
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


def _code_digest() -> str:
    """sha256 over the modules that decide a round: other code may not continue a run."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for name in _DECIDING_MODULES:
        digest.update((folder / f"{name}.py").read_bytes())
    return digest.hexdigest()


def start_key(config: Config) -> str:
    """sha256 over what decides the server start, first 16 hexadecimal digits."""
    settings: dict[str, Any] = json.loads(config.model_dump_json())
    used = ("start_steps", "labelled_batch", "learning_rate", "weight_decay", "threads", "device")
    chosen = {
        "seed": config.seed,
        "data": {key: settings["data"][key] for key in ("num_classes", "image_size")},
        "model": settings["model"] | {"encoder_weights": _content(config)},
        "federate": {key: settings["federate"][key] for key in used},
        "partition": file_sha256(config.cache.root / "partition.json"),
        "code": _code_digest(),
    }
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]


def _content(config: Config) -> str | None:
    """sha256 of the encoder's pretrained weights: where the file lies does not matter."""
    path = config.model.encoder_weights
    return file_sha256(path) if path is not None and path.is_file() else None
