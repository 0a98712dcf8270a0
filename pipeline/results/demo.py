"""``samfed demo``: the whole pipeline on generated images, and three methods side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.config import Config, parse_config
from pipeline.data.prepare import prepare
from pipeline.data.synthetic import write_dataset
from pipeline.disk import write_bytes
from pipeline.federation.schedule import Progress
from pipeline.federation.server import federate
from pipeline.labelling.precompute import precompute
from pipeline.methods import Method
from pipeline.results.evaluate import evaluate
from pipeline.results.gallery import build_gallery
from pipeline.results.report import load_run, render_report
from pipeline.sam.finetune import finetune

METHODS: tuple[Method, ...] = ("supervised", "fedavg_ssl", "sam_fed")


def demo_config(base: Config, out: Path) -> Config:
    """``base`` with everything that comes in and goes out below ``out``."""
    return base.model_copy(
        update={
            "data": base.data.model_copy(update={"root": out / "data"}),
            "cache": base.cache.model_copy(update={"root": out / "cache"}),
        }
    )


def run_demo(
    config: Config,
    *,
    methods: tuple[Method, ...] = METHODS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Generate, prepare, adapt SAM, label, federate each method, evaluate, report.

    Returns:
        for each method its pooled test metrics, and under ``report`` the report's path.
    """
    configs = {method: _with_method(config, method) for method in methods}  # refuses bad ones first
    write_dataset(
        config.data.root,
        images_per_site=config.synth.images_per_site,
        size_px=config.synth.size_px,
        seed=config.synth.seed,
    )
    needs_truth = "oracle" in methods or config.federate.audit
    prepare(config, with_oracle=needs_truth, progress=progress)
    card = finetune(config, progress=progress)
    precompute(config, progress=progress)
    results: dict[str, Any] = {}
    runs = []
    for method, one in configs.items():
        run = federate(one, progress=progress)
        results[method] = evaluate(one, run, progress=progress)["test"]["pooled"]
        runs.append(run)
    summaries = [load_run(run.path) for run in runs]
    title = f"samfed demo: teacher Dice {card.calibration_dice:.3f} on the calibration part"
    page = render_report(summaries, build_gallery(config, runs[-1]), title=title)
    path = config.cache.root / "report.html"
    write_bytes(path, page.encode())
    results["report"] = str(path)
    return results


def _with_method(config: Config, method: Method) -> Config:
    raw = config.model_dump()
    raw["federate"] |= {"method": method, "name": method}
    return parse_config(raw, source=f"--method {method}")
