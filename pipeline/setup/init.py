"""``samfed init``: look at a folder of images and write commented settings that suit it."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import yaml

from pipeline.data.decoding import decode
from pipeline.data.drawing import draw_partition
from pipeline.data.folder import ANY_MASK, InputFolder, scan, suggest_mask_pattern
from pipeline.data.importers.sources import recognise
from pipeline.data.masks import interpret
from pipeline.disk import write_bytes
from pipeline.errors import ConfigError, DataError
from pipeline.params import parse_config

WEIGHTS = Path("weights")  # where `samfed fetch` puts them, and where they are looked for
_LOOKED_AT = 64  # images, and masks, that are decoded
_CLASSES = 63  # larger values are shades of grey, no classes
_SIZES_PX = (96, 128, 256, 384)  # above the generated images', which `prepare` warns of
_CPU_PX = 128  # what a CPU trains in minutes
_SERVER_IMAGES = 100
_CLIENTS = 4
_GROUPS_PER_CLIENT = 3  # a group to train on, one to validate and one to test
_GPU_TEACHERS = (("vit_h", 30), ("vit_l", 20), ("vit_b", 10))  # and the GPU memory it wants, GB
_CPU_TEACHER = "tf_efficientnet_lite2"
_ENCODER = "tf_efficientnet_lite0"


@dataclass(frozen=True)
class Choice:
    """A setting, and why it was chosen."""

    section: str
    key: str
    value: Any
    why: str

    def line(self) -> str:
        """Return it as a line of a section; JSON's text and lists are YAML's too."""
        return f"  {self.key}: {json.dumps(self.value)}  # {' '.join(self.why.split())}"


@dataclass(frozen=True)
class InitResult:
    """What ``samfed init`` wrote."""

    path: Path
    found: str
    choices: tuple[Choice, ...]

    def content(self) -> str:
        """Return the file's text."""
        found = " ".join(self.found.split())  # one line, whatever files are called
        lines = [f"# Written by `samfed init`: {found}.", "# What is not here is the default."]
        for section in dict.fromkeys(each.section for each in self.choices):
            lines += ["", f"{section}:"]
            lines += [each.line() for each in self.choices if each.section == section]
        return "\n".join(lines) + "\n"

    def text(self) -> str:
        """Return what was found, and what was chosen and why."""
        lines = [f"{each.section}.{each.line().strip()}" for each in self.choices]
        return "\n".join([self.found, *lines, f"written to {self.path}"])

    def as_json(self) -> dict[str, Any]:
        """Return the same for machines."""
        settings: dict[str, Any] = yaml.safe_load(self.content())
        return {"file": str(self.path), "found": self.found, "settings": settings}


def init(folder: Path, out: Path, *, force: bool = False) -> InitResult:
    """Look at ``folder``, which is in the input layout, and write settings for it to ``out``.

    Raises:
        ConfigError: ``out`` is there, and not ``force``. DataError: the folder is in another
        layout, has no masks, or something in it is unusable.
    """
    if os.path.lexists(out) and not force:
        raise ConfigError(f"{out}: exists already; give --force to replace it, or another --out")
    pattern, found = _scan(folder)
    looks = [_look(folder / files.image) for files in _some(list(found.images.values()))]
    size, classes = _size([side for side, _ in looks]), _classes(folder, found)
    kinds = " and ".join(sorted({kind for _, kind in looks}))
    data = tuple(_data(folder, out, pattern, (classes, size)))
    others = (*_model(out), *_augment(kinds), *_teacher(out), *_federate())
    for partition in _partitions(found):
        result = InitResult(out, f"{found.text()}; {kinds}", (*data, *partition, *others))
        try:
            _try(result, found)
        except ConfigError as error:
            refusal = error
        else:
            write_bytes(out, result.content().encode())
            return result
    raise DataError(f"{folder}: no partition fits these images; {refusal}") from refusal


def _try(result: InitResult, found: InputFolder) -> None:
    """Draw the partition that the settings ask for.

    Raises:
        ConfigError: these images do not allow it.
    """
    config = parse_config(yaml.safe_load(result.content()), source="samfed init")
    masked = [image_id for image_id, files in found.images.items() if files.mask is not None]
    area = dict.fromkeys(masked, 0.0)
    draw_partition(found.images, config.partition, seed=config.seed, foreground=area)


