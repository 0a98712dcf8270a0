"""Generated images under the names of a published split, to try a full-size protocol without data.

    python benchmarks/split_files.py SPLIT OUT [--size-px 192] [--seed 0]

SPLIT is one of HSSF's files (docs/formats.md). OUT gets ``images/``, ``masks/`` and ``sites.csv``
with a generated image for each file name of it, in the format that the name has, whose site is its
domain. Every domain is drawn as one of the demo's sites, in turn, and each image as a patient.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from pipeline.data.dermoscopy import SITES, draw_patient, render


def write_files(split: Path, out: Path, *, size_px: int, seed: int) -> int:
    """Write the files; return how many images there are.

    Raises:
        OSError: SPLIT cannot be read, or there is something at OUT. ValueError: SPLIT is no such
        file.
    """
    domains: dict[str, dict[str, list[str]]] = json.loads(split.read_bytes())
    if not isinstance(domains, dict) or not all(isinstance(p, dict) for p in domains.values()):
        raise ValueError("expected HSSF's lists of file names by domain and part")
    styles = list(SITES.values())
    rows = [("image_id", "site")]
    out.mkdir(parents=True)
    for kind in ("images", "masks"):
        (out / kind).mkdir()
    for number, (domain, parts) in enumerate(domains.items()):
        style = styles[number % len(styles)]
        for row, name in enumerate(file for files in parts.values() for file in files):
            rng = np.random.default_rng([seed, number, row])
            image, mask = render(style, draw_patient(style, rng), rng, size_px)
            path = out / "images" / f"{domain}_{PurePosixPath(name).name}"
            Image.fromarray(image).save(path)
            Image.fromarray(mask).save(out / "masks" / f"{path.stem}.png")
            rows.append((path.stem, domain))
    with (out / "sites.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    return len(rows) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("split", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size-px", type=int, default=192)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    try:
        count = write_files(chosen.split, chosen.out, size_px=chosen.size_px, seed=chosen.seed)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{chosen.split}: {error}") from error
    print(f"{count} images in {chosen.out}")


if __name__ == "__main__":
    main()
