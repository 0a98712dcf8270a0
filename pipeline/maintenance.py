"""``samfed cache``: what the stores hold, whether they are whole, making them whole, and space."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.card import CARD_FILE, load_card
from pipeline.config import Config
from pipeline.errors import IdentityError, StageError, StoreError
from pipeline.files import discard, recover_folder, tree_bytes
from pipeline.locks import writer_lock
from pipeline.partition import Partition, load_partition
from pipeline.stores.chunks import SHARD_ROWS, canonical_json, remove_partial_files
from pipeline.stores.labels import Identity, LabelStore, check_identity
from pipeline.stores.repair import forget_shards, restore_metadata
from pipeline.stores.verify import FORMAT_FAULT, METADATA, Advance, Fault, check_store

Progress = Callable[[str, int, int], None]

_WHOLE = (METADATA, "image_ids", "image_sha256")  # without these no row of a store means anything


def _label_stores(cache: Path) -> list[Path]:
    return sorted(cache.glob("sam/[!.]*.zarr"))


def _image_stores(cache: Path) -> list[Path]:
    """The image stores, which ``samfed prepare`` can write again at any time."""
    return sorted([*cache.glob("images/*/[!.]*.zarr"), *cache.glob("oracle/[!.]*.zarr")])


def _aside(cache: Path) -> list[Path]:
    """Label stores moved aside; earlier runs, which lie beside them, are results."""
    return sorted(cache.glob("aside/*/[!.]*.zarr"))


def _owner_ids(partition: Partition) -> dict[str, Sequence[str]]:
    """Whose images stage one labels."""
    clients = {name: part.train for name, part in partition.clients.items()}
    return {"server": partition.server.calibration, **clients}


# --------------------------------------------------------------------------- info


def info(config: Config) -> dict[str, Any]:
    """What the label stores hold, finished or not; needs neither a teacher nor a partition.

    Returns:
        ``stores``: for each ``owner`` its ``path``, ``state`` (complete, unfinished, damaged or
        missing), ``rows``, ``done``, ``bytes``, ``identity`` with its ``digest``, ``provenance``
        (records with the number of their shards), and ``differs``: what does not match the present
        teacher and partition, None where these are not there. ``aside``: ``path`` and ``bytes``.

    Raises:
        DataError: the partition or the teacher's card is damaged.
    """
    cache = config.cache.root
    partition_file = cache / "partition.json"
    partition = load_partition(partition_file) if partition_file.is_file() else None
    identity = None
    if (cache / "teacher" / CARD_FILE).is_file():
        identity = load_card(cache / "teacher").identity(label_size=config.data.image_size)
    stores = [_store_info(path, identity, partition) for path in _label_stores(cache)]
    if partition is not None:
        owners = _owner_ids(partition)
        for owner in sorted(set(owners) - {store["owner"] for store in stores}):
            path = str(cache / "sam" / f"{owner}.zarr")
            rows = len(owners[owner])
            stores.append({"owner": owner, "path": path, "state": "missing", "rows": rows})
    aside = [{"path": str(path), "bytes": tree_bytes(path)} for path in _aside(cache)]
    return {"stores": stores, "aside": aside}


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
    shards = Counter(canonical_json(record) for record in records if record)
    by_record = {canonical_json(record): record for record in records}
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
    ids = _owner_ids(partition).get(store.path.stem, ())
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
    lines += [f"{each['path']}: moved aside, {_size(each['bytes'])}" for each in found["aside"]]
    return "\n".join(lines) or "no label store"


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


# --------------------------------------------------------------------------- verify


@dataclass
class Verification:
    """What was read, and what is wrong with it."""

    stores: int
    bytes: int
    faults: list[Fault]


def verify(config: Config, *, progress: Progress | None = None) -> Verification:
    """Read every label and image store whole, and list everything that is wrong.

    Stores moved aside are not read; a store that comes back is checked like any other.

    Raises:
        StageError: there is no store.
    """
    cache = config.cache.root
    stores = [*_image_stores(cache), *_label_stores(cache)]
    if not stores:
        raise StageError(f"{cache}: found no store; run `samfed prepare` first")
    advance = _meter(stores, progress)
    faults = [fault for path in stores for fault in check_store(path, advance)]
    return Verification(len(stores), sum(map(tree_bytes, stores)), faults)


def _meter(stores: Sequence[Path], progress: Progress | None) -> Advance:
    total = sum(map(tree_bytes, stores))
    read = 0

    def advance(count: int) -> None:
        nonlocal read
        read += count
        if progress is not None:
            progress("reading stores, KiB", read // 1024, total // 1024)

    return advance


# --------------------------------------------------------------------------- repair


@dataclass
class Repair:
    """What ``repair`` found and did."""

    faults: list[Fault] = field(default_factory=list)  # in label stores; mended
    notices: list[str] = field(default_factory=list)  # metadata written again, stores moved aside
    remaining: list[str] = field(default_factory=list)  # what it cannot mend, and what can
    labelled: int = 0  # rows
    failed: list[str] = field(default_factory=list)  # images that have no label, as in stage one

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return vars(self) | {"faults": [fault.as_json() for fault in self.faults]}

    def text(self) -> str:
        """For a person."""
        lines = [f"{fault}; mended" for fault in self.faults] + self.notices
        summary = f"{len(self.faults)} faults mended, {self.labelled} images labelled"
        return "\n".join([*lines, summary])


def repair(config: Config, *, progress: Progress | None = None) -> Repair:
    """Label anew the shards of label stores that fail verification, and finish these stores.

    Metadata and image ids are written again where it can be shown what they were; if not, the
    store is moved to ``cache/aside/<owner>/damaged-<n>.zarr`` and all its rows are labelled anew.

    Raises:
        StageError: something is damaged, but there is no partition or no teacher to label with.
        IdentityError: the teacher is not the one that the settings ask for.
        LockedStoreError: another process writes to a store.
    """
    # these load torch, which the other commands here do without
    from pipeline.labelling import load_labeller
    from pipeline.precompute import precompute

    root = config.cache.root
    images, labels = _image_stores(root), _label_stores(root)
    advance = _meter([*images, *labels], progress)
    result = Repair()
    for path in images:
        faults = check_store(path, advance)
        result.remaining += [f"{fault}; run `samfed prepare` again" for fault in faults]
    owners: list[str] = []

    @cache
    def check_teacher() -> None:
        """Nothing may be removed that could not be labelled again; raises what is missing."""
        load_labeller(config, load_partition(root / "partition.json"))

    for path in labels:
        with writer_lock(_lock(root, path.stem)):
            recover_folder(path)
            remove_partial_files(path)
            faults = check_store(path, advance)
            if faults and _make_honest(config, path, faults, result, check_teacher):
                owners.append(path.stem)
    if owners:
        done = precompute(config, owners=owners, progress=progress)
        result.labelled, result.failed = done.labelled, done.failed
        result.notices += done.notices
    return result


def _lock(cache: Path, owner: str) -> Path:
    return cache / "locks" / f"sam-{owner}.lock"


def _make_honest(
    config: Config,
    path: Path,
    faults: list[Fault],
    result: Repair,
    check_teacher: Callable[[], None],
) -> bool:
    """Leave nothing damaged in a store that the caller holds locked, only rows not done.

    Returns:
        whether stage one can now finish the store; if not, it is untouched.
    """
    cache, owner = config.cache.root, path.stem
    partition = load_partition(cache / "partition.json")
    card = load_card(cache / "teacher")
    card.check(config, partition, path=cache / "teacher")
    identity = card.identity(label_size=config.data.image_size)
    ids = _owner_ids(partition).get(owner)
    whole = any(fault.array in _WHOLE for fault in faults)
    try:
        if ids is None:
            raise IdentityError(f"{path}: '{owner}' is no client of the partition; remove it")
        if faults[0].array == FORMAT_FAULT:
            raise StoreError(str(faults[0]))
        if not whole:  # labels of another teacher cannot be made again
            check_identity(LabelStore(path), identity)
    except StoreError as error:
        result.remaining.append(str(error))
        return False
    check_teacher()
    result.faults += faults
    if whole:
        restored = restore_metadata(path, identity, partition.row_keys(ids))
        faults = check_store(path)
        if not restored or any(fault.array in _WHOLE for fault in faults):
            result.notices.append(_move_aside(path, cache / "aside" / owner))
            return True
        result.notices.append(f"{path}: wrote metadata and image ids again as they were")
        result.faults += faults
    forget_shards(path, sorted({row // SHARD_ROWS for f in faults for row in f.rows or ()}))
    return True


def _move_aside(path: Path, aside: Path) -> str:
    names = (aside / f"damaged-{number}.zarr" for number in itertools.count(1))
    target = next(name for name in names if not name.exists())
    aside.mkdir(parents=True, exist_ok=True)
    path.rename(target)
    return (
        f"{path}: cannot tell whose labels these are; moved them to {target}, and labelled every "
        "image anew"
    )


# --------------------------------------------------------------------------- prune


@dataclass(frozen=True)
class Removable:
    """What ``prune`` may remove."""

    path: Path
    why: str
    bytes: int
    lock: Path  # held while it is removed

    def __str__(self) -> str:
        return f"{self.path}: {_size(self.bytes)}, {self.why}"

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"path": str(self.path), "bytes": self.bytes, "why": self.why}


def removable(config: Config) -> list[Removable]:
    """Label stores that were moved aside, and what killed runs left behind.

    Earlier runs, in ``cache/aside/runs``, are results and stay. What looks left behind may belong
    to a run that is still going: ``prune`` finds its lock held.
    """
    cache, killed = config.cache.root, "left by a killed run"
    found = [(path, "moved aside", path.parent.name) for path in _aside(cache)]
    found += [(path, killed, path.parent.name) for path in cache.glob("aside/*/.*.zarr.building")]
    for path in _label_stores(cache):
        found += [(partial, killed, path.stem) for partial in path.rglob("*.partial")]
    for path in cache.glob("sam/.*.zarr.*"):
        # a retired store whose successor never came is no rubbish: the next run takes it back
        if path.suffix == ".building" or _final(path).exists():
            found.append((path, killed, _final(path).stem))
    return [Removable(path, why, tree_bytes(path), _lock(cache, o)) for path, why, o in found]


def prune(config: Config, chosen: Sequence[Removable]) -> list[Removable]:
    """Remove what ``removable`` listed and is still removable; returns what went.

    Raises:
        LockedStoreError: another process writes to one of the stores; nothing is removed.
    """
    with ExitStack() as locks:
        for lock in sorted({each.lock for each in chosen}):
            locks.enter_context(writer_lock(lock))
        still = {each.path for each in removable(config)}
        gone = [each for each in chosen if each.path in still]
        for each in gone:
            _remove(each.path)
    return gone


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
