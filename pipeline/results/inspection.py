"""``samfed cache show`` and ``export``: what labels look like, here and in other viewers."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.config import Config
from pipeline.data.partition import Partition, load_partition
from pipeline.disk import write_bytes
from pipeline.errors import ConfigError, DataError, IdentityError, StageError
from pipeline.labelling.job import owner_images, store_path
from pipeline.progress import Progress
from pipeline.results.pages import heat_map, overlay, png_bytes, resized
from pipeline.segmentation.palette import class_colour
from pipeline.stores.image_store import ImageStore
from pipeline.stores.label_store import LabelStore
from pipeline.stores.ome_zarr import Pixels, write_ome_zarr
from pipeline.stores.pseudo_labels import PROBABILITIES, PseudoLabels, confidence_to_probability

_PICTURE_PX = 384  # side of each of the three pictures, at least
_GAP_PX = 8
_FEW = 10  # names that a line can hold, all of them


@dataclass(frozen=True)
class ClassShare:
    """A class in one label: its share of the pixels, and their mean confidence, both 0..1."""

    index: int
    share: float
    confidence: float


@dataclass(frozen=True)
class Shown:
    """One image's label in numbers, and where the picture of it lies."""

    client: str
    image_id: str
    row: int
    classes: list[ClassShare]  # background, 0, first; those that are there
    predicted_iou: float
    flip_dice: float | None  # with the mirrored image's label; of one view, of a sample alone
    view_agreement: float | None  # mean Dice of the views' labels with this one, where it has views
    identity: dict[str, Any]
    provenance: list[dict[str, Any]]  # of all that labelled rows of its chunk
    picture: str

    def text(self) -> str:
        """Return the same, a line for each class."""
        flip = (
            "" if self.flip_dice is None else f", Dice with its mirror image {self.flip_dice:.2f}"
        )
        if self.view_agreement is not None:
            flip += f", its views' Dice with it {self.view_agreement:.2f}"
        by = "; ".join(", ".join(f"{k} {v}" for k, v in p.items()) for p in self.provenance)
        variant = self.identity["variant"]
        lines = [f"{self.client}, {self.image_id}: row {self.row}, labelled by {variant}"]
        lines += [
            f"  {f'class {each.index}' if each.index else 'background'}: {each.share:.1%} of the "
            f"pixels, mean confidence {each.confidence:.2f}"
            for each in self.classes
        ]
        lines += [f"  predicted IoU {self.predicted_iou:.2f}{flip}", f"  computed by {by}"]
        return "\n".join([*lines, f"image, label and confidence: {self.picture}"])

    def as_json(self) -> dict[str, Any]:
        """Return the same for a machine."""
        return asdict(self)


