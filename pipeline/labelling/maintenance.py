"""``samfed cache``: what the stores hold, whether they are whole, and what may be removed."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.data.downloads import archive_lock
from pipeline.data.partition import Partition, load_partition
from pipeline.disk import leftovers, tree_bytes, writer_lock
from pipeline.errors import (
    CorruptStoreError,
    DataError,
    LockedStoreError,
    StageError,
    StoreError,
)
from pipeline.folders import discard, recover_folder
from pipeline.labelling.job import Meter, owner_images, store_lock, store_path
from pipeline.progress import Progress
from pipeline.stores.arrays import canonical_json
from pipeline.stores.integrity import Fault, check_store
from pipeline.stores.label_store import Identity, LabelStore, differences
from pipeline.stores.optional_arrays import has_probabilities
from pipeline.stores.teacher_card import CARD_FILE, load_card

_KILLED = "left by a killed run"


def label_stores(cache: Path) -> list[Path]:
    """Return the label stores in use, finished or not."""
    return sorted(cache.glob("sam/[!.]*.zarr"))


def image_stores(cache: Path) -> list[Path]:
    """Return the image stores, which ``samfed prepare`` can write again at any time."""
    return sorted([*cache.glob("images/*/[!.]*.zarr"), *cache.glob("oracle/[!.]*.zarr")])


def _moved_aside(cache: Path) -> list[Path]:
    """Return the label stores moved aside; earlier runs, which lie beside them, are results."""
    return sorted(cache.glob("archive/*/[!.]*.zarr"))


def counted(number: int, what: str) -> str:
    """Return ``1 fault`` or ``2 faults``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


# --------------------------------------------------------------------------- info


@dataclass
class StoreInfo:
    """One label store."""

    owner: str
    path: str
    state: str  # complete, unfinished, damaged or missing
    bytes: int = 0
    rows: int = 0
    done: int = 0
    identity: dict[str, Any] = field(default_factory=dict)  # with its digest
    probabilities: bool = False  # whether it keeps those of every class
    provenance: list[dict[str, Any]] = field(default_factory=list)  # records, each with its chunks
    # what is not as the present teacher and partition ask for; None where these are not there
    differs: list[str] | None = None
    reason: str = ""  # of the damage

    def text(self) -> str:
        if self.state in ("missing", "damaged"):
            return self.reason or f"{self.path}: none of {self.rows} rows yet"
        match = "not compared: no teacher or no partition"
        if self.differs is not None:
            match = f"differs from the present run in {', '.join(self.differs)}"
        if self.differs == []:
            match = "of the present teacher and partition"
        size, who = _mib(self.bytes), self.identity
        sizes = f"input {who['input_size']} px, labels {who['label_size']} px"
        sizes += f", {who['views']} views" if "views" in who else ""
        sizes += ", with class probabilities" if self.probabilities else ""
        lines = [
            f"{self.path}: {self.done} of {self.rows} rows, {size}, {self.state}; {match}",
            f"  identity {who['digest']}: {who['variant']}, prompt {who['prompt']}, {sizes}, "
            f"{who['num_classes']} class(es)",
        ]
        for record in self.provenance:
            by = ", ".join(f"{key} {value}" for key, value in record.items() if key != "chunks")
            lines.append(f"  {record['chunks']} chunk(s) by {by}")
        return "\n".join(lines)


@dataclass
class CacheInfo:
    """All label stores, and those moved aside."""

    stores: list[StoreInfo] = field(default_factory=list)
    archive: list[dict[str, Any]] = field(default_factory=list)  # path and bytes
    damaged: list[str] = field(default_factory=list)  # partition.json and the teacher's card

    exit_code = DataError.exit_code  # of the command, if one of these is damaged

    def text(self) -> str:
        lines = [store.text() for store in self.stores]
        lines += [f"{each['path']}: moved aside, {_mib(each['bytes'])}" for each in self.archive]
        return "\n".join(lines) or "no label store"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def failures(self) -> list[str]:
        return self.damaged

    @contextmanager
    def naming_damage(self) -> Iterator[None]:
        """Note what the block finds damaged, and go on without it."""
        try:
            yield
        except DataError as error:
            self.damaged.append(str(error))


