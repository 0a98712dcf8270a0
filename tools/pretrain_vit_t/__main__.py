"""Command line of the pretraining: ``python -m tools.pretrain_vit_t OUT --steps N --seed N``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.pretrain_vit_t.pretrain import pretrain


def main(arguments: Sequence[str] | None = None) -> None:
    """Pretrain, showing progress on stderr, and print the IoU on unseen scenes."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.pretrain_vit_t", description="Train vit_t on generated scenes."
    )
    parser.add_argument("out", type=Path, help="file to write, .safetensors")
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    def show(step: int, loss: float, iou: float) -> None:
        line = f"\rstep {step} of {options.steps}: loss {loss:.3f}, IoU {iou:.3f} "
        print(line, end="", file=sys.stderr, flush=True)

    iou = pretrain(options.out, steps=options.steps, seed=options.seed, progress=show)
    print(file=sys.stderr)
    print(f"IoU on unseen scenes {iou:.3f}; {options.out}")


if __name__ == "__main__":
    main()
