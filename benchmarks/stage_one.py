"""Stage one against segment-anything as a user would call it: same images, weights and machine.

    python benchmarks/stage_one.py --variant vit_b [--rounds 3] [--images 4] [--onnx] [--json]
    python benchmarks/stage_one.py --teachers --variant vit_b mobile_sam timm:resnet18@256

Contenders (``stage_one_report.CONTENDERS``) take turns, each time in a process of its own, and the
medians of all rounds are shown: a loop over ``SamPredictor`` in float32 and under bfloat16
autocast; samfed from image files to a finished label store, on squares, on 4:3 images in a frame of
their own (``sam.frame: content``), in int8 where the CPU has VNNI, in two workers of one thread
each, and with ``--onnx`` in ONNX Runtime. Weights are random (speed does not depend on them; masks
would say nothing), so errors are of logits, against float32 in the same frame.

Several teachers, some with a ``sam.input_size`` behind an @, are set side by side at the end;
``--teachers`` measures samfed's default alone, on 4:3 images.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pipeline.sam  # noqa: F401  (before segment_anything imports torchvision)

# isort: split
import torch
from ceilings import measure_ceilings
from stage_one_report import CONTENDERS, Contender, compare, median_of, show, show_teachers
from stage_one_ways import export_model, make_inputs, run_onnx, run_predictor, run_torch

from pipeline.runtime import resolve_device
from pipeline.sam.int8 import has_vnni


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", nargs="+", default=["vit_b"], metavar="VARIANT[@SIZE]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=4, help="a round, at least 3")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--precision", default="auto", help="of samfed's rows that name none")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, help="these contenders alone")
    parser.add_argument("--onnx", action="store_true", help="also ONNX; the export takes minutes")
    parser.add_argument("--teachers", action="store_true", help="samfed's default, each variant")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--first", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_child(options: argparse.Namespace) -> dict[str, Any]:
    if options.child == "export":
        return export_model(options.folder, options)
    options.contender = contender = CONTENDERS[options.child]
    options.files = sorted((options.folder / contender.images).iterdir())
    if contender.workers > 1:
        torch.set_num_threads(1)
    runs = {"stock": run_predictor, "torch": run_torch, "onnx": run_onnx}
    return runs[contender.code](options.folder, options)


def chosen(options: argparse.Namespace, teacher: str) -> dict[str, Contender]:
    """Return the contenders that the options, this teacher and this machine allow."""
    if options.teachers:
        return {"samfed": CONTENDERS["samfed"]}
    cpu = resolve_device(options.device).type == "cpu"
    rows = {}
    for name, contender in CONTENDERS.items():
        impossible = (
            (contender.code == "onnx" and not options.onnx)
            or (contender.precision == "int8" and not (cpu and has_vnni()))
            or (contender.precision == "int8" and "timm:" in teacher)
            or (contender.workers > 1 and not cpu)
        )
        if not impossible and (options.only is None or name in options.only):
            rows[name] = contender
    return rows


def start(child: str, teacher: str, folder: Path, *, first: bool) -> subprocess.Popen[str]:
    more = ["--variant", teacher, "--child", child, "--folder", str(folder)]
    command = [sys.executable, *sys.argv, *more, *(["--first"] if first else [])]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def finish(processes: list[subprocess.Popen[str]]) -> dict[str, Any]:
    """Return what a contender's processes measured: rates and memory of workers add up."""
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("a contender failed; its error is above")
    results = [json.loads(output) for output in outputs]
    total = dict(results[0])
    for key in ("images_per_s", "peak_mib", "grown_mib") if len(results) > 1 else ():
        total[key] = sum(result[key] for result in results)
    return total


def measure(options: argparse.Namespace, teacher: str) -> dict[str, dict[str, Any]]:
    """Let the contenders take turns with this teacher; return the medians of each."""
    rows = chosen(options, teacher)
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in rows}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder, teacher, options.images)
        if "onnx" in rows:
            finish([start("export", teacher, folder, first=False)])
        for turn in range(options.rounds):
            for child, contender in rows.items():
                count = contender.workers
                processes = [start(child, teacher, folder, first=not turn) for _ in range(count)]
                rounds[child].append(finish(processes))
                for ready in folder.glob(f"{child}-ready-*"):
                    ready.unlink()
    results = {child: median_of(found) for child, found in rounds.items()}
    compare(results, options.ceilings)
    return results


def main() -> None:
    options = arguments()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.child:
        (options.variant,) = options.variant
        print(json.dumps(run_child(options)))
        return
    device = resolve_device(options.device)
    ceilings = options.ceilings = measure_ceilings(device)
    results = {teacher: measure(options, teacher) for teacher in options.variant}
    if options.json:
        report = {"device": str(device), "ceilings_flop_per_s": ceilings, "results": results}
        print(json.dumps(report, indent=1))
        return
    show(results, ceilings)
    if options.teachers:
        show_teachers({teacher: of["samfed"] for teacher, of in results.items()})


if __name__ == "__main__":
    main()
