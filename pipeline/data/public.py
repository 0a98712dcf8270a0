"""D_p as one file: what the server's institution shares with every site, and stage two needs there.

The images of the public set at the client's size, with their labels and SAM's, and their manifest
(ids, groups, sha256). ``samfed public import`` makes the same stores of it that the server has.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.config import Config
from pipeline.data.partition import (
    PARTITION_FILE,
    PUBLIC_FILE,
    Partition,
    load_partition,
    save_partition,
)
from pipeline.disk import flush, to_json, writer_lock
from pipeline.errors import ConfigError, DataError, IdentityError
from pipeline.folders import folder_beside
from pipeline.stores.bundle import Bundle, unpacked, write_bundle
from pipeline.stores.image_store import ImageSet, read_image_store, write_image_store
from pipeline.stores.label_store import (
    Identity,
    LabelStore,
    RowKey,
    RowQuality,
    read_labels,
    write_empty,
)
from pipeline.stores.optional_arrays import has_probabilities
from pipeline.stores.pseudo_labels import PseudoLabels, row_arrays
from pipeline.stores.teacher_card import CARD_FILE, load_card

KIND = "public"
_ABOUT = "about.json"


class _About(BaseModel):
    """What is known of the arrays beside their rows: ``about.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image_size: int
    num_classes: int
    identity: Identity | None = None  # of SAM's labels; None: there are none
    provenance: list[list[dict[str, str]]] = []  # of each of their chunks
    quality: list[RowQuality | None] = []  # of each of their rows
    probabilities: bool = False  # whether those of every class are beside them


@dataclass(frozen=True)
class _Sent:
    """The content of an exported public set, checked."""

    manifest: Partition
    about: _About
    images: dict[str, ImageSet]  # by split
    labels: PseudoLabels | None

    @property
    def rows(self) -> tuple[RowKey, ...]:
        """The rows that SAM's labels have."""
        return self.manifest.row_keys(self.manifest.server.calibration)


def export_public(config: Config, file: Path) -> Bundle:
    """Write the public set of this cache to ``file``, with SAM's labels if there is a teacher.

    Raises:
        StageError: an earlier stage is missing. IdentityError: labels of another teacher.
    """
    cache, size, classes = config.cache.root, config.data.image_size, config.data.num_classes
    whole = load_partition(cache / PARTITION_FILE, with_public=True)
    ids = sorted(i for _, part in whole.server for i in part)
    manifest = whole.model_copy(update={"clients": {}, "images": {i: whole.images[i] for i in ids}})
    arrays: dict[str, dict[str, Any]] = {}
    for split, part in manifest.server:
        path = cache / "images" / "server" / f"{split}.zarr"
        stored = read_image_store(path, image_ids=part, size=size, num_classes=classes)
        arrays[split] = {"images": stored.images, "labels": stored.labels}
    about = _About(image_size=size, num_classes=classes)
    if (cache / "teacher" / CARD_FILE).is_file():
        about, arrays["sam"] = _labels_of(config, manifest)
    contents: dict[str, Path | bytes] = {
        PUBLIC_FILE: to_json(manifest.model_dump()).encode(),
        _ABOUT: to_json(about.model_dump()).encode(),
    }
    contents |= {f"{k}.safetensors": safetensors.numpy.save(v) for k, v in arrays.items()}
    return replace(write_bundle(file, KIND, contents), about=_counts(manifest))


def _labels_of(config: Config, manifest: Partition) -> tuple[_About, dict[str, Any]]:
    """Return what is known of SAM's labels of the calibration part, and the labels."""
    size, cache = config.data.image_size, config.cache.root
    card = load_card(cache / "teacher")
    identity = card.labels(config)
    rows = manifest.row_keys(manifest.server.calibration)
    read_labels(_label_path(cache), rows=rows, identity=identity)
    store = LabelStore(_label_path(cache))
    about = _About(
        image_size=size,
        num_classes=config.data.num_classes,
        identity=identity,
        provenance=store.provenance(),
        quality=store.quality(),
        probabilities=has_probabilities(store),
    )
    return about, store.read_arrays(store.arrays, range(len(store)))


def import_public(config: Config, file: Path) -> Bundle:
    """Read the server's public set into this cache: ``public.json`` and the stores of ``server``.

    Nothing is changed unless all of it is whole and fits the settings.

    Raises:
        DataError: the file is missing or damaged. FormatError: another samfed's. IdentityError: of
        another size or number of classes. ConfigError: this cache has a server's set of its own.
    """
    cache = config.cache.root
    manifest = cache / PARTITION_FILE
    if manifest.exists() and load_partition(manifest).has_public:
        raise ConfigError(f"{manifest}: has a server's set of its own; choose another cache.root")
    cache.mkdir(parents=True, exist_ok=True)
    locks = cache / "locks"
    with (
        writer_lock(locks / "prepare.lock"),
        writer_lock(locks / "sam-server.lock"),
        unpacked(file, KIND, beside=cache) as (folder, bundle),
    ):
        sent = _read(file, folder, bundle, config)
        _write(cache, sent)
    return replace(bundle, about=_counts(sent.manifest))