def show(config: Config, client: str, image_id: str, *, out: Path | None = None) -> Shown:
    """Describe SAM's label of one image, and write image, label and confidence as one PNG.

    Where the truth is known (the server's calibration part), its outline is a white line.

    Args:
        client: a client's name, or ``server``.
        out: the picture (default: ``show/<client>/<image_id>.png`` in the cache).

    Raises:
        ConfigError: no such client or image, or ``out`` is no PNG. StageError: it is not labelled
        yet. IdentityError: the label is of another image by now. CorruptStoreError: a store is
        damaged.
    """
    if out is not None and out.suffix.lower() != ".png":
        raise ConfigError(f"--out {out}: a PNG is written there; expected a name with .png")
    cache = config.cache.root
    partition = load_partition(cache / "partition.json")
    owners = owner_images(partition)
    check_name("client", client, owners)
    check_name(f"image of {client} that SAM labels", image_id, owners[client])
    store = LabelStore(store_path(cache, client))
    (key,) = partition.row_keys([image_id])
    if key not in store.rows:
        raise _other_images(store)
    row = store.rows.index(key)
    state, start = store.state(row // store.rows_per_chunk), row % store.rows_per_chunk
    if not state.done[start]:
        raise StageError(f"{store.path}: {image_id} has no label; run `samfed precompute-sam`")
    images = _image_store(cache, client)
    place = images.image_ids.index(image_id)
    image, labels = images.read(range(place, place + 1)), _labels(store, range(row, row + 1))
    truth = None if image.labels is None else image.labels[0]
    path = out or cache / "show" / client / f"{image_id}.png"
    picture = _picture(image.images[0], labels, truth)
    write_bytes(path, png_bytes(picture))
    quality = state.quality[start]
    agreement = None if labels.view_agreement is None else float(labels.view_agreement[0])
    return Shown(
        client=client,
        image_id=image_id,
        row=row,
        classes=_shares(labels),
        predicted_iou=float(labels.predicted_iou[0]),
        flip_dice=None if quality is None else quality.flip_dice,
        view_agreement=agreement,
        identity=store.identity.model_dump(),
        provenance=list(state.provenance),
        picture=str(path),
    )


def check_name(what: str, name: str, known: Collection[str]) -> None:
    """Refuse a name that is not known; few known ones are all listed, of many the nearest.

    Raises:
        ConfigError: it is not known; ``what`` says what it should be the name of.
    """
    if name not in known:
        shown = sorted(known)
        if len(shown) > _FEW:
            shown = [*(sorted(difflib.get_close_matches(name, known)) or shown[:3]), "..."]
        raise ConfigError(f"no {what} is called '{name}'; found {', '.join(shown) or 'none'}")


def _other_images(store: LabelStore) -> IdentityError:
    return IdentityError(
        f"{store.path}: has labels of other images than the partition has now; run `samfed "
        "precompute-sam`"
    )


def _image_store(cache: Path, owner: str) -> ImageStore:
    split = "calibration" if owner == "server" else "train"
    return ImageStore(cache / "images" / owner / f"{split}.zarr")


def _labels(store: LabelStore, rows: range) -> PseudoLabels:
    names = [name for name in store.arrays if name != PROBABILITIES]
    return PseudoLabels(**store.read_arrays(names, rows))


def _shares(labels: PseudoLabels) -> list[ClassShare]:
    mask, sure = labels.masks[0], confidence_to_probability(labels.confidences[0])
    return [
        ClassShare(int(k), float((mask == k).mean()), float(sure[mask == k].mean()))
        for k in np.unique(mask)
    ]


def _picture(image: Pixels, labels: PseudoLabels, truth: Pixels | None) -> Image.Image:
    """Draw the image, the label on it, and the confidence from 0 (blue) to 1 (yellow), in a row."""
    side = len(image) * -(-_PICTURE_PX // len(image))
    plain = resized(image, side)
    labelled = plain.convert("RGBA")
    labelled.alpha_composite(overlay(labels.masks[0], truth, side))
    row = Image.new("RGB", (3 * side + 2 * _GAP_PX, side), "white")
    for place, part in enumerate((plain, labelled, heat_map(labels.confidences[0], side))):
        row.paste(part.convert("RGB"), (place * (side + _GAP_PX), 0))
    return row


# --------------------------------------------------------------------------- export


@dataclass(frozen=True)
class Exported:
    """The OME-Zarr images that were written, a client each."""

    paths: list[str]
    images: int

    def text(self) -> str:
        """Return a line for each."""
        return "\n".join([*self.paths, f"{self.images} images with labels and confidence"])

    def as_json(self) -> dict[str, Any]:
        """Return the same for a machine."""
        return asdict(self)


def export(
    config: Config, out: Path, *, clients: Sequence[str] = (), progress: Progress | None = None
) -> Exported:
    """Write the images of each client with SAM's labels as ``<client>.ome.zarr`` in ``out``.

    Args:
        clients: only these, of which ``server`` may be one (default: all).

    Raises:
        ConfigError: no such client, or the extra is missing. DataError: a path is taken already.
        StageError: something is not labelled yet. IdentityError: labels are of other images.
    """
    cache = config.cache.root
    partition = load_partition(cache / "partition.json")
    owners = owner_images(partition)
    for client in clients:
        check_name("client", client, owners)
    jobs = [(each, out / f"{each}.ome.zarr") for each in clients or owners if owners[each]]
    stores = [_whole_store(config, partition, each, path) for each, path in jobs]
    done, total = 0, sum(map(len, stores))
    for (client, path), store in zip(jobs, stores, strict=True):
        colours = {k: class_colour(k) for k in range(1, store.identity.num_classes + 1)}
        for count in write_ome_zarr(path, _image_store(cache, client), store, colours=colours):
            done += count
            if progress is not None:
                progress("exporting images", done, total)
    return Exported([str(path) for _, path in jobs], total)


def _whole_store(config: Config, partition: Partition, owner: str, path: Path) -> LabelStore:
    """Return the owner's label store, if all of it may be exported to ``path``."""
    if path.exists():
        raise DataError(f"{path}: is there already; move it away or choose another folder")
    store = LabelStore(store_path(config.cache.root, owner))
    if store.rows != partition.row_keys(owner_images(partition)[owner]):
        raise _other_images(store)
    if store.pending():
        raise StageError(f"{store.path}: has images without a label; run `samfed precompute-sam`")
    return store
