"""``partition.file``: partitions that others published, in samfed's own format or in HSSF's.

HSSF (YxMa666/HSSF, Ma et al., IEEE TMI 2024) publishes its splits as JSON: for each domain lists
of file names, ``labeled_train`` alone for the public set, ``unlabeled_train``, ``val_list`` and
``test_list`` for each client.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from pipeline.config import Config
from pipeline.data.drawing import draw_calibration
from pipeline.data.partition import ClientPart, ImageEntry, Partition, check, read_partition_file
from pipeline.data.sites import plain_text
from pipeline.errors import ConfigError, DataError

log = logging.getLogger("samfed.data")

SCHEME = "hssf"


class _Domain(BaseModel):
    """File names of one of HSSF's domains."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    labeled_train: tuple[str, ...]
    unlabeled_train: tuple[str, ...] = ()
    val_list: tuple[str, ...] = ()
    test_list: tuple[str, ...] = ()

    @property
    def is_public(self) -> bool:
        return not (self.unlabeled_train or self.val_list or self.test_list)


_Domains = TypeAdapter(dict[str, _Domain])


def read_published(path: Path, entries: Mapping[str, ImageEntry], config: Config) -> Partition:
    """Read a published partition, whose images must all be among ``entries``.

    HSSF's public set becomes D_p, of which a calibration part is drawn by ``config``'s seed. Its
    images are found by their files' names, and where several domains have a name, by the site.

    Raises:
        ConfigError: no such file. DataError: it is no partition, or images are missing or others.
    """
    if not path.is_file():
        raise ConfigError(f"partition.file: {path} does not exist")
    domains = _read_domains(path)
    if domains is None:
        return read_partition_file(path, entries)
    public = _public_domain(path, domains)
    ids = _match(path, domains, entries)
    parts = {
        name: ClientPart(
            train=tuple(sorted(ids[name, file] for file in domain.unlabeled_train)),
            val=tuple(sorted(ids[name, file] for file in domain.val_list)),
            test=tuple(sorted(ids[name, file] for file in domain.test_list)),
        )
        for name, domain in domains.items()
        if name != public
    }
    server = tuple(ids[public, file] for file in domains[public].labeled_train)
    labelled = [*server, *(i for part in parts.values() for i in (*part.val, *part.test))]
    bare = [image_id for image_id in labelled if entries[image_id].mask is None]
    if bare:
        raise DataError(
            f"{path}: {len(bare)} images of labelled parts have no masks, e.g. {bare[0]}"
        )
    places = {"server": server} | {
        f"{name} {split}": each for name, part in parts.items() for split, each in part
    }
    images = _separated({i: entries[i] for i in ids.values()}, places)
    partition = Partition(
        scheme=SCHEME,
        seed=config.seed,
        server=draw_calibration({i: images[i] for i in server}, config.partition, seed=config.seed),
        clients=parts,
        images={i: images[i] for i in sorted(images)},
    )
    return check(path, partition)


def _read_domains(path: Path) -> dict[str, _Domain] | None:
    """Return what a file in HSSF's format holds, and None for any other."""
    try:
        raw = json.loads(path.read_bytes())
    except ValueError:
        return None  # samfed's own reader says what is wrong
    values = raw.values() if isinstance(raw, dict) else ()
    if not any(isinstance(value, dict) and "labeled_train" in value for value in values):
        return None
    try:
        return _Domains.validate_python(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise DataError(
            f"{path}: {key}: {first['msg']}; expected HSSF's lists of file names"
        ) from error


def _public_domain(path: Path, domains: Mapping[str, _Domain]) -> str:
    public = [name for name, domain in domains.items() if domain.is_public]
    if len(public) != 1:
        found = ", ".join(public) or "none"
        raise DataError(
            f"{path}: found public sets: {found}; expected one domain with labeled_train alone"
        )
    for name, domain in domains.items():
        if name not in public and domain.labeled_train:
            raise DataError(
                f"{path}: client '{name}' has {len(domain.labeled_train)} labelled training "
                "images; a samfed client has none, expected an empty labeled_train"
            )
    return public[0]


def _files(domains: Mapping[str, _Domain]) -> Iterator[tuple[str, str]]:
    """Yield every domain and file name."""
    for name, domain in domains.items():
        for _, files in domain:
            yield from ((name, file) for file in files)


def _match(
    path: Path, domains: Mapping[str, _Domain], entries: Mapping[str, ImageEntry]
) -> dict[tuple[str, str], str]:
    """Return the id of each domain's file; refuse a split whose images are not all there."""
    by_ending: dict[str, list[str]] = defaultdict(list)
    for image_id in entries:
        for start in (0, *(match.end() for match in re.finditer(r"[_-]", image_id))):
            by_ending[image_id[start:]].append(image_id)
    listed = Counter(_stem(file) for _, file in _files(domains))
    found: dict[tuple[str, str], str] = {}
    missing: Counter[str] = Counter()
    for domain, file in _files(domains):
        stem = _stem(file)
        alike, only = by_ending[stem], listed[stem] == 1
        own = [i for i in alike if _is_of(i, stem, entries[i].site, domain)]
        chosen = [stem] if only and stem in alike else own or (alike if only else [])
        if len(chosen) > 1:
            raise DataError(
                f"{path}: {file} of {domain} may be {chosen[0]} or {chosen[1]}; tell them apart by "
                f"a site '{domain}' in sites.csv"
            )
        if chosen:
            found[domain, file] = chosen[0]
        else:
            missing[domain] += 1
    if missing.total():
        total = Counter(domain for domain, _ in _files(domains))
        where = ", ".join(f"{missing[d]} of {n} of {d}" for d, n in total.items() if missing[d])
        first = next(each for each in _files(domains) if each not in found)
        raise DataError(
            f"{path}: {missing.total()} of {total.total()} images are not in data.root ({where}), "
            f"e.g. {first[1]} of {first[0]}; images are found by name, and by site where several "
            "domains have a name"
        )
    return found


def _stem(file: str) -> str:
    return PurePosixPath(plain_text(file)).stem


def _is_of(image_id: str, stem: str, site: str, domain: str) -> bool:
    """Tell whether an image's site, or what stands before its name, names the domain or a part."""
    wanted = _letters(domain)
    names = (_letters(site), _letters(image_id.removesuffix(stem)))
    return any(name and (name in wanted or wanted in name) for name in names)


def _letters(text: str) -> str:
    return re.sub(r"[\W_]", "", text).casefold()


def _separated(
    images: Mapping[str, ImageEntry], parts: Mapping[str, tuple[str, ...]]
) -> dict[str, ImageEntry]:
    """Return the images, those of groups that lie in several parts as groups of their own."""
    places: dict[str, set[str]] = defaultdict(set)
    for place, ids in parts.items():
        for image_id in ids:
            places[images[image_id].group].add(place)
    torn = sorted(group for group, found in places.items() if len(found) > 1)
    if torn:
        log.warning(
            "%d groups lie in several parts of the published split, e.g. %s; their images count as "
            "groups of their own, and scores may profit from it",
            len(torn), torn[0],
        )  # fmt: skip
    return {
        image_id: entry.model_copy(update={"group": f"{entry.site}/{image_id}"})
        if len(places[entry.group]) > 1
        else entry
        for image_id, entry in images.items()
    }
