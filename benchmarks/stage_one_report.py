"""The contenders of ``stage_one.py``, and what it measured of them, compared and printed."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from pipeline.config import Frame


@dataclass(frozen=True)
class Contender:
    """A way to label images, and the images that it is given."""

    title: str
    code: Literal["stock", "torch", "onnx"]
    images: Literal["4:3", "squares"] = "4:3"
    precision: str = "auto"  # of stock: what autocast uses
    frame: Frame = "pad"
    workers: int = 1


CONTENDERS = {
    "stock_fp32": Contender("SamPredictor loop, fp32", "stock", precision="fp32"),
    "stock_bf16": Contender("the same, bf16 autocast", "stock", precision="bf16"),
    "samfed": Contender("samfed, 4:3 padded", "torch"),
    "samfed_squares": Contender("samfed, squares", "torch", "squares"),
    "content": Contender("samfed, 4:3, content", "torch", frame="content"),
    "two_workers": Contender("samfed, two workers", "torch", workers=2),
    "int8": Contender("samfed, int8, squares", "torch", "squares", "int8"),
    "int8_content": Contender("samfed, int8, 4:3, content", "torch", "4:3", "int8", "content"),
    "onnx": Contender("samfed, ONNX Runtime", "onnx"),
}


def median_of(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a contender's medians; what only the first round measured stays as it is."""
    row = dict(rounds[0])
    for key in ("images_per_s", "cpu_s_per_image", "peak_mib", "grown_mib", "outside_network"):
        if key in row:
            row[key] = median(found[key] for found in rounds)
    row["images_per_s_of_rounds"] = [found["images_per_s"] for found in rounds]
    return row


def compare(results: dict[str, dict[str, Any]], ceilings: dict[str, float]) -> None:
    """Add shares of the ceiling, and speed-ups against stock where it was measured."""
    stock = results.get("stock_fp32")
    for result in results.values():
        rate = result["images_per_s"] * result["flop_per_image"]
        result["share_of_ceiling"] = rate / ceilings[result["precision"]]
        if stock is not None:
            result["speedup"] = result["images_per_s"] / stock["images_per_s"]


def show(results: dict[str, dict[str, dict[str, Any]]], ceilings: dict[str, float]) -> None:
    """Print the contenders, by teacher."""
    print("ceilings: " + ", ".join(f"{k} {v / 1e9:.0f} GFLOP/s" for k, v in ceilings.items()))
    names = ("images/s", "x stock", "error", "of peak", "CPU s", "MiB", "grown", "outside")
    for teacher, rows in results.items():
        print(f"\n{teacher:28} " + " ".join(f"{name:>8}" for name in names))
        for name, row in rows.items():
            speedup, grown = row.get("speedup"), row.get("grown_mib")
            cells = (
                f"{row['images_per_s']:.3f}",
                "" if speedup is None else f"{speedup:.2f}",
                f"{row['relative_error']:.1e}",
                f"{row['share_of_ceiling']:.0%}",
                f"{row['cpu_s_per_image']:.2f}",
                f"{row['peak_mib']:.0f}",
                "" if grown is None else f"{grown:.0f}",
                f"{row['outside_network']:.1%}" if "outside_network" in row else "",
            )
            print(f"{CONTENDERS[name].title:28} " + " ".join(f"{cell:>8}" for cell in cells))


def show_teachers(rows: dict[str, dict[str, Any]]) -> None:
    """Print samfed in torch with each teacher; times are of CPU seconds, against the first."""
    first = next(iter(rows.values()))["cpu_s_per_image"]
    print(f"\n{'samfed with':28} precision images/s    CPU s    times      MiB")
    for teacher, row in rows.items():
        seconds = row["cpu_s_per_image"]
        print(
            f"{teacher:28} {row['precision']:>9} {row['images_per_s']:8.2f} {seconds:8.3f} "
            f"{first / seconds:8.1f} {row['peak_mib']:8.0f}"
        )
