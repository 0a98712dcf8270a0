"""Drawing a partition group by group (a patient, a video), so that none straddles two parts."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from pipeline.config import PartitionConfig
from pipeline.data.partition import ClientPart, ImageFiles, ServerPart
from pipeline.errors import ConfigError

log = logging.getLogger("samfed.data")

ALONE = "alone"  # scheme of a manifest that one site, or the server, made by itself
_SIZE_BINS = 5  # dirichlet over lesion size: quantiles of the foreground fraction


@dataclass(frozen=True)
class Group:
    """Images that stay together: those of one patient, of one video."""

    name: str
    ids: tuple[str, ...]
    site: str
    foreground: float | None  # mean fraction of foreground pixels; None unless all have a mask


Groups = list[Group]


def draw_partition(
    records: Mapping[str, ImageFiles],
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
    groups = _group(records, foreground)
    train, calibration = _draw_server(groups, config, rng)
    rest = _shuffled(_without(groups, [*train, *calibration]), rng)
    owners = _assign(rest, config, rng)
    clients = {name: _split_client(name, owners[name], config, rng) for name in sorted(owners)}
    _name_untested(owners, config)
    server = ServerPart(train=_ids(train), calibration=_ids(calibration))
    return _thin(server, records, config, seed), clients


def draw_server(
    records: Mapping[str, ImageFiles],
    config: PartitionConfig,
    *,
    seed: int,
    foreground: Mapping[str, float],
) -> ServerPart:
    """Draw the public set from images that are all the server's; arguments as ``draw_partition``'s.

    Raises:
        ConfigError: there are too few with masks.
    """
    own = config.model_copy(update={"server_site": None})
    groups = _group(records, foreground)
    train, calibration = _draw_server(groups, own, np.random.default_rng([seed, 1]))
    server = ServerPart(train=_ids(train), calibration=_ids(calibration))
    return _thin(server, records, config, seed)


def draw_calibration(
    records: Mapping[str, ImageFiles], config: PartitionConfig, *, seed: int
) -> ServerPart:
    """Draw the calibration part of a public set that is given as a whole."""
    whole = config.model_copy(update={"server_images": len(records)})
    return draw_server(records, whole, seed=seed, foreground=dict.fromkeys(records, 0.0))


def draw_site(
    site: str,
    records: Mapping[str, ImageFiles],
    config: PartitionConfig,
    *,
    seed: int,
    foreground: Mapping[str, float],
) -> ClientPart:
    """Draw the parts of a site that knows its own images alone, by a seed made from its name.

    Raises:
        ConfigError: there are too few images.
    """
    word = int.from_bytes(hashlib.sha256(site.encode()).digest()[:8], "little")
    owners = {site: _group(records, foreground)}
    alone = config.model_copy(update={"scheme": ALONE})
    part = _split_client(site, owners[site], alone, np.random.default_rng([seed, 8, word]))
    _name_untested(owners, config)
    return part


def _group(records: Mapping[str, ImageFiles], foreground: Mapping[str, float]) -> Groups:
    members: dict[str, list[str]] = defaultdict(list)
    for image_id, record in records.items():
        members[record.group].append(image_id)
    groups = []
    for name, ids in members.items():
        has_masks = all(i in foreground for i in ids)
        area = float(np.mean([foreground[i] for i in ids])) if has_masks else None
        # groups joined over an image that two sites have belong where most of their images lie
        sites = Counter(records[i].site for i in ids)
        site = min(sites, key=lambda each: (-sites[each], each))
        groups.append(Group(name, tuple(ids), site, area))
    return groups


def _ids(groups: Groups) -> tuple[str, ...]:
    return tuple(sorted(i for group in groups for i in group.ids))


def _size(groups: Groups) -> int:
    return sum(len(group.ids) for group in groups)


def _without(groups: Groups, taken: Groups) -> Groups:
    names = {group.name for group in taken}
    return [group for group in groups if group.name not in names]


def _labelled(groups: Groups) -> Groups:
    return [group for group in groups if group.foreground is not None]


def _shuffled(groups: Groups, rng: Generator) -> Groups:
    ordered = sorted(groups, key=lambda group: group.name)
    return [ordered[i] for i in rng.permutation(len(ordered))]


def _take(groups: Groups, target: int) -> Groups:
    """Return the first groups that hold ``target`` images at most."""
    chosen: Groups = []
    total = 0
    for group in groups:
        size = len(group.ids)
        if total + size <= target:
            chosen.append(group)
            total += size
    return chosen


def _take_calibration(groups: Groups, images: int) -> Groups:
    """Return the first groups that hold ``images`` images at least, and are as many as is wanted.

    What is measured on one patient or video need not hold for others.
    """
    count, wanted = 0, _calibration_groups(len(groups))
    while count < len(groups) and (count < wanted or _size(groups[:count]) < images):
        count += 1
    return groups[:count]


def _calibration_groups(groups: int) -> int:
    """Return how many of D_p's groups the calibration part has at least.

    A quarter of them, but two at least and four at most; with fewer than four groups, one.
    """
    return min(4, max(2, groups // 4)) if groups >= 4 else 1


def _draw_server(groups: Groups, config: PartitionConfig, rng: Generator) -> tuple[Groups, Groups]:
    """Return the groups of D_p's train and calibration parts."""
    site, sites = config.server_site, sorted({group.site for group in groups})
    if site is not None and site not in sites:
        raise ConfigError(
            f"partition.server_site: found no site '{site}'; expected one of {', '.join(sites)}"
        )
    eligible = [group for group in _labelled(groups) if site in (None, group.site)]
    if _size(eligible) < config.server_images:
        count, where = _size(eligible), f" at {site}" if site else ""
        there = f"{count} labelled images are there{where}; lower it or add masks"
        if not count:
            there = f"found no masks{where or ' in data.root'}; add some"
            there += ", or choose another server_site" if site else ""
        raise ConfigError(f"partition.server_images: {config.server_images} asked for, {there}")
    chosen = _take(_shuffled(eligible, rng), config.server_images)
    total = _size(chosen)
    wanted = max(config.calibration_min, round(config.calibration_fraction * total))
    calibration = _take_calibration(_shuffled(chosen, rng), wanted)
    train = _without(chosen, calibration)
    if not train:
        raise ConfigError(
            f"partition.server_images: of {total} images the calibration part takes all (at least "
            f"{wanted}, in whole groups, of which there are {len(chosen)}); raise server_images, "
            "or lower calibration_min or _fraction"
        )
    return train, calibration


