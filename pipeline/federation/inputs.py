"""What a run reads: D_p's stores, each client's own stores, and what a client is told of them.

A client's stores may lie in the server's cache, or in a cache of its own at a site of its own
(``pipeline.federation.sites``), of which the server knows the name alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor

from pipeline.config import Config
from pipeline.data.partition import PARTITION_FILE, ClientPart, Partition, load_partition
from pipeline.deciding import deciding_settings
from pipeline.disk import file_sha256
from pipeline.errors import ConfigError, SamfedError, StageError
from pipeline.federation.agreement import LABEL_RULES
from pipeline.federation.streams import Streams
from pipeline.federation.targets import agreement_rule
from pipeline.federation.views import ClientData, PublicSet, as_tensor
from pipeline.methods import METHODS
from pipeline.stores.image_store import ImageSet, read_image_store
from pipeline.stores.label_store import Identity, LabelStore, RowKey, read_labels
from pipeline.stores.optional_arrays import read_levels
from pipeline.stores.teacher_card import CARD_FILE, load_card

#: Raised whenever the same settings and data would give other models: a run of another version
#: cannot be continued. ``tests/federation/test_golden_run.py`` guards it.
RESULT_VERSION = 15


@dataclass(frozen=True)
class PublicRows:
    """The rows of D_p's stores, in their order."""

    sha256: str  # of D_p's files and parts
    train: tuple[str, ...]  # image ids
    calibration: tuple[RowKey, ...]
    groups: tuple[str, ...]  # of the calibration images

    @staticmethod
    def of(partition: Partition) -> PublicRows:
        """Return those of the D_p that a manifest names."""
        ids = partition.server.calibration
        groups = tuple(partition.images[image_id].group for image_id in ids)
        digest = partition.server_sha256()
        return PublicRows(digest, partition.server.train, partition.row_keys(ids), groups)


@dataclass(frozen=True)
class ClientContext:
    """All that a client needs beyond its own stores, D_p's stores and the requests.

    It names nobody else's images. ``config.cache.root`` is where this client's and D_p's stores
    lie, and where its private state goes. Of a client at a site of its own the server does not know
    the rows: ``train``, ``val`` and ``test`` are empty, and the site fills them in.
    """

    name: str
    index: int  # among the run's clients: its seeds and its network follow from it
    config: Config
    identity: Identity | None  # of the teacher whose labels are asked for; None: no labels are
    encoder_sha256: str | None  # of the file that its own network starts from, if it has one
    public: PublicRows
    train: tuple[RowKey, ...] = ()  # the manifest of its own rows
    val: tuple[str, ...] = ()
    test: tuple[str, ...] = ()

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

    def images(self, store: str, ids: Sequence[str], *, stage: str = "prepare") -> ImageSet:
        """Read the image store ``store``, a path below the cache, which ``stage`` writes."""
        data, path = self.config.data, self.config.cache.root / f"{store}.zarr"
        size, classes = data.image_size, data.num_classes
        return read_image_store(path, image_ids=ids, size=size, num_classes=classes, stage=stage)

    def data(self, owner: str, store: str, rows: Sequence[RowKey]) -> ClientData:
        """Read an owner's images, with the truth where the store has it and SAM's labels if any."""
        stored = self.images(store, [row.image_id for row in rows])
        masks = confidences = probabilities = None
        if self.identity is not None:
            path = self.config.cache.root / "sam" / f"{owner}.zarr"
            labels = read_labels(path, rows=rows, identity=self.identity)
            masks, confidences = map(torch.from_numpy, (labels.masks, labels.confidences))
            if reads_probabilities(self.config):
                probabilities = torch.from_numpy(read_levels(path, range(len(rows))))
        truth = None if stored.labels is None else torch.from_numpy(stored.labels)
        return ClientData(owner, as_tensor(stored), masks, confidences, probabilities, truth)


@dataclass(frozen=True)
class RunInputs:
    """What the server of a run reads, and what it tells each client of the process."""

    public: PublicSet
    public_sha256: str
    contexts: tuple[ClientContext, ...]
    partition: str  # sha256 of partition.json
    fingerprint: str  # of the settings, data and version that decide the result


