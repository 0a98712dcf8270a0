"""Who owns which image: the server, the clients, and each client's train, val and test parts.

Everything is drawn group by group (a patient, a video), so that no group straddles two parts.
The result is ``cache/partition.json``, which can be read, compared, published and read back in.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.random import Generator
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.config import PartitionConfig
from pipeline.disk import is_folder_name, read_json, write_json
from pipeline.errors import ConfigError, DataError
from pipeline.stores.label_store import RowKey

if TYPE_CHECKING:  # stage two reads partitions, and no image files
    from pipeline.data.images import ImageRecord

FORMAT = 1
_SIZE_BINS = 5  # dirichlet over lesion size: quantiles of the foreground fraction


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ImageEntry(_Model):
    """One image: its files relative to ``data.root``, and their sha256."""

    image: str
    image_sha256: str
    mask: str | None = None
    mask_sha256: str | None = None
    site: str
    group: str


class ServerPart(_Model):
    """D_p: what is trained on, and the calibration part that nothing is trained on."""

    train: tuple[str, ...]
    calibration: tuple[str, ...]


class ClientPart(_Model):
    """One client's image ids."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]


class Partition(_Model):
    """Contents of ``partition.json``."""

    format: int = FORMAT
    scheme: str
    seed: int
    server: ServerPart
    clients: dict[str, ClientPart]
    images: dict[str, ImageEntry]

    def row_keys(self, ids: Sequence[str]) -> tuple[RowKey, ...]:
        """The rows that a label store of these images has."""
        return tuple(RowKey(image_id, self.images[image_id].image_sha256) for image_id in ids)

    def server_sha256(self) -> str:
        """sha256 over the files of D_p and their split: what a teacher was adapted on."""
        files = {
            split: [(i, self.images[i].image_sha256, self.images[i].mask_sha256) for i in ids]
            for split, ids in self.splits("server").items()
        }
        return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()

    def splits(self, owner: str) -> dict[str, tuple[str, ...]]:
        """Image ids of ``server`` or of a client, by split."""
        part: ServerPart | ClientPart = self.server if owner == "server" else self.clients[owner]
        splits: dict[str, tuple[str, ...]] = part.model_dump()
        return splits


Groups = dict[str, list[str]]  # group -> its image ids


def draw_partition(
    records: Mapping[str, ImageRecord],
    config: PartitionConfig,
    *,
    seed: int,
    foreground: Mapping[str, float],
) -> tuple[ServerPart, dict[str, ClientPart]]:
    """Draw server, clients and splits.

    Args:
        records: every image by id.
        foreground: fraction of foreground pixels, 0..1, of each image that has a mask.

    Raises:
        ConfigError: the request cannot be met with these images; says which number to change.
    """
    rng = np.random.default_rng([seed, 1])
    groups: Groups = defaultdict(list)
    for image_id, record in records.items():
        groups[record.group].append(image_id)
    labelled = {g for g, ids in groups.items() if all(records[i].mask for i in ids)}
    server = _draw_server(groups, labelled, records, config, rng)
    taken = {records[i].group for i in (*server.train, *server.calibration)}
    rest = {g: ids for g, ids in groups.items() if g not in taken}
    owners = _assign(rest, records, config, rng, foreground)
    clients: dict[str, ClientPart] = {}
    for name in sorted(owners):
        clients[name] = _split_client(name, owners[name], labelled, config, rng)
    return _thin(server, config, seed), clients


def _thin(server: ServerPart, config: PartitionConfig, seed: int) -> ServerPart:
    """``server_kept`` random images of the server's; what other owners hold does not change."""
    kept, total = config.server_kept, len(server.train) + len(server.calibration)
    if kept is None or kept >= total:
        return server
    least = min(config.calibration_min, len(server.calibration))
    calibration = max(least, round(kept * len(server.calibration) / total))
    if calibration >= kept:
        raise ConfigError(
            f"partition.server_kept: of {kept} images the calibration part takes {calibration}; "
            "raise server_kept or lower calibration_min"
        )
    rng = np.random.default_rng([seed, 7])

    def some(ids: tuple[str, ...], count: int) -> tuple[str, ...]:
        # the first of one order, so that a smaller set is part of every larger one
        return tuple(sorted(ids[row] for row in rng.permutation(len(ids))[:count]))

    return ServerPart(
        train=some(server.train, kept - calibration),
        calibration=some(server.calibration, calibration),
    )


def _take(groups: Groups, names: Sequence[str], target: int, *, reach: bool = False) -> list[str]:
    """The first groups that hold ``target`` images at most (or at least, if ``reach``)."""
    chosen: list[str] = []
    total = 0
    for name in names:
        size = len(groups[name])
        if total < target and (reach or total + size <= target):
            chosen.append(name)
            total += size
    return chosen