def _thin(
    server: ServerPart, records: Mapping[str, ImageFiles], config: PartitionConfig, seed: int
) -> ServerPart:
    """Keep ``server_kept`` random images of D_p; what other owners hold does not change.

    The calibration part keeps images of several groups.
    """
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
    counts = {"train": kept - calibration, "calibration": calibration}
    # the first of one order, so that a smaller set is part of every larger one
    orders = {split: [ids[row] for row in rng.permutation(len(ids))] for split, ids in server}
    groups = {records[image_id].group for _, ids in server for image_id in ids}
    wanted = _calibration_groups(len(groups))
    orders["calibration"] = _several_first(orders["calibration"], records, wanted)
    return ServerPart(**{s: tuple(sorted(order[: counts[s]])) for s, order in orders.items()})


def _several_first(order: list[str], records: Mapping[str, ImageFiles], wanted: int) -> list[str]:
    """Return the order with the first image of each of ``wanted`` groups in front."""
    firsts: dict[str, str] = {}
    for image_id in order:
        firsts.setdefault(records[image_id].group, image_id)
    front = list(firsts.values())[:wanted]
    return front + [image_id for image_id in order if image_id not in front]


def _assign(groups: Groups, config: PartitionConfig, rng: Generator) -> dict[str, Groups]:
    """Give every group to a client by the scheme (``sizes`` may leave some unused)."""
    if config.scheme == "site":
        return _by_site(groups, config.clients_per_site)
    if config.scheme == "sizes":
        return _by_sizes(groups, config.sizes)
    if config.clients > len(groups):
        raise ConfigError(
            f"partition.clients: {config.clients} clients, but only {_size(groups)} images in "
            f"{len(groups)} groups are left after the server's; lower it"
        )
    clients = [f"client_{i:02d}" for i in range(config.clients)]
    if config.scheme == "iid":
        return _deal(groups, clients)
    return _by_dirichlet(groups, clients, config, rng)