def _scan(folder: Path) -> tuple[str, InputFolder]:
    """Return the folder's content under the default names of masks, or under those it has."""
    if not (folder / "images").is_dir():
        kind = recognise(folder)
        advice = "expected images/ and masks/ in it"
        if kind is not None:
            advice = f"this looks like {kind}: run `samfed import {kind} {folder} OUT` first"
        raise DataError(f"{folder}: not in the input layout; {advice}")
    pattern = ANY_MASK
    try:
        found = scan(folder)
    except DataError:
        suggested = suggest_mask_pattern(folder)
        if suggested in (None, pattern):
            raise
        pattern, found = str(suggested), scan(folder, mask_pattern=str(suggested))
    if not any(files.mask for files in found.images.values()):
        raise DataError(
            f"{folder}: no image has a mask; the server's images need some, as masks/<id>.png"
        )
    return pattern, found


def _look(path: Path) -> tuple[int, str]:
    """Return an image's shorter side in pixels, and whether it is grey or colour."""
    colour = decode(path).layers().colour
    return min(colour.shape[:2]), "grey" if (colour == colour[:, :, :1]).all() else "colour"


def _some(every: Sequence[Any]) -> Sequence[Any]:
    return every[:: -(-len(every) // _LOOKED_AT)]


# --------------------------------------------------------------------------- choices


def _data(folder: Path, out: Path, pattern: str, others: Iterable[Choice]) -> Iterator[Choice]:
    yield Choice("data", "root", _relative(folder, out), "relative to this file")
    if pattern != ANY_MASK:
        yield Choice("data", "mask_pattern", pattern, "under which most masks belong to an image")
    yield from others


def _size(sides: Sequence[int]) -> Choice:
    """Choose the client's frame by the shorter sides of the images and by what computes."""
    side = int(median(sides))
    limit = _SIZES_PX[-1] if torch.cuda.is_available() else _CPU_PX
    fitting = [size for size in _SIZES_PX if size <= min(side, limit)]
    where = "a GPU" if torch.cuda.is_available() else "a CPU"
    why = f"px; images have a shorter side of {side} (median), and {where} takes up to {limit}"
    return Choice("data", "image_size", max(fitting, default=_SIZES_PX[0]), why)


def _classes(folder: Path, found: InputFolder) -> Choice:
    """Choose the number of classes: the largest small value of the masks, if all masks allow it."""
    masks = _some([files.mask for files in found.images.values() if files.mask is not None])
    values = set[int]()
    for mask in masks:
        raster = decode(folder / mask).values
        if raster.ndim == 2 and raster.dtype.kind in "bui":
            values |= set(np.unique(raster).astype(int).tolist())
    named = ", ".join(map(str, sorted(values)[:8])) + (", ..." if len(values) > 8 else "")
    why = f"masks have the values {named}" if values else "masks have colours"
    largest = max(values, default=1)
    with suppress(ValueError):  # no class indices in all of them, so a shape
        if 1 < largest <= _CLASSES:
            for mask in masks:
                interpret(decode(folder / mask), largest)
            return Choice("data", "num_classes", largest, why)
    return Choice("data", "num_classes", 1, why)


def _partitions(found: InputFolder) -> Iterator[list[Choice]]:
    """Yield what to try: each site a client, then fewer and fewer clients drawn at random."""
    images = found.images.values()
    available = sum(files.mask is not None for files in images)
    one = len({files.site for files in images}) == 1
    if not one:
        yield list(_by_site(found))
    groups = len({files.group for files in images}) * (1 - _half(available) / len(images))
    most = max(1, min(_CLIENTS, int(groups) // _GROUPS_PER_CLIENT))
    why = "there is one site" if one else "a site is too small to be a client by itself"
    for clients in range(most, 0, -1):
        yield [
            Choice("partition", "scheme", "iid", f"{why}; clients are drawn at random"),
            Choice("partition", "clients", clients, f"about {groups:.0f} groups are left for them"),
            Choice("partition", "server_site", None, "drawn from all images"),
            *_server(available),
        ]


def _by_site(found: InputFolder) -> Iterator[Choice]:
    """Choose a client for each site, and the server's set at the site with most masks."""
    images = found.images.values()
    sites = Counter(files.site for files in images)
    masks = Counter(files.site for files in images if files.mask is not None)
    site, available = masks.most_common(1)[0]
    named = ", ".join(f"{name} {count} ({masks[name]})" for name, count in sorted(sites.items()))
    yield Choice("partition", "scheme", "site", f"images (masks) by site: {named}")
    yield Choice("partition", "server_site", site, f"it has the most masks, {available}")
    yield from _server(available)


def _half(available: int) -> int:
    return max(1, min(_SERVER_IMAGES, available // 2))


def _server(available: int) -> Iterator[Choice]:
    """Choose how large the server's set is, of so many images with masks."""
    count = _half(available)
    why = f"half of {available} with masks there, at most {_SERVER_IMAGES}; the rest is tested on"
    yield Choice("partition", "server_images", count, why)
    why = "a third at most, so that the teacher has images to learn from"
    yield Choice("partition", "calibration_min", max(1, min(10, count // 3)), why)


def _model(out: Path) -> Iterator[Choice]:
    """Choose an encoder whose ImageNet weights are there; else the default, from random weights."""
    weights = WEIGHTS / f"{_ENCODER}.safetensors"
    if not weights.is_file():
        why = f"{weights} is not there (timm's {_ENCODER}), so the encoder starts from random"
        yield Choice("model", "encoder_weights", None, f"{why} weights: expect less")
        return
    yield Choice("model", "architecture", "segformer", "light, and good with this encoder")
    yield Choice("model", "encoder", f"tu-{_ENCODER}", "its ImageNet weights are there")
    yield Choice("model", "encoder_depth", 5, "all of the encoder's levels")
    yield Choice("model", "decoder_channels", [64], "one number for segformer")
    yield Choice("model", "encoder_weights", _relative(weights, out), "relative to this file")


def _augment(kinds: str) -> Iterator[Choice]:
    """Choose the views of scans, which are taken one way up; photographs keep the default."""
    if kinds != "grey":
        return
    why = "grey images are mostly scans, taken one way up, and mostly left and right differ"
    yield Choice("augment", "flips", "none", f"{why}; horizontal if they do not")
    yield Choice("augment", "turns", False, "for the same reason, no quarter turns")


def _teacher(out: Path) -> Iterator[Choice]:
    """Choose the largest teacher that the hardware takes and whose weights are there."""
    gigabytes = 0.0
    if torch.cuda.is_available():
        gigabytes = torch.cuda.get_device_properties(0).total_memory / 1e9
    hardware = f"{gigabytes:.0f} GB of GPU memory" if gigabytes else "a CPU"
    wanted = [variant for variant, least in _GPU_TEACHERS if gigabytes >= least]
    files = {variant: sorted(WEIGHTS.glob(f"sam_{variant}_*.pth")) for variant in wanted}
    files[f"timm:{_CPU_TEACHER}"] = sorted(WEIGHTS.glob(f"{_CPU_TEACHER}.safetensors"))
    for variant, paths in files.items():
        if paths:
            yield Choice("sam", "variant", variant, f"suits {hardware}, and its weights are there")
            yield Choice("sam", "checkpoint", _relative(paths[0], out), "relative to this file")
            return
    better = f"`samfed fetch sam_{wanted[-1]}`" if wanted else f"timm's {_CPU_TEACHER}.safetensors"
    why = f"the tiny SAM that comes along; {hardware} takes more: put {better} into {WEIGHTS}"
    yield Choice("sam", "variant", "vit_t", why)


def _federate() -> Iterator[Choice]:
    """Choose the mean of the last rounds, as the tables of docs/benchmarks.md have it."""
    why = "the mean of the last three rounds' models varies less than the last one"
    yield Choice("federate", "average_rounds", 3, why)


def _relative(path: Path, out: Path) -> str:
    """Return ``path`` as settings in ``out`` name it."""
    return os.path.relpath(path.resolve(), out.resolve().parent)
