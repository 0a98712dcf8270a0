"""One image on its way into the input layout."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf, isfinite, nan
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import NamedTuple

from PIL import Image

from pipeline.data.importers.sources import Files
from pipeline.errors import ConfigError, DataError


class Spacing(NamedTuple):
    """Millimetres between rows, between columns and, where it is known, between slices."""

    row_mm: float
    column_mm: float
    slice_mm: float | None


@dataclass(frozen=True)
class Item:
    """An image and its mask: files whose bytes are copied, or pixels that are written as PNG."""

    image_id: str
    image: Path | Image.Image
    mask: Path | Image.Image | None
    site: str
    group: str
    spacing: Spacing | None = None


@dataclass(frozen=True)
class Options:
    """How the general kinds are read.

    Attributes:
        labels: where an image's labels lie: a path from the image's folder without ending, in which
            ``{}`` is the image's name without ending; None tries ``LABEL_PATTERNS``.
        axis: the axis that slices are cut across, by the plane that this gives: axial, coronal or
            sagittal; None is the plane that was acquired.
        window: centre and width of the values that become 0..255; None takes the tags or the
            percentiles.
        drop_empty: whether slices whose mask is empty are left out.
    """

    labels: str | None = None
    axis: str | None = None
    window: tuple[float, float] | None = None
    drop_empty: bool = False


def parse_window(text: str | None) -> tuple[float, float] | None:
    """Read a window from the text ``CENTER,WIDTH``.

    Raises:
        ConfigError: it is not two finite numbers, or the width is not positive.
    """
    if text is None:
        return None
    try:
        centre, width = (float(each) for each in text.split(","))
    except ValueError:
        centre, width = nan, nan
    if not isfinite(centre) or not 0 < width < inf:
        raise ConfigError(
            f"--window {text}: expected CENTER,WIDTH with a positive width, e.g. 40,400"
        )
    return centre, width


LABEL_PATTERNS = (
    *(f"{{}}_{word}" for word in ("gt", "seg", "label", "labels", "mask")),
    *(f"{folder}/{{}}" for folder in ("labels", "masks")),
    *(f"../{folder}/{{}}" for folder in ("labels", "masks", "labelsTr", "labelsTs")),
)


class Labelled(NamedTuple):
    """Which image has which label file, by their names, and the labels that no image has."""

    labels: dict[str, str]
    orphans: list[str]


def pair_labels(
    images: Iterable[str], files: Files, *, endings: Sequence[str], given: str | None
) -> Labelled:
    """Find the label file of each image among ``files``.

    Args:
        images: names of files that are images, or labels of others.
        endings: endings of label files, lower case.
        given: ``Options.labels``.

    Raises:
        ConfigError: the pattern has not exactly one ``{}``. DataError: an image has two labels.
    """
    if given is not None and given.count("{}") != 1:
        raise ConfigError(
            f"--labels {given}: expected one {{}}, which stands for an image's name, as in "
            "'{}_seg' or '../labels/{}'"
        )
    patterns = LABEL_PATTERNS if given is None else (given,)
    known = {name.lower(): name for name in files}
    labels: dict[str, str] = {}
    for name in images:
        path = PurePosixPath(name)
        stem = re.sub(r"(\.nii)?\.[^.]+$", "", path.name, flags=re.IGNORECASE)
        stems = dict.fromkeys([stem, stem.removesuffix("_0000")])  # nnU-Net numbers its channels
        wanted = {
            normpath(f"{path.parent}/{each.replace('{}', one)}{ending}").lower()
            for each in patterns
            for one in stems
            for ending in endings
        }
        found = sorted(known[each] for each in wanted & known.keys() if known[each] != name)
        if len(found) > 1:
            raise DataError(
                f"{name}: found two labels, {found[0]} and {found[1]}; say which with --labels"
            )
        if found:
            labels[name] = found[0]
    taken = set(labels.values())
    shapes = [re.escape(each.removeprefix("../")).replace(r"\{\}", "[^/]+") for each in patterns]
    shape = re.compile(
        rf"(?:.*/)?(?:{'|'.join(shapes)})(?:{'|'.join(map(re.escape, endings))})", re.IGNORECASE
    )
    # a name like a label's beside nothing that it could belong to is not taken for an image
    orphans = [name for name in files if name not in taken and shape.fullmatch(name)]
    orphans = [name for name in orphans if name not in labels]
    return Labelled({k: v for k, v in labels.items() if k not in taken}, orphans)
