"""Who owns which image: the server, the clients, and each client's train, val and test parts.

``cache/partition.json`` can be read, compared, published and read back in. In a federation of real
sites each has a manifest of its own: the server's names D_p alone, a site's its own images alone,
and ``cache/public.json`` at a site is the server's.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    ValidationError,
    model_validator,
)

from pipeline.disk import is_site_name, read_json, write_json
from pipeline.errors import DataError, StageError
from pipeline.stores.label_store import RowKey

FORMAT = 1
PARTITION_FILE, PUBLIC_FILE = "partition.json", "public.json"  # in a cache


def _hexadecimal(text: str) -> str:
    if re.fullmatch("[0-9a-f]{64}", text) is None:
        raise ValueError("expected 64 hexadecimal digits in lower case")
    return text


Sha256 = Annotated[str, AfterValidator(_hexadecimal)]


def _inside(file: str) -> str:
    path = PureWindowsPath(file)  # splits at both kinds of slash
    if path.anchor or ".." in path.parts:
        raise ValueError(f"'{file}' leads out of data.root")
    return file


# no system takes another character; read by nobody but below data.root
FilePath = Annotated[str, Field(pattern="^[^\0]+$"), AfterValidator(_inside)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ImageFiles(_Model):
    """One image of the input folder; paths are relative to ``data.root``."""

    image: FilePath
    mask: FilePath | None = None
    site: str
    group: str


class ImageEntry(ImageFiles):
    """The same with the files' sha256."""

    image_sha256: Sha256
    mask_sha256: Sha256 | None = None
    # height and width of the whole image in mm; left out of the file where it is not known
    size_mm: Annotated[
        tuple[PositiveFloat, PositiveFloat] | None, Field(exclude_if=lambda size: size is None)
    ] = None

    @model_validator(mode="after")
    def _check(self) -> ImageEntry:
        if self.mask is not None and self.mask_sha256 is None:
            raise ValueError("found a mask without its mask_sha256")
        return self


class ServerPart(_Model):
    """The public set D_p: what is trained on, and the calibration part that nobody trains on."""

    train: tuple[str, ...] = ()
    calibration: tuple[str, ...] = ()


class ClientPart(_Model):
    """One client's image ids."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]


class Partition(_Model):
    """Contents of ``partition.json``; without the server's images it is a site's own."""

    format: int = FORMAT
    scheme: str
    seed: int
    server: ServerPart
    clients: dict[str, ClientPart]
    images: dict[str, ImageEntry]

    @property
    def has_public(self) -> bool:
        """Whether it names D_p."""
        return any(ids for _, ids in self.server)

    @property
    def owners(self) -> tuple[str, ...]:
        """The server, if it has images, and the clients, by name."""
        return ("server", *self.clients) if self.has_public else (*self.clients,)

    def splits(self, owner: str) -> dict[str, tuple[str, ...]]:
        """Return the image ids of ``server`` or of a client, by split."""
        return dict(self.server if owner == "server" else self.clients[owner])

    def row_keys(self, ids: Sequence[str]) -> tuple[RowKey, ...]:
        """Return the rows that a label store of these images has."""
        return tuple(RowKey(image_id, self.images[image_id].image_sha256) for image_id in ids)

    def server_sha256(self) -> str:
        """Return a sha256 over the files of D_p and their split: what a teacher is adapted on."""
        files = {
            split: [(i, self.images[i].image_sha256, self.images[i].mask_sha256) for i in ids]
            for split, ids in self.splits("server").items()
        }
        return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def load_partition(path: Path, *, with_public: bool = False, stage: str = "prepare") -> Partition:
    """Read the ``partition.json`` that ``samfed prepare`` wrote.

    Args:
        with_public: whether the server's images are needed, which a site's own manifest lacks.
        stage: the command that writes the file.

    Raises:
        StageError: there is none, or not the server's. DataError: it is no partition.
    """
    raw = read_json(path, stage=stage)
    partition = _validated(path, raw, f"; delete it and run `samfed {stage}`")
    if with_public and not partition.has_public:
        raise StageError(
            f"{path}: found a site's own manifest, expected one with the server's images; run this "
            "at the server"
        )
    return partition


def _validated(path: Path, raw: Any, advice: str) -> Partition:
    """Return the partition that is in ``raw``; ``advice`` ends the error of one that is not."""
    try:
        partition = Partition.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "(top level)"
        fault = first["msg"].removeprefix("Value error, ")
        raise DataError(f"{path}: {key}: {fault}; expected a samfed partition{advice}") from error
    return check(path, partition)


def check(path: Path, partition: Partition) -> Partition:
    """Return a partition in which each image and each group is in one part.

    Raises:
        DataError: it is not so; the error names ``path``, where it is from.
    """
    fault = _fault(partition)
    if fault is not None:
        raise DataError(f"{path}: {fault}")
    return partition


def read_partition_file(path: Path, entries: Mapping[str, ImageEntry]) -> Partition:
    """Read a published partition back in; its images must be among ``entries``, with its digests.

    Raises:
        DataError: it is no partition, or an image is missing or another.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); expected a partition") from error
    partition = _validated(path, raw, "")
    for image_id, expected in partition.images.items():
        if image_id not in entries:
            raise DataError(f"{path}: image '{image_id}' is not in data.root; expected every one")
        for kind in ("image", "mask"):
            digest = getattr(expected, f"{kind}_sha256")
            if digest not in (None, getattr(entries[image_id], f"{kind}_sha256")):
                raise DataError(
                    f"partition.file: {kind} of '{image_id}' has another sha256 than the partition "
                    "says; use the files that it was made of"
                )
    # an older partition does not say how large a pixel is, and the folder may
    sizes = {i: each.size_mm or entries[i].size_mm for i, each in partition.images.items()}
    images = {i: e.model_copy(update={"size_mm": sizes[i]}) for i, e in partition.images.items()}
    return partition.model_copy(update={"images": images})


def save_partition(path: Path, partition: Partition) -> None:
    """Write ``partition.json`` atomically; the same partition gives the same bytes."""
    write_json(path, partition.model_dump())


def _fault(partition: Partition) -> str | None:
    """Say what is wrong: each id is known and in one part; a group's images are all in one part."""
    if partition.format != FORMAT:
        return f"format {partition.format}, this samfed reads format {FORMAT}"
    place_of: dict[str, str] = {}
    if not partition.owners:
        return "server train is empty; expected images in it"
    for client in partition.clients:
        if not is_site_name(client):
            return f"client '{client}' cannot name a folder; rename it"
    for owner in partition.owners:
        for split, ids in partition.splits(owner).items():
            place = f"{owner} {split}"
            if not ids and (split == "train" or owner == "server"):
                return f"{place} is empty; expected images in it"
            for image_id in ids:
                if image_id not in partition.images:
                    return f"'{image_id}' of {place} has no entry in images"
                for key in (f"image {image_id}", f"group {partition.images[image_id].group}"):
                    if place_of.setdefault(key, place) != place:
                        return f"{key} is in {place_of[key]} and in {place}"
            if len(set(ids)) < len(ids):
                twice = next(i for i in ids if ids.count(i) > 1)
                return f"image {twice} is listed twice in {place}"
    return None