def _shuffled(names: Sequence[str], rng: Generator) -> list[str]:
    ordered = sorted(names)
    return [ordered[i] for i in rng.permutation(len(ordered))]


def _members(groups: Groups, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(sorted(i for name in names for i in groups[name]))


def _draw_server(
    groups: Groups,
    labelled: set[str],
    records: Mapping[str, ImageRecord],
    config: PartitionConfig,
    rng: Generator,
) -> ServerPart:
    site = config.server_site
    eligible = [g for g in labelled if site in (None, records[groups[g][0]].site)]
    if site is not None and not any(record.site == site for record in records.values()):
        sites = ", ".join(sorted({record.site for record in records.values()}))
        raise ConfigError(f"partition.server_site: found no site '{site}'; expected one of {sites}")
    available = sum(len(groups[g]) for g in eligible)
    if available < config.server_images:
        raise ConfigError(
            f"partition.server_images: {config.server_images} asked for, {available} labelled "
            f"images are there{f' at {site}' if site else ''}; lower it or add masks"
        )
    chosen = _take(groups, _shuffled(eligible, rng), config.server_images)
    total = sum(len(groups[g]) for g in chosen)
    wanted = max(config.calibration_min, round(config.calibration_fraction * total))
    calibration = _take(groups, _shuffled(chosen, rng), wanted, reach=True)
    train = [g for g in chosen if g not in calibration]
    if not train:
        raise ConfigError(
            f"partition.server_images: of {total} images the calibration part takes all (at least "
            f"{wanted}, by group); raise server_images or lower calibration_min"
        )
    return ServerPart(train=_members(groups, train), calibration=_members(groups, calibration))


def _assign(
    groups: Groups,
    records: Mapping[str, ImageRecord],
    config: PartitionConfig,
    rng: Generator,
    foreground: Mapping[str, float],
) -> dict[str, Groups]:
    """Give every group to a client by the scheme (``sizes`` may leave some unused)."""
    names = _shuffled(list(groups), rng)
    if config.scheme == "site":
        owners = _by_site(groups, records, config.clients_per_site, names)
    elif config.scheme == "sizes":
        owners = _by_sizes(groups, config.sizes, names)
    else:
        count = config.clients
        images = sum(len(ids) for ids in groups.values())
        if count > len(groups):
            raise ConfigError(
                f"partition.clients: {count} clients, but only {images} images in {len(groups)} "
                "groups are left after the server's; lower it"
            )
        if config.scheme == "iid":
            owners = _deal(groups, names, [f"client_{i:02d}" for i in range(count)])
        else:
            bins = _bins(groups, records, config.by, foreground)
            owners = _by_dirichlet(groups, names, bins, config, rng)
    return owners


def _deal(groups: Groups, names: Sequence[str], clients: Sequence[str]) -> dict[str, Groups]:
    """Give each group to the client with the fewest images."""
    owners: dict[str, Groups] = {client: {} for client in clients}
    sizes = dict.fromkeys(clients, 0)
    for name in names:
        client = min(clients, key=lambda c: sizes[c])
        owners[client][name] = groups[name]
        sizes[client] += len(groups[name])
    return owners


def _by_site(
    groups: Groups, records: Mapping[str, ImageRecord], per_site: int, names: Sequence[str]
) -> dict[str, Groups]:
    sites: dict[str, list[str]] = defaultdict(list)
    for name in names:
        sites[records[groups[name][0]].site].append(name)
    owners: dict[str, Groups] = {}
    for site in sorted(sites):
        clients = [site] if per_site == 1 else [f"{site}_{i}" for i in range(per_site)]
        owners.update(_deal(groups, sites[site], clients))
    return owners


def _by_sizes(groups: Groups, sizes: Sequence[int], names: Sequence[str]) -> dict[str, Groups]:
    available = sum(len(ids) for ids in groups.values())
    if sum(sizes) > available:
        raise ConfigError(
            f"partition.sizes: {sum(sizes)} images asked for, {available} are left after the "
            "server's; lower them"
        )
    owners: dict[str, Groups] = {}
    left = list(names)
    for i, size in enumerate(sizes):
        chosen = _take(groups, left, size)
        owners[f"client_{i:02d}"] = {name: groups[name] for name in chosen}
        left = [name for name in left if name not in chosen]
    return owners


def _bins(
    groups: Groups,
    records: Mapping[str, ImageRecord],
    by: str,
    foreground: Mapping[str, float],
) -> dict[str, str]:
    """The category of each group that the Dirichlet scheme skews over clients."""
    if by == "site":
        return {name: records[ids[0]].site for name, ids in groups.items()}
    areas = {
        name: float(np.mean([foreground[i] for i in ids]))
        for name, ids in groups.items()
        if all(i in foreground for i in ids)
    }
    if not areas:
        raise ConfigError("partition.by: 'size' needs masks, found none; use by: site")
    edges = np.quantile(list(areas.values()), np.linspace(0, 1, _SIZE_BINS + 1)[1:-1])
    return {
        name: str(int(np.searchsorted(edges, areas[name]))) if name in areas else "unlabelled"
        for name in groups
    }


def _by_dirichlet(
    groups: Groups,
    names: Sequence[str],
    bins: Mapping[str, str],
    config: PartitionConfig,
    rng: Generator,
) -> dict[str, Groups]:
    clients = [f"client_{i:02d}" for i in range(config.clients)]
    owners: dict[str, Groups] = {client: {} for client in clients}
    for label in sorted(set(bins.values())):
        members = [name for name in names if bins[name] == label]
        shares = rng.dirichlet(np.full(len(clients), config.alpha))
        bounds = np.rint(np.cumsum(shares) * len(members)).astype(int)
        for client, part in zip(clients, np.split(np.array(members), bounds[:-1]), strict=True):
            owners[client].update({str(name): groups[str(name)] for name in part})
    return owners


def _split_client(
    client: str, groups: Groups, labelled: set[str], config: PartitionConfig, rng: Generator
) -> ClientPart:
    total = sum(len(ids) for ids in groups.values())
    names = _shuffled(list(groups), rng)
    test = _part(groups, [n for n in names if n in labelled], config.test_fraction * total)
    left = [n for n in names if n not in test]
    val = _part(groups, [n for n in left if n in labelled], config.val_fraction * total)
    if len(val) == len(left):  # a small client trains before it is validated
        val = []
    train = [n for n in left if n not in val]
    if not train or (config.test_fraction > 0 and not test):
        raise ConfigError(
            f"partition: client '{client}' has {total} images in {len(groups)} groups, too few to "
            "give it a train and a test part; use fewer clients, or more images"
        )
    return ClientPart(
        train=_members(groups, train), val=_members(groups, val), test=_members(groups, test)
    )


def _part(groups: Groups, names: Sequence[str], target: float) -> list[str]:
    """About ``target`` images, one group at least where something is asked for and there."""
    if target <= 0 or not names:
        return []
    return _take(groups, names, max(1, round(target))) or [min(names, key=lambda n: len(groups[n]))]


def load_partition(path: Path) -> Partition:
    """Read the ``partition.json`` that ``samfed prepare`` wrote."""
    return _parse(path, read_json(path, stage="prepare"))


def read_partition_file(path: Path, records: Mapping[str, ImageRecord]) -> Partition:
    """Read a published partition back in, and check that ``records`` hold its images.

    Raises:
        ConfigError: no such file. DataError: it is no partition, or an image of it is missing.
    """
    if not path.is_file():
        raise ConfigError(f"partition.file: {path} does not exist")
    partition = _parse(path, read_json(path, stage="prepare"))
    for image_id in partition.images:
        if image_id not in records:
            raise DataError(f"{path}: image '{image_id}' is not in data.root; expected every one")
    return partition


def save_partition(path: Path, partition: Partition) -> None:
    """Write ``partition.json`` atomically; the same partition gives the same bytes."""
    write_json(path, partition.model_dump())


def _parse(path: Path, raw: Any) -> Partition:
    try:
        partition = Partition.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{path}: {key}: {first['msg']}; expected a samfed partition") from error
    if partition.format != FORMAT:
        raise DataError(f"{path}: format {partition.format}, this samfed reads format {FORMAT}")
    _check_disjoint(path, partition)
    return partition


def _check_disjoint(path: Path, partition: Partition) -> None:
    """Each id is known and has one owner; a group's images are all in one part."""
    owner: dict[str, str] = {}
    for name in ("server", *partition.clients):
        if name in partition.clients and (name == "server" or not is_folder_name(name)):
            raise DataError(f"{path}: client '{name}' cannot name a folder; rename it")
        for split in ("train", *(["calibration"] if name == "server" else [])):
            if not partition.splits(name)[split]:
                raise DataError(f"{path}: {name} {split} is empty; expected images in it")
        for split, ids in partition.splits(name).items():
            place = f"{name} {split}"
            for image_id in ids:
                if image_id not in partition.images:
                    raise DataError(f"{path}: '{image_id}' of {place} has no entry in images")
                for key in (f"image {image_id}", f"group {partition.images[image_id].group}"):
                    if owner.setdefault(key, place) != place:
                        raise DataError(f"{path}: {key} is in {owner[key]} and in {place}")
            if len(set(ids)) < len(ids):
                twice = next(i for i in ids if ids.count(i) > 1)
                raise DataError(f"{path}: image {twice} is listed twice in {place}")