def _write(cache: Path, sent: _Sent) -> None:
    """Write the stores, and the manifest last; everything is written before it takes its place."""
    about, manifest = sent.about, cache / PUBLIC_FILE
    with ExitStack() as stack:
        images = stack.enter_context(folder_beside(cache / "images" / "server"))
        for split, part in sent.images.items():
            assert part.labels is not None
            rows = zip(part.images, part.labels, strict=True)
            size, classes = about.image_size, about.num_classes
            path = images / f"{split}.zarr"
            write_image_store(path, part.image_ids, rows, size=size, num_classes=classes)
        if sent.labels is not None:
            _write_labels(stack.enter_context(folder_beside(_label_path(cache))), sent)
        # whoever is killed from here on leaves no manifest, never one of other stores
        if manifest.exists():
            manifest.unlink()
            flush(cache)
    save_partition(manifest, sent.manifest)


def _write_labels(path: Path, sent: _Sent) -> None:
    """Write the label store that the server has."""
    about, labels = sent.about, sent.labels
    assert about.identity is not None
    assert labels is not None
    store = write_empty(path, about.identity, sent.rows, probabilities=about.probabilities)
    for chunk in range(store.chunks):
        rows = store.chunk_rows(chunk)
        inside = slice(rows.start, rows.stop)
        part = {name: getattr(labels, name)[inside] for name in store.arrays}
        store.write_chunk(chunk, rows, PseudoLabels(**part))
        store.mark_done(chunk, rows, about.provenance[chunk], about.quality[inside])


# --------------------------------------------------------------------------- what was sent


def _read(file: Path, folder: Path, bundle: Bundle, config: Config) -> _Sent:
    """Return what was unpacked to ``folder``, if all of it fits together and the settings."""
    try:
        about = _About.model_validate_json((folder / _ABOUT).read_bytes())
        manifest = load_partition(folder / PUBLIC_FILE, with_public=True)
        images = {
            split: _images(folder, split, ids, about.image_size) for split, ids in manifest.server
        }
        labels = None if about.identity is None else _sam(folder, about, manifest)
    except (ValidationError, ValueError, LookupError, FileNotFoundError, DataError) as error:
        raise DataError(
            f"{file}: holds no public set that this samfed can read; export it again"
        ) from error
    for key in ("image_size", "num_classes"):
        found, expected = getattr(about, key), getattr(config.data, key)
        if found != expected:
            raise IdentityError(
                f"{file}: data.{key} is {found}, this site's is {expected}; take the server's "
                "settings, and run `samfed prepare --site` again"
            )
    return _Sent(manifest, about, images, labels)


def _images(folder: Path, split: str, ids: tuple[str, ...], size: int) -> ImageSet:
    shapes = {"images": (len(ids), size, size, 3), "labels": (len(ids), size, size)}
    arrays = _arrays(folder, split, shapes, dict.fromkeys(shapes, "uint8"))
    return ImageSet(ids, arrays["images"], arrays["labels"])


def _sam(folder: Path, about: _About, manifest: Partition) -> PseudoLabels:
    count, size, identity = len(manifest.server.calibration), about.image_size, about.identity
    if len(about.quality) != count or identity is None or identity.label_size != size:
        raise ValueError("labels of other images")
    rows = row_arrays(
        size, identity.num_classes, views=identity.views, probabilities=about.probabilities
    )
    shapes = {name: (count, *shape) for name, (shape, _) in rows.items()}
    dtypes = {name: dtype for name, (_, dtype) in rows.items()}
    return PseudoLabels(**_arrays(folder, "sam", shapes, dtypes))


def _arrays(
    folder: Path, name: str, shapes: dict[str, tuple[int, ...]], dtypes: dict[str, str]
) -> dict[str, NDArray[Any]]:
    """Read arrays, which must be these.

    Raises:
        ValueError: they are others.
    """
    try:
        arrays = safetensors.numpy.load_file(folder / f"{name}.safetensors")
    except safetensors.SafetensorError as error:
        raise ValueError(str(error)) from error
    found = {key: (value.shape, value.dtype) for key, value in arrays.items()}
    if found != {key: (shape, np.dtype(dtypes[key])) for key, shape in shapes.items()}:
        raise ValueError("arrays of other names, shapes or types")
    return arrays


def _label_path(cache: Path) -> Path:
    return cache / "sam" / "server.zarr"


def _counts(manifest: Partition) -> str:
    server = manifest.server
    return f"{len(server.train)} images to train on, {len(server.calibration)} to calibrate with"
