"""What ``stage_one.py`` measured, compared with its first contender and printed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

CONTENDERS = {
    "predictor_fp32": "(a) SamPredictor loop, fp32",
    "predictor_bf16": "(b) the same, bf16 autocast",
    "samfed_torch": "(c) samfed, torch",
    "samfed_onnx": "(d) samfed, ONNX Runtime",
    "samfed_int8": "(e) samfed, torch, int8",
}


def compare(folder: Path, results: dict[str, dict[str, Any]], ceilings: dict[str, float]) -> None:
    """Add speed-ups, errors and shares of the ceiling, all against (a)."""
    base = results["predictor_fp32"]
    exact = np.load(folder / "predictor_fp32.npy").astype(np.float64)
    for name, result in results.items():
        result["speedup"] = result["images_per_s"] / base["images_per_s"]
        logits = np.load(folder / f"{name}.npy").astype(np.float64)
        result["relative_error"] = float(np.linalg.norm(logits - exact) / np.linalg.norm(exact))
        precision = result.get("precision", "bf16" if name.endswith("bf16") else "fp32")
        rate = result["images_per_s"] * base["flop_per_image"]
        result["share_of_ceiling"] = rate / ceilings[precision]


def show(results: dict[str, dict[str, dict[str, Any]]], ceilings: dict[str, float]) -> None:
    """Print the contenders, by teacher."""
    print("ceilings: " + ", ".join(f"{k} {v / 1e9:.0f} GFLOP/s" for k, v in ceilings.items()))
    names = ("images/s", "x (a)", "error", "MiB", "of peak", "CPU s")
    for teacher, rows in results.items():
        print(f"\n{teacher:30} " + " ".join(f"{name:>8}" for name in names))
        for name, row in rows.items():
            outside = row.get("outside_network")
            tail = "" if outside is None else f"  outside the network {outside:.1%}"
            print(
                f"{CONTENDERS[name]:30} {row['images_per_s']:8.3f} {row['speedup']:8.2f} "
                f"{row['relative_error']:8.1e} {row['peak_mib']:8.0f} "
                f"{row['share_of_ceiling']:8.0%} {row['cpu_s_per_image']:8.2f}{tail}"
            )


def show_teachers(rows: dict[str, dict[str, Any]]) -> None:
    """Print samfed in torch with each teacher; times are of CPU seconds, against the first."""
    first = next(iter(rows.values()))["cpu_s_per_image"]
    print(f"\n{'(c) with':30} precision images/s    CPU s    times      MiB")
    for teacher, row in rows.items():
        seconds = row["cpu_s_per_image"]
        print(
            f"{teacher:30} {row['precision']:>9} {row['images_per_s']:8.2f} {seconds:8.3f} "
            f"{first / seconds:8.1f} {row['peak_mib']:8.0f}"
        )
