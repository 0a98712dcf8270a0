"""The embedded default dataset: generated dermoscopy-like images with exact masks, from four sites.

The sites differ as hospitals do (skin, camera, light, hair, size of the lesion), so that labels of
one site are not enough for the others.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.data.dermoscopy import SITES, draw_patient, render
from pipeline.errors import DataError
from pipeline.folders import folder_beside
from pipeline.progress import Progress

GENERATOR = "samfed.synthetic"
GENERATOR_VERSION = 1  # raise it with every change that changes bytes
CARD_NAME = "synthetic.json"
SITE_NAMES = tuple(SITES)

_Row = tuple[str, str, str]  # of sites.csv: image, site and group


def _rng(seed: int, site: str, patient: int, number: int) -> np.random.Generator:
    """Return the stream of one image (number >= 1) or of one patient's style (number = 0)."""
    # SeedSequence pads its key with zeros: keys of one length keep (1, 2) apart from (1, 2, 0).
    key = (SITE_NAMES.index(site), patient, number)
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def _write_site(folder: Path, name: str, arguments: dict[str, int]) -> Iterator[_Row]:
    """Write one site's images and masks; yields the row of ``sites.csv`` of each."""
    seed, count, person, written = arguments["seed"], arguments["images_per_site"], 0, 0
    while written < count:
        person += 1
        patient = draw_patient(SITES[name], _rng(seed, name, person, 0))
        for number in range(1, 1 + min(patient.images, count - written)):
            image_id = f"{name}_{written + 1:04d}"
            rng = _rng(seed, name, person, number)
            image, mask = render(SITES[name], patient, rng, arguments["size_px"])
            for kind, pixels in (("images", image), ("masks", mask)):
                path = folder / kind / f"{image_id}.png"
                Image.fromarray(pixels).save(path, format="PNG", compress_level=6)
            written += 1
            yield image_id, name, f"{name}_patient_{person:03d}"


def _check_replaceable(out: Path) -> None:
    """Refuse to replace anything that :func:`write_dataset` did not write."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        ours = json.loads((out / CARD_NAME).read_bytes())["generator"] == GENERATOR
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        ours = False
    if not ours:
        found = f"a folder without a {CARD_NAME} of samfed's" if out.is_dir() else "a file"
        raise DataError(
            f"{out}: found {found}, expected no such path, an empty folder or an earlier synthetic "
            "dataset; move it away or choose another output folder"
        )


@dataclass(frozen=True)
class GeneratedData:
    """A data set that ``write_dataset`` wrote."""

    folder: Path
    images: int

    def as_json(self) -> dict[str, Any]:
        """Return the folder and the number of its images."""
        return {"folder": str(self.folder), "images": self.images}

    def text(self) -> str:
        """Return the same as a line."""
        return f"{self.images} images in {self.folder}"


def write_dataset(
    out: Path,
    *,
    images_per_site: int,
    size_px: int,
    seed: int,
    progress: Progress | None = None,
) -> GeneratedData:
    """Write ``images/``, ``masks/``, ``sites.csv`` and ``synthetic.json`` to the folder ``out``.

    The numbers are those of ``SynthConfig``; two sites are wider than high. An image depends only
    on the seed, its site, patient and number: a larger ``images_per_site`` keeps the earlier ones,
    and the same arguments give the same bytes. ``out`` appears, or is replaced, as a whole.
    """
    arguments = {"images_per_site": images_per_site, "size_px": size_px, "seed": seed}
    final = out.resolve()
    _check_replaceable(final)
    with folder_beside(final) as folder:
        for kind in ("images", "masks"):
            (folder / kind).mkdir()
        rows = list[_Row]()
        for name in SITE_NAMES:
            for row in _write_site(folder, name, arguments):
                rows.append(row)
                if progress is not None:
                    progress("generating images", len(rows), len(SITE_NAMES) * images_per_site)
        with (folder / "sites.csv").open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerows([("image_id", "site", "group"), *rows])
        card = {"generator": GENERATOR, "version": GENERATOR_VERSION, **arguments}
        (folder / CARD_NAME).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    return GeneratedData(out, len(rows))
