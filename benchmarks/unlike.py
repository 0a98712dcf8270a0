"""How well the distances of `samfed predict` tell other kinds of images from a model's own.

    samfed predict RUN FOLDER --out OUT          # held-out images of its own kind, then the others
    python benchmarks/unlike.py OUT... --other OUT...

Prints for each folder of predictions the share that is flagged as unlike, and the AUROC of its
distances against those of the model's own kind (0.5: they look alike).
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
from scipy.stats import mannwhitneyu


def read(folder: Path) -> tuple[list[float], float]:
    """Return the distances of a folder of predictions, and the share of images that are unlike."""
    with (folder / "predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["class"] == "1"]
    return [float(row["distance"]) for row in rows], np.mean([r["unlike"] == "yes" for r in rows])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("own", type=Path, nargs="+", metavar="OUT")
    parser.add_argument("--other", type=Path, nargs="+", default=[], metavar="OUT")
    given = parser.parse_args()
    own = [distance for folder in given.own for distance in read(folder)[0]]
    print("| predictions | images | unlike | AUROC |\n|---|---|---|---|")
    for folder in (*given.own, *given.other):
        found, share = read(folder)
        area = mannwhitneyu(found, own).statistic / (len(found) * len(own))
        print(f"| {folder.name} | {len(found)} | {share:.3f} | {area:.3f} |")


if __name__ == "__main__":
    main()