def info(config: Config) -> CacheInfo:
    """Read what the label stores hold; needs neither a teacher nor a partition."""
    cache, found = config.cache.root, CacheInfo()
    identity = partition = None
    with found.naming_damage():
        if (cache / "partition.json").is_file():
            partition = load_partition(cache / "partition.json")
    with found.naming_damage():
        if (cache / "teacher" / CARD_FILE).is_file():
            identity = load_card(cache / "teacher").labels(config)
    found.stores = [_store_info(path, identity, partition) for path in label_stores(cache)]
    owners = owner_images(partition) if partition is not None else {}
    for owner in sorted(set(owners) - {store.owner for store in found.stores}):
        path = str(store_path(cache, owner))
        found.stores.append(StoreInfo(owner, path, "missing", rows=len(owners[owner])))
    aside = _moved_aside(cache)
    found.archive = [{"path": str(path), "bytes": tree_bytes(path)} for path in aside]
    return found


def _store_info(path: Path, identity: Identity | None, partition: Partition | None) -> StoreInfo:
    found = StoreInfo(path.stem, str(path), "damaged", tree_bytes(path))
    try:
        store = LabelStore(path)
        done, every = store.done(), [record for each in store.provenance() for record in each]
        found.differs = _differences(store, identity, partition)
    except StoreError as error:
        found.reason = str(error)
        return found
    found.state = "complete" if done.all() else "unfinished"
    found.rows, found.done = len(store), int(done.sum())
    found.probabilities = has_probabilities(store)
    found.identity = store.identity.model_dump() | {"digest": store.identity.digest}
    records = {canonical_json(record): record for record in every}
    chunks = Counter(map(canonical_json, every))
    found.provenance = [{**records[key], "chunks": count} for key, count in chunks.items()]
    return found


def _differences(
    store: LabelStore, identity: Identity | None, partition: Partition | None
) -> list[str] | None:
    """Return the identity's fields, and ``images``, that are not what a run would ask for."""
    if identity is None or partition is None:
        return None
    fields = [name for name, *_ in differences(store.identity, identity)]
    if store.path.stem == "server" and not partition.has_public:
        return fields  # at a site, whose manifest does not name the server's images
    ids = owner_images(partition).get(store.path.stem, ())
    return fields if store.rows == partition.row_keys(ids) else [*fields, "images"]


# --------------------------------------------------------------------------- verify


@dataclass
class Verification:
    """What was read, and what is wrong with it."""

    stores: int = 0
    bytes: int = 0
    faults: list[Fault] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)  # stores that a process writes to, and which

    exit_code = CorruptStoreError.exit_code  # of the command, if there are faults

    def text(self) -> str:
        """Return all but the faults, which are its ``failures``."""
        skipped = f"{len(self.skipped)} skipped, " if self.skipped else ""
        stores, faults = counted(self.stores, "store"), counted(len(self.faults), "fault")
        summary = f"{stores} read, {skipped}{faults}"
        return "\n".join([*self.skipped, summary])

    def as_json(self) -> dict[str, Any]:
        return vars(self) | {"faults": [fault.as_json() for fault in self.faults]}

    def failures(self) -> list[str]:
        return [str(fault) for fault in self.faults]


def verify(config: Config, *, progress: Progress | None = None) -> Verification:
    """Read every label and image store whole, and list everything that is wrong.

    Each is read under its writer's lock. Stores moved aside are not read; a store that comes back
    is checked like any other. One that a process writes to is skipped, and the process named.

    Raises:
        StageError: there is no store.
    """
    cache = config.cache.root
    stores = [*image_stores(cache), *label_stores(cache)]
    if not stores:
        raise StageError(f"{cache}: found no store; run `samfed prepare` first")
    meter, result = reading(stores, progress), Verification()
    for path in stores:
        found = check_locked(cache, path, meter)
        if isinstance(found, str):
            result.skipped.append(found)
        else:
            result.faults += found
            result.stores += 1
            result.bytes += tree_bytes(path)
    return result


