"""``samfed cache``: what the stores hold, whether they are whole, and space."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.data.partition import Partition, load_partition
from pipeline.disk import discard, leftovers, recover_folder, tree_bytes, writer_lock, writer_of
from pipeline.errors import CorruptStoreError, LockedStoreError, StageError, StoreError
from pipeline.stores.arrays import canonical_json
from pipeline.stores.integrity import Advance, Fault, check_store
from pipeline.stores.label_store import Identity, LabelStore
from pipeline.stores.teacher_card import CARD_FILE, load_card

Progress = Callable[[str, int, int], None]


def store_lock(cache: Path, owner: str) -> Path:
    """Held by whoever writes to the owner's label store."""
    return cache / "locks" / f"sam-{owner}.lock"


def label_stores(cache: Path) -> list[Path]:
    """The label stores in use, finished or not."""
    return sorted(cache.glob("sam/[!.]*.zarr"))


def image_stores(cache: Path) -> list[Path]:
    """The image stores, which ``samfed prepare`` can write again at any time."""
    return sorted([*cache.glob("images/*/[!.]*.zarr"), *cache.glob("oracle/[!.]*.zarr")])


def _aside(cache: Path) -> list[Path]:
    """Label stores moved aside; earlier runs, which lie beside them, are results."""
    return sorted(cache.glob("archive/*/[!.]*.zarr"))


def owner_ids(partition: Partition) -> dict[str, Sequence[str]]:
    """Whose images stage one labels."""
    clients = {name: part.train for name, part in partition.clients.items()}
    return {"server": partition.server.calibration, **clients}


# --------------------------------------------------------------------------- info


@dataclass(frozen=True)
class CacheInfo:
    """What ``info`` found."""

    stores: list[dict[str, Any]]
    archive: list[dict[str, Any]]

    def as_json(self) -> dict[str, Any]:
        """Return all of it."""
        return {"stores": self.stores, "archive": self.archive}

    def text(self) -> str:
        """Return it for a person."""
        return info_text(self.as_json())


def info(config: Config) -> CacheInfo:
    """What the label stores hold, finished or not; needs neither a teacher nor a partition.

    Returns:
        ``stores``: for each ``owner`` its ``path``, ``state`` (complete, unfinished, damaged or
        missing), ``rows``, ``done``, ``bytes``, ``identity`` with its ``digest``, ``provenance``
        (records with the number of shards that they had a part in), and ``differs``: what does not
        match the present teacher and partition, None where these are not there. ``archive``:
        ``path`` and ``bytes``.

    Raises:
        DataError: the partition or the teacher's card is damaged.
    """
    cache = config.cache.root
    partition_file = cache / "partition.json"
    partition = load_partition(partition_file) if partition_file.is_file() else None
    identity = None
    if (cache / "teacher" / CARD_FILE).is_file():
        identity = load_card(cache / "teacher").identity(
            label_size=config.data.image_size, precision=config.precompute.precision
        )
    stores = [_store_info(path, identity, partition) for path in label_stores(cache)]
    if partition is not None:
        owners = owner_ids(partition)
        for owner in sorted(set(owners) - {store["owner"] for store in stores}):
            path = str(cache / "sam" / f"{owner}.zarr")
            rows = len(owners[owner])
            stores.append({"owner": owner, "path": path, "state": "missing", "rows": rows})
    archive = [{"path": str(path), "bytes": tree_bytes(path)} for path in _aside(cache)]
    return CacheInfo(stores, archive)


def _store_info(
    path: Path, identity: Identity | None, partition: Partition | None
) -> dict[str, Any]:
    found: dict[str, Any] = {"owner": path.stem, "path": str(path), "bytes": tree_bytes(path)}
    try:
        store = LabelStore(path)
        done, records = store.done(), store.provenance()
        differs = _differences(store, identity, partition)
    except StoreError as error:
        return found | {"state": "damaged", "reason": str(error)}
    every = [record for shard in records for record in shard]
    shards = Counter(map(canonical_json, every))
    by_record = {canonical_json(record): record for record in every}
    return found | {
        "state": "complete" if done.all() else "unfinished",
        "rows": len(store),
        "done": int(done.sum()),
        "identity": store.identity.model_dump() | {"digest": store.identity.digest},
        "provenance": [{**by_record[key], "shards": count} for key, count in shards.items()],
        "differs": differs,
    }


