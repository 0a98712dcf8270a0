"""Print finished runs as a Markdown table: `python benchmarks/table.py CACHE [RUN ...]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(cache: Path, names: list[str]) -> None:
    """One line a run, in the order given (all, by name, if none is)."""
    runs = [cache / "runs" / name for name in names] or sorted((cache / "runs").iterdir())
    print("| run | Dice | 95 % interval | HD95 px | 95 % interval | mean over clients | images |")
    print("|---|---|---|---|---|---|---|")
    for run in runs:
        test = json.loads((run / "metrics.json").read_text())["test"]
        row = test["pooled"]
        dice, distance = row["dice_ci95"], row["hd95_ci95"]
        print(
            f"| `{run.name}` | {row['dice']:.3f} | {dice[0]:.3f} to {dice[1]:.3f} "
            f"| {row['hd95']:.1f} | {distance[0]:.1f} to {distance[1]:.1f} "
            f"| {test['client_mean']['dice']:.3f} | {row['n']} |"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