def check_locked(cache: Path, path: Path, meter: Meter) -> list[Fault] | str:
    """Check a label or image store while nobody can write to it.

    Returns:
        the faults, or what to say if another process writes to it.
    """
    of_labels, after = path.parent == cache / "sam", meter.done + tree_bytes(path)
    lock = store_lock(cache, path.stem) if of_labels else cache / "locks" / "prepare.lock"
    try:
        # whoever may not write to the cache cannot lock it either
        with writer_lock(lock) if os.access(cache, os.W_OK) else nullcontext():
            return check_store(path, meter.advance)
    except LockedStoreError as error:
        return f"{path}: not read; {error}"
    finally:  # also what is not read chunk by chunk
        meter.advance(after - meter.done)


def reading(stores: Sequence[Path], progress: Progress | None) -> Meter:
    """Return a meter of the bytes that are read of these stores."""
    return Meter("reading stores, bytes", sum(map(tree_bytes, stores)), show=progress)


# --------------------------------------------------------------------------- prune


@dataclass(frozen=True)
class Removable:
    """What ``prune`` may remove."""

    path: Path
    why: str
    bytes: int
    lock: Path | None  # held while it is removed; None if it can have no writer any more


@dataclass(frozen=True)
class Pruning:
    """What may be removed, and how much of it was."""

    found: list[Removable]
    removed: int = 0

    def text(self) -> str:
        """Return a line for each thing found, and how many were removed."""
        lines = [f"{each.path}: {_mib(each.bytes)}, {each.why}" for each in self.found]
        lines += [f"{self.removed} removed"] if self.removed else []
        return "\n".join(lines) or "nothing to remove"

    def as_json(self) -> dict[str, Any]:
        found = [{"path": str(e.path), "bytes": e.bytes, "why": e.why} for e in self.found]
        return {"found": found, "removed": self.removed}


def removable(config: Config) -> Pruning:
    """Find label stores that were moved aside, archives, and what killed runs left behind.

    Earlier runs, in ``cache/archive/runs``, are results and stay. What looks left behind of a store
    may belong to a run that is still going: ``prune`` finds its lock held. Single files are listed
    an hour after the last write to them.
    """
    cache = config.cache.root
    folders = [
        Removable(path, why, tree_bytes(path), store_lock(cache, owner))
        for path, owner, why in _removable_folders(cache)
    ]
    why = "archives that `samfed fetch` received"
    for path in sorted(cache.glob("downloads/*/")):
        folders.append(Removable(path, why, tree_bytes(path), archive_lock(path)))
    named = {each.path for each in folders}
    files = [path for path in leftovers(cache) if not named.intersection(path.parents)]
    return Pruning(folders + [Removable(path, _KILLED, tree_bytes(path), None) for path in files])


def _removable_folders(cache: Path) -> Iterator[tuple[Path, str, str]]:
    """Yield folders, whose label stores they were or were to be, and why they may go."""
    for path in _moved_aside(cache):
        yield path, path.parent.name, "moved aside"
    for path in cache.glob("archive/*/.*.zarr.building"):
        yield path, path.parent.name, _KILLED
    for path in cache.glob("sam/.*.zarr.*"):
        # a retired store whose successor never came is no rubbish: the next run takes it back
        if path.suffix == ".building" or _final(path).exists():
            yield path, _final(path).stem, _KILLED


def prune(config: Config, chosen: Pruning) -> Pruning:
    """Remove what ``removable`` listed and is still removable.

    Raises:
        LockedStoreError: another process writes to one of the stores; nothing is removed.
    """
    with ExitStack() as locks:
        for lock in sorted({each.lock for each in chosen.found if each.lock is not None}):
            locks.enter_context(writer_lock(lock))
        still = {each.path for each in removable(config).found}
        gone = [each.path for each in chosen.found if each.path in still]
        for path in gone:
            if not path.is_dir():
                path.unlink(missing_ok=True)
            elif path.name.startswith("."):
                recover_folder(_final(path))
            else:
                discard(path)
    return Pruning(chosen.found, len(gone))


def _final(path: Path) -> Path:
    """Return what ``.<name>.building`` or ``.<name>.retired`` was to become, or had been."""
    return path.with_name(path.name.removeprefix(".").removesuffix(path.suffix))
