"""What a run reads: D_p's stores, each client's own stores, and what a client is told of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import Tensor

from pipeline.config import Config, deciding_settings
from pipeline.data.partition import Partition, load_partition
from pipeline.disk import file_sha256
from pipeline.errors import SamfedError
from pipeline.federation.views import ClientData, PublicSet, as_tensor
from pipeline.methods import METHODS
from pipeline.stores.image_store import ImageSet, read_image_store
from pipeline.stores.label_store import Identity, LabelStore, RowKey, read_labels
from pipeline.stores.teacher_card import CARD_FILE, load_card

#: Raised whenever the same settings and data would give other models: a run of another version
#: cannot be continued. ``tests/federation/test_golden_run.py`` guards it.
RESULT_VERSION = 1


@dataclass(frozen=True)
class PublicRows:
    """The rows of D_p's stores, in their order."""

    train: tuple[str, ...]  # image ids
    calibration: tuple[RowKey, ...]
    calibration_groups: tuple[str, ...]


@dataclass(frozen=True)
class ClientContext:
    """All that a client needs beyond its own stores, D_p's stores and the requests.

    It names nobody else's images. ``config.cache.root`` is where this client's and D_p's stores
    lie, and where its private state goes.
    """

    name: str
    index: int  # among the run's clients: its seeds and its network follow from it
    config: Config
    partition: str  # sha256 of the partition.json that the run is made on
    identity: Identity | None  # of the teacher whose labels are asked for; None: no labels are
    public: PublicRows
    train: tuple[RowKey, ...]  # the manifest of its own rows
    val: tuple[str, ...]
    test: tuple[str, ...]

    @property
    def run(self) -> Path:
        """The run's folder, as far as this client holds it."""
        return self.config.cache.root / "runs" / self.config.federate.name

    def to_json(self) -> bytes:
        """Return it as JSON."""
        return TypeAdapter(ClientContext).dump_json(self)

    @staticmethod
    def from_json(content: bytes) -> ClientContext:
        """Return what ``to_json`` wrote."""
        return TypeAdapter(ClientContext).validate_json(content)


@dataclass(frozen=True)
class RunInputs:
    """What the server of a run reads, and what it tells each client of the process."""

    public: PublicSet
    contexts: tuple[ClientContext, ...]
    partition: str  # sha256 of partition.json
    fingerprint: str  # of the settings, data and version that decide the result


def load_inputs(config: Config) -> RunInputs:
    """Read D_p and the partition; clients read their own stores.

    Raises:
        StageError: an earlier stage is missing. IdentityError: labels of another teacher.
    """
    path = config.cache.root / "partition.json"
    partition, digest = load_partition(path), file_sha256(path)
    uses_sam = METHODS[config.federate.method].uses_sam
    identity = _expected_identity(config, partition) if uses_sam else None
    ids = partition.server.calibration
    groups = tuple(partition.images[image_id].group for image_id in ids)
    rows = PublicRows(partition.server.train, partition.row_keys(ids), groups)
    contexts = tuple(
        ClientContext(
            name=name,
            index=index,
            config=config,
            partition=digest,
            identity=identity,
            public=rows,
            train=partition.row_keys(part.train),
            val=part.val,
            test=part.test,
        )
        for index, (name, part) in enumerate(partition.clients.items())
    )
    public = load_public(contexts[0])
    return RunInputs(public, contexts, digest, _fingerprint(config, digest, identity))


def load_public(context: ClientContext) -> PublicSet:
    """Read D_p, with SAM's labels of its calibration part where labels are asked for."""
    rows, masks, confidences = context.public, None, None
    train = _read_images(context, "images/server/train", rows.train)
    ids = [row.image_id for row in rows.calibration]
    calibration = _read_images(context, "images/server/calibration", ids)
    if context.identity is not None:
        masks, confidences = _read_sam(context, "server", rows.calibration)
    return PublicSet(
        images=as_tensor(train),
        labels=_labels(train),
        calibration_images=as_tensor(calibration),
        calibration_labels=_labels(calibration),
        calibration_groups=rows.calibration_groups,
        calibration_masks=masks,
        calibration_confidences=confidences,
    )


def load_client(context: ClientContext) -> ClientData:
    """Read a client's training images, and the labels that the method asks for."""
    name, settings = context.name, context.config.federate
    traits, ids = METHODS[settings.method], [row.image_id for row in context.train]
    images, truth = as_tensor(_read_images(context, f"images/{name}/train", ids)), None
    if traits.needs_truth or (settings.audit and traits.target != "none"):
        stage = "prepare --with-oracle"
        truth = _labels(_read_images(context, f"oracle/{name}", ids, stage=stage))
    if traits.needs_truth:
        return ClientData(name, images, masks=truth)
    if context.identity is None:
        return ClientData(name, images, truth=truth)
    masks, confidences = _read_sam(context, name, context.train)
    rows: NDArray[np.int64] = np.arange(len(images))
    if traits.shuffles_labels:  # the control: real labels, of the wrong images
        rows = np.random.default_rng([context.config.seed, 2, context.index]).permutation(rows)
    return ClientData(name, images, masks[rows], confidences[rows], truth)


def load_part(context: ClientContext, part: Literal["val", "test"]) -> ImageSet:
    """Read a client's validation or test part, with its labels."""
    return _read_images(context, f"images/{context.name}/{part}", getattr(context, part))


def flip_dice(context: ClientContext) -> float | None:
    """Return SAM's consistency on the client's mirrored images, if stage one measured it."""
    if context.identity is None:
        return None
    statistics = LabelStore(context.config.cache.root / "sam" / f"{context.name}.zarr").statistics
    return None if statistics is None else float(statistics["flip_dice"])


def _expected_identity(config: Config, partition: Partition) -> Identity:
    """Return whose labels the run asks for: the teacher's; without one, the server's store's."""
    teacher = config.cache.root / "teacher"
    if (teacher / CARD_FILE).is_file():
        card = load_card(teacher)
        card.check(config, partition.server_sha256(), path=teacher)
        precision = config.precompute.precision
        return card.identity(label_size=config.data.image_size, precision=precision)
    return LabelStore(config.cache.root / "sam" / "server.zarr").identity


def _read_images(
    context: ClientContext, store: str, ids: Sequence[str], *, stage: str = "prepare"
) -> ImageSet:
    data = context.config.data
    return read_image_store(
        context.config.cache.root / f"{store}.zarr",
        image_ids=ids,
        size=data.image_size,
        num_classes=data.num_classes,
        stage=stage,
    )


def _read_sam(context: ClientContext, owner: str, rows: Sequence[RowKey]) -> tuple[Tensor, Tensor]:
    """Return SAM's masks and confidences, (N, S, S) uint8."""
    path = context.config.cache.root / "sam" / f"{owner}.zarr"
    if context.identity is None:
        raise ValueError("no labels are asked for")
    labels = read_labels(path, rows=rows, identity=context.identity)
    return torch.from_numpy(labels.masks), torch.from_numpy(labels.confidences)


def _labels(stored: ImageSet) -> Tensor:
    if stored.labels is None:
        raise SamfedError("a labelled part has no labels in its store; run `samfed prepare` again")
    return torch.from_numpy(stored.labels)


def _fingerprint(config: Config, partition: str, identity: Identity | None) -> str:
    """Return a sha256 over all that decides the result, and nothing that only warns."""
    chosen = deciding_settings(config, "run")
    chosen["partition"] = partition
    chosen["labels"] = identity.digest if identity is not None else None
    chosen["version"] = RESULT_VERSION
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()