def _differences(
    store: LabelStore, identity: Identity | None, partition: Partition | None
) -> list[str] | None:
    """Fields of the identity, and ``images``, in which a store is not what a run would ask for."""
    if identity is None or partition is None:
        return None
    wanted = identity.model_dump()
    fields = [name for name, value in store.identity.model_dump().items() if value != wanted[name]]
    ids = owner_ids(partition).get(store.path.stem, ())
    return fields if store.rows == partition.row_keys(ids) else [*fields, "images"]


def info_text(found: dict[str, Any]) -> str:
    """The result of ``info`` for a person."""
    lines = []
    for store in found["stores"]:
        if store["state"] in ("missing", "damaged"):
            reason = store.get("reason", f"{store['path']}: none of {store.get('rows')} rows yet")
            lines.append(reason)
            continue
        differs = store["differs"]
        match = (
            "not compared: no teacher or no partition"
            if differs is None
            else f"differs from the present run in {', '.join(differs)}"
            if differs
            else "of the present teacher and partition"
        )
        lines.append(
            f"{store['path']}: {store['done']} of {store['rows']} rows, "
            f"{_size(store['bytes'])}, {store['state']}; {match}"
        )
        who = store["identity"]
        lines.append(
            f"  identity {who['digest']}: {who['variant']}, prompt {who['prompt']}, input "
            f"{who['input_size']} px, labels {who['label_size']} px, {who['num_classes']} class(es)"
        )
        for record in store["provenance"]:
            made = ", ".join(f"{key} {value}" for key, value in record.items() if key != "shards")
            lines.append(f"  {record['shards']} shard(s) by {made}")
    lines += [f"{each['path']}: moved aside, {_size(each['bytes'])}" for each in found["archive"]]
    return "\n".join(lines) or "no label store"


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


# --------------------------------------------------------------------------- verify


@dataclass
class Verification:
    """What was read, and what is wrong with it."""

    stores: int = 0
    bytes: int = 0
    faults: list[Fault] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)  # stores that a process writes to, and which

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return vars(self) | {"faults": [fault.as_json() for fault in self.faults]}

    def text(self) -> str:
        """For a person; the faults come beside it."""
        skipped = f"{len(self.skipped)} skipped, " if self.skipped else ""
        summary = f"{self.stores} stores read, {skipped}{len(self.faults)} faults"
        return "\n".join([*self.skipped, summary])

    exit_code = CorruptStoreError.exit_code

    def failures(self) -> list[str]:
        """Return the faults, a line each."""
        return [str(fault) for fault in self.faults]


def verify(config: Config, *, progress: Progress | None = None) -> Verification:
    """Read every label and image store whole, and list everything that is wrong.

    Stores moved aside are not read; a store that comes back is checked like any other. One that a
    process writes to is skipped: what is missing there may only not be there yet.

    Raises:
        StageError: there is no store.
    """
    cache = config.cache.root
    stores = [*image_stores(cache), *label_stores(cache)]
    if not stores:
        raise StageError(f"{cache}: found no store; run `samfed prepare` first")
    advance = meter(stores, progress)
    result = Verification()
    for path in stores:
        try:
            result.faults += check_at_rest(cache, path, advance)
        except LockedStoreError as error:
            result.skipped.append(str(error))
            continue
        result.stores += 1
        result.bytes += tree_bytes(path)
    return result


def check_at_rest(cache: Path, path: Path, advance: Advance) -> list[Fault]:
    """``check_store`` of a label or image store, read again if somebody wrote to it meanwhile.

    Raises:
        LockedStoreError: a process writes to it.
    """
    of_labels = path.parent == cache / "sam"
    lock = store_lock(cache, path.stem) if of_labels else cache / "locks" / "prepare.lock"
    while True:
        before = _last_taken(lock)
        writer = writer_of(lock)
        if writer is not None:
            raise LockedStoreError(
                f"{path}: {writer} writes to it; run `samfed cache verify` when it has ended"
            )
        try:
            faults = check_store(path, advance)
        except Exception:  # a folder that is replaced while it is read fails in many ways
            if _last_taken(lock) == before:
                raise
            continue
        if not faults or _last_taken(lock) == before:
            return faults