def load_inputs(config: Config) -> RunInputs:
    """Read D_p and the partition; clients read their own stores.

    Raises:
        StageError: an earlier stage is missing. IdentityError: labels of another teacher.
        ConfigError: there is no client.
    """
    path = config.cache.root / PARTITION_FILE
    partition, digest = load_partition(path, with_public=True), file_sha256(path)
    uses_sam = METHODS[config.federate.method].uses_sam
    identity = _expected_identity(config, partition) if uses_sam else None
    names = config.federate.sites or tuple(partition.clients)
    if not names:
        raise ConfigError(
            f"federate.sites: found none, and no client in {path}; name each site that takes part"
        )
    networks = config.model.clients
    encoders = {
        n: file_sha256(n.encoder_weights) for n in networks if n.encoder_weights is not None
    }
    rows, none = PublicRows.of(partition), ClientPart(train=(), val=(), test=())
    # a client is not told who else there is
    told = config.federate.model_copy(update={"sites": ()})
    contexts = tuple(
        ClientContext(
            name=name,
            index=index,
            config=config.model_copy(update={"federate": told}),
            identity=identity,
            encoder_sha256=encoders.get(config.network_of(index)),
            public=rows,
            train=partition.row_keys(part.train),
            val=part.val,
            test=part.test,
        )
        for index, name in enumerate(names)
        for part in [partition.clients.get(name, none)]
    )
    fingerprint = _fingerprint(config, digest, identity)
    return RunInputs(load_public(contexts[0]), rows.sha256, contexts, digest, fingerprint)


def reads_probabilities(config: Config) -> bool:
    """Return whether rounds read SAM's probabilities of every class.

    Of one class the label's confidence says the same, and a rule may ask for labels alone.
    """
    classes = config.data.num_classes
    kept = classes > 1 and config.precompute.keeps_probabilities(classes)
    return kept and agreement_rule(config).rule not in LABEL_RULES


def load_public_alone(config: Config, partition: Partition) -> PublicSet:
    """Read D_p as the server has it before there are labels or clients."""
    context = ClientContext(
        name="server",
        index=0,
        config=config,
        identity=None,
        encoder_sha256=None,
        public=PublicRows.of(partition),
    )
    return load_public(context)


def load_public(context: ClientContext) -> PublicSet:
    """Read D_p, with SAM's labels of its calibration part where labels are asked for."""
    rows = context.public
    train = context.images("images/server/train", rows.train)
    calibration = context.data("server", "images/server/calibration", rows.calibration)
    return PublicSet(as_tensor(train), _labels(train), calibration, rows.groups)


def load_client(context: ClientContext) -> ClientData:
    """Read a client's training images, and the labels that the method asks for.

    Raises:
        StageError: its images are not in this cache, or not labelled yet.
    """
    if not context.train:
        raise StageError(
            f"{context.name}: its images are at its own site, not in {context.config.cache.root}; "
            "reach it with --superlink, or leave it out of federate.sites"
        )
    name, settings = context.name, context.config.federate
    traits = METHODS[settings.method]
    data = context.data(name, f"images/{name}/train", context.train)
    if traits.needs_truth or (settings.audit and traits.target != "none"):
        ids, stage = [row.image_id for row in context.train], "prepare --with-oracle"
        data = replace(data, truth=_labels(context.images(f"oracle/{name}", ids, stage=stage)))
    if traits.needs_truth:
        return replace(data, masks=data.truth, truth=None)
    if traits.shuffles_labels:  # the control: real labels, of the wrong images
        rng = Streams.of_client(context.config.seed, context.index, 0).rng("shuffled labels")
        rows = torch.from_numpy(rng.permutation(len(data.images)))
        return replace(data.part(rows), images=data.images, truth=data.truth)
    return data


def load_part(context: ClientContext, part: Literal["val", "test"]) -> ImageSet:
    """Read a client's validation or test part, with its labels."""
    return context.images(f"images/{context.name}/{part}", getattr(context, part))


def flip_dice(context: ClientContext) -> float | None:
    """Return SAM's consistency on the client's mirrored images, if stage one measured it."""
    if context.identity is None:
        return None
    store = LabelStore(context.config.cache.root / "sam" / f"{context.name}.zarr")
    dice = [row.flip_dice for row in store.quality() if row and row.flip_dice is not None]
    return float(np.mean(dice)) if dice else None


def _expected_identity(config: Config, partition: Partition) -> Identity:
    """Return whose labels the run asks for: the teacher's; without one, the server's store's."""
    teacher = config.cache.root / "teacher"
    if (teacher / CARD_FILE).is_file():
        card = load_card(teacher)
        card.check(config, partition.server_sha256(), path=teacher)
        return card.labels(config)
    return LabelStore(config.cache.root / "sam" / "server.zarr").identity


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
    if identity is not None and reads_probabilities(config):
        chosen["class_probabilities"] = True
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()
