"""What stage one is to do, and where its files lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config import Config
from pipeline.data.partition import Partition, load_partition
from pipeline.progress import Progress
from pipeline.sam.onnx import check_model
from pipeline.sam.teacher import checked_card
from pipeline.stores.label_store import Identity, RowKey


@dataclass(frozen=True)
class Job:
    """The settings, the images, and the identity of the labels that they get."""

    config: Config
    partition: Partition
    identity: Identity

    def rows(self, owner: str) -> tuple[RowKey, ...]:
        """Return the rows that the owner's label store has."""
        return self.partition.row_keys(owner_images(self.partition)[owner])

    def path(self, owner: str) -> Path:
        """Return the path of the owner's label store."""
        return store_path(self.config.cache.root, owner)


def load_job(config: Config) -> Job:
    """Read what the stages before left, and check that it is what the settings ask for.

    Raises:
        StageError: no partition or no teacher yet, or no ONNX model where that is asked for.
        IdentityError: it is another teacher.
    """
    partition = load_partition(config.cache.root / "partition.json")
    card = checked_card(config, partition)
    if config.precompute.backend == "onnx":
        check_model(config, card)
    return Job(config, partition, card.labels(config))


@dataclass
class Meter:
    """Progress of one kind of work, for display alone."""

    what: str
    total: int
    done: int = 0
    show: Progress | None = field(default=None, repr=False)

    def advance(self, count: int) -> None:
        """Count work that is done, and show it."""
        self.done += count
        if self.show is not None:
            self.show(self.what, self.done, self.total)


def owner_images(partition: Partition) -> dict[str, Sequence[str]]:
    """Return the ids of the images that stage one labels: the server's calibration part first."""
    server = [("server", partition.server.calibration)] if partition.has_public else []
    return dict([*server, *((name, part.train) for name, part in partition.clients.items())])


def store_path(cache: Path, owner: str) -> Path:
    """Return the path of the label store of a client, or of ``server``."""
    return cache / "sam" / f"{owner}.zarr"


def store_lock(cache: Path, owner: str) -> Path:
    """Return the lock that whoever writes to the owner's label store holds."""
    return cache / "locks" / f"sam-{owner}.lock"