def _last_taken(lock: Path) -> int | None:
    """When a writer last took the lock or gave it back."""
    return lock.stat().st_mtime_ns if lock.is_file() else None


def meter(stores: Sequence[Path], progress: Progress | None) -> Advance:
    total = sum(map(tree_bytes, stores))
    read = 0

    def advance(count: int) -> None:
        nonlocal read
        read += count
        if progress is not None:
            progress("reading stores, KiB", read // 1024, total // 1024)

    return advance


# --------------------------------------------------------------------------- prune


@dataclass(frozen=True)
class Removable:
    """What ``prune`` may remove."""

    path: Path
    why: str
    bytes: int
    lock: Path | None  # held while it is removed; None if it can have no writer any more

    def __str__(self) -> str:
        return f"{self.path}: {_size(self.bytes)}, {self.why}"

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"path": str(self.path), "bytes": self.bytes, "why": self.why}


@dataclass(frozen=True)
class Pruning:
    """What ``prune`` may remove, and how much of it is gone."""

    items: list[Removable]
    removed: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return all of it."""
        return {"found": [each.as_json() for each in self.items], "removed": self.removed}

    def text(self) -> str:
        """Return a line for each, and how many are gone."""
        gone = [f"{self.removed} removed"] if self.removed else []
        return "\n".join([*map(str, self.items), *gone]) or "nothing to remove"


def removable(config: Config) -> Pruning:
    """Label stores that were moved aside, and what killed runs left behind.

    Earlier runs, in ``cache/archive/runs``, are results and stay. What looks left behind of a store
    may belong to a run that is still going: ``prune`` finds its lock held. Single files are listed
    an hour after the last write to them.
    """
    cache, killed = config.cache.root, "left by a killed run"
    found = [(path, "moved aside", path.parent.name) for path in _aside(cache)]
    found += [(path, killed, path.parent.name) for path in cache.glob("archive/*/.*.zarr.building")]
    for path in label_stores(cache):
        found += [(partial, killed, path.stem) for partial in path.rglob("*.partial")]
    for path in cache.glob("sam/.*.zarr.*"):
        # a retired store whose successor never came is no rubbish: the next run takes it back
        if path.suffix == ".building" or _final(path).exists():
            found.append((path, killed, _final(path).stem))
    result = [
        Removable(path, why, tree_bytes(path), store_lock(cache, o)) for path, why, o in found
    ]
    named = {path for path, _, _ in found}
    files = [path for path in leftovers(cache) if not named.intersection(path.parents)]
    return Pruning(result + [Removable(path, killed, tree_bytes(path), None) for path in files])


def prune(config: Config, chosen: Pruning) -> Pruning:
    """Remove what ``removable`` listed and is still removable; returns what went.

    Raises:
        LockedStoreError: another process writes to one of the stores; nothing is removed.
    """
    with ExitStack() as locks:
        for lock in sorted({each.lock for each in chosen.items if each.lock is not None}):
            locks.enter_context(writer_lock(lock))
        still = {each.path for each in removable(config).items}
        gone = [each for each in chosen.items if each.path in still]
        for each in gone:
            if each.lock is None:
                each.path.unlink(missing_ok=True)
            else:
                _remove(each.path)
    return Pruning(chosen.items, removed=len(gone))


def _remove(path: Path) -> None:
    if path.suffix == ".partial":
        path.unlink()
    elif path.name.startswith("."):
        recover_folder(_final(path))
    else:
        discard(path)


def _final(path: Path) -> Path:
    """What ``.<name>.building`` or ``.<name>.retired`` was to become, or had been."""
    return path.with_name(path.name.removeprefix(".").removesuffix(path.suffix))