def _deal(groups: Groups, clients: Sequence[str]) -> dict[str, Groups]:
    """Give each group to the client with the fewest images."""
    owners: dict[str, Groups] = {client: [] for client in clients}
    sizes = dict.fromkeys(clients, 0)
    for group in groups:
        client = min(sizes, key=sizes.__getitem__)
        owners[client].append(group)
        sizes[client] += len(group.ids)
    return owners


def _by_site(groups: Groups, per_site: int) -> dict[str, Groups]:
    owners: dict[str, Groups] = {}
    for site in sorted({group.site for group in groups}):
        clients = [site] if per_site == 1 else [f"{site}_{i}" for i in range(per_site)]
        owners |= _deal([group for group in groups if group.site == site], clients)
    return owners


def _by_sizes(groups: Groups, sizes: Sequence[int]) -> dict[str, Groups]:
    if sum(sizes) > _size(groups):
        raise ConfigError(
            f"partition.sizes: {sum(sizes)} images asked for, {_size(groups)} are left after the "
            "server's; lower them"
        )
    owners: dict[str, Groups] = {}
    for i, size in enumerate(sizes):
        owners[f"client_{i:02d}"] = taken = _take(groups, size)
        groups = _without(groups, taken)
    return owners


def _by_dirichlet(
    groups: Groups, clients: Sequence[str], config: PartitionConfig, rng: Generator
) -> dict[str, Groups]:
    """Skew lesion sizes or sites over the clients."""
    bins = {g.name: g.site for g in groups} if config.by == "site" else _size_bins(groups)
    owners: dict[str, Groups] = {client: [] for client in clients}
    for label in sorted(set(bins.values())):
        members = [group for group in groups if bins[group.name] == label]
        shares = rng.dirichlet(np.full(len(clients), config.alpha))
        bounds = np.rint(np.cumsum(shares) * len(members)).astype(int)
        parts = np.split(np.arange(len(members)), bounds[:-1])
        for client, part in zip(clients, parts, strict=True):
            owners[client] += [members[i] for i in part]
    return owners


def _size_bins(groups: Groups) -> dict[str, str]:
    """Return the quantile of each group's lesion size."""
    areas = np.array([group.foreground for group in _labelled(groups)], float)
    if not areas.size:
        raise ConfigError("partition.by: 'size' needs masks, found none; use by: site")
    edges = np.quantile(areas, np.linspace(0, 1, _SIZE_BINS + 1)[1:-1])
    bins = {group.name: "unlabelled" for group in groups}
    for group, area in zip(_labelled(groups), areas, strict=True):
        bins[group.name] = str(np.searchsorted(edges, area))
    return bins


def _split_client(
    client: str, groups: Groups, config: PartitionConfig, rng: Generator
) -> ClientPart:
    total = _size(groups)
    left = _shuffled(groups, rng)
    test = _part(left, config.test_fraction * total)
    left = _without(left, test)
    val = _part(left, config.val_fraction * total)
    if len(val) == len(left):  # a small client trains before it is validated
        val = []
    train = _without(left, val)
    if not train:  # a client without masks has no test part, and trains all the same
        advice = {
            "site": "give its images to another site in sites.csv, or set partition.scheme: iid",
            ALONE: "add images",
        }.get(config.scheme, "use fewer clients, or more images")
        raise ConfigError(
            f"partition: client '{client}' has {total} images (groups: {len(groups)}), too few to "
            f"give it a train and a test part; {advice}"
        )
    return ClientPart(train=_ids(train), val=_ids(val), test=_ids(test))


def _name_untested(owners: Mapping[str, Groups], config: PartitionConfig) -> None:
    """Say which clients train and are not tested, as no group of theirs has masks."""
    untested = [name for name, groups in sorted(owners.items()) if not _labelled(groups)]
    if untested and config.test_fraction > 0:
        few = ", ".join(untested[:5]) + (", ..." if len(untested) > 5 else "")
        log.warning(
            "%d of %d clients have no group with masks, so they train and are not tested: %s",
            len(untested), len(owners), few,
        )  # fmt: skip


def _part(groups: Groups, target: float) -> Groups:
    """Return labelled groups of about ``target`` images, one at least where asked for and there."""
    groups = _labelled(groups)
    if target <= 0 or not groups:
        return []
    return _take(groups, max(1, round(target))) or [min(groups, key=lambda g: len(g.ids))]
