"""Images that are there twice: the same bytes, and photographs that look alike."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipeline.config import Config
from pipeline.data.folder import scan
from pipeline.data.images import Pixels, read_image
from pipeline.data.partition import ImageEntry, Partition, load_partition
from pipeline.errors import ConfigError
from pipeline.progress import Progress

log = logging.getLogger("samfed.data")

_ROWS = 1024  # of the distance matrix at a time: 8 MB for each 1,000 images
_SHOWN = 40  # pairs in the text; the JSON has all


# --------------------------------------------------------------------------- the same bytes


def join_copies(entries: Mapping[str, ImageEntry]) -> dict[str, ImageEntry]:
    """Return the images with those groups made one that share an image's bytes.

    Groups never straddle two parts, so no copy of an image can. The joined group has the first of
    their names. A warning says what was joined.
    """
    groups = sorted({entry.group for entry in entries.values()})
    digests = sorted({entry.image_sha256 for entry in entries.values()})
    place = {name: number for number, name in enumerate((*groups, *digests))}
    # a graph of groups and images, with an edge where a group holds an image
    edges = [(place[entry.group], place[entry.image_sha256]) for entry in entries.values()]
    graph = coo_array((np.ones(len(edges)), tuple(np.array(edges).T)), shape=(len(place),) * 2)
    labels = connected_components(graph, directed=False)[1]
    first = {labels[place[name]]: name for name in reversed(groups)}
    joined = {
        image_id: entry.model_copy(update={"group": first[labels[place[entry.group]]]})
        for image_id, entry in entries.items()
    }
    if len(first) < len(groups):
        _name_joined(entries, joined)
    return joined


def _name_joined(before: Mapping[str, ImageEntry], after: Mapping[str, ImageEntry]) -> None:
    copies = [ids for ids in _copies(before) if len({before[i].group for i in ids}) > 1]
    sizes = Counter(entry.group for entry in after.values())
    merged = {after[i].group for i in before if after[i].group != before[i].group}
    old = {before[i].group for i in before if after[i].group in merged}
    log.warning(
        "%d images have the same bytes as one of another group, e.g. %s; %d groups are joined to "
        "%d, the largest of %d images, so that no copy lies in two parts; --allow-duplicates "
        "keeps the groups as they are",
        sum(len(ids) - 1 for ids in copies),
        " and ".join(copies[0][:2]),
        len(old),
        len(merged),
        max(sizes[name] for name in merged),
    )


def name_leaks(partition: Partition) -> None:
    """Warn of images whose bytes lie in two parts of a partition, as in a published one."""
    place = _places(partition)
    used = {image_id: partition.images[image_id] for image_id in place}
    leaks = [ids for ids in _copies(used) if len({place[i] for i in ids}) > 1]
    if leaks:
        first, second = next((a, b) for a in leaks[0] for b in leaks[0] if place[a] != place[b])
        log.warning(
            "%d images lie in two parts under several names (same bytes), e.g. %s (%s) and %s "
            "(%s); scores may profit from it",
            len(leaks), first, place[first], second, place[second],
        )  # fmt: skip


def _copies(entries: Mapping[str, ImageEntry]) -> list[list[str]]:
    """Return the ids of each image that is there more than once."""
    by_digest: dict[str, list[str]] = defaultdict(list)
    for image_id, entry in entries.items():
        by_digest[entry.image_sha256].append(image_id)
    return [ids for ids in by_digest.values() if len(ids) > 1]


def _places(partition: Partition) -> dict[str, str]:
    """Return the owner and split of every image."""
    return {
        image_id: f"{owner} {split}"
        for owner in partition.owners
        for split, ids in partition.splits(owner).items()
        for image_id in ids
    }


# --------------------------------------------------------------------------- alike


@dataclass(frozen=True)
class Pair:
    """Two images of different groups that look alike."""

    first: str
    second: str
    bits: int  # 0..64, how many of their perceptual hashes differ
    same_bytes: bool
    parts: tuple[str, str] | None  # where they lie; None unless a partition has both


@dataclass(frozen=True)
class Duplicates:
    """What ``samfed duplicates`` found; those that lie in two parts come first."""

    images: int
    distance: int
    pairs: tuple[Pair, ...]

    def as_json(self) -> dict[str, Any]:
        """Return all of it."""
        return asdict(self)

    def text(self) -> str:
        """Return a summary, and a line for each of the first pairs."""
        apart = sum(pair.parts is not None and len(set(pair.parts)) > 1 for pair in self.pairs)
        lines = [
            f"{self.images} images: {len(self.pairs)} pairs of different groups look alike (at "
            f"most {self.distance} of 64 bits differ), {apart} of them in two parts"
        ]
        for pair in self.pairs[:_SHOWN]:
            kind = "same bytes" if pair.same_bytes else f"{pair.bits} bits differ"
            where = f"; {' and '.join(pair.parts)}" if pair.parts else ""
            lines.append(f"{pair.first} and {pair.second}: {kind}{where}")
        if len(self.pairs) > _SHOWN:
            lines.append(f"... and {len(self.pairs) - _SHOWN} more (--json has all)")
        return "\n".join(lines)


def find_duplicates(
    config: Config, *, distance: int, progress: Progress | None = None
) -> Duplicates:
    """Compare all images of ``data.root`` by perceptual hash; changes nothing.

    Two photographs of one lesion, a crop or another compression of one file differ in few bits.
    Images of one group are not compared: they lie in one part anyway.

    Args:
        distance: bits of 64 in which the hashes of a pair differ at most.

    Raises:
        ConfigError: the extra ``duplicates`` is not installed. DataError: as ``scan`` and
        ``read_image``.
    """
    advance = progress or (lambda *_: None)
    found = scan(config.data.root, mask_pattern=config.data.mask_pattern).images
    hashes, digests = list[int](), list[str]()
    for number, files in enumerate(found.values(), start=1):
        image = read_image(config.data.root / files.image)
        hashes.append(perceptual_hash(image.pixels))
        digests.append(image.sha256)
        advance("hashing images", number, len(found))
    ids, groups = list(found), [files.group for files in found.values()]
    path = config.cache.root / "partition.json"
    place = _places(load_partition(path)) if path.is_file() else {}
    pairs = []
    for i, j, bits in close_pairs(np.array(hashes, np.uint64), distance):
        if groups[i] != groups[j]:
            both = ids[i], ids[j]
            parts = (place[both[0]], place[both[1]]) if place.keys() >= set(both) else None
            pairs.append(Pair(*both, bits, digests[i] == digests[j], parts))
    pairs.sort(key=lambda p: (p.parts is None or p.parts[0] == p.parts[1], p.bits))
    return Duplicates(len(ids), distance, tuple(pairs))


def perceptual_hash(image: Pixels) -> int:
    """Return the 64 bits of an image's (H, W, 3) uint8 low frequencies (``imagehash.phash``)."""
    try:
        import imagehash
    except ImportError as error:
        raise ConfigError(
            "samfed duplicates: imagehash is not installed; run pip install 'samfed[duplicates]'"
        ) from error
    bits = imagehash.phash(Image.fromarray(image)).hash
    return int.from_bytes(np.packbits(bits).tobytes())


def close_pairs(hashes: NDArray[np.uint64], distance: int) -> Sequence[tuple[int, int, int]]:
    """Return (i, j, bits) of all i < j whose hashes (N,) differ in at most ``distance`` bits."""
    found: list[tuple[int, int, int]] = []
    for start in range(0, len(hashes), _ROWS):
        block = hashes[start : start + _ROWS]
        bits = np.bitwise_count(block[:, None] ^ hashes[None, start:])
        rows, columns = np.nonzero(np.triu(bits <= distance, k=1))
        near = bits[rows, columns]
        found += zip(
            (rows + start).tolist(), (columns + start).tolist(), near.tolist(), strict=True
        )
    return found
