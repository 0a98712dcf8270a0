"""``samfed demo``: the whole pipeline on generated images, and three methods side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.data.prepare import prepare
from pipeline.data.synthetic import write_dataset
from pipeline.errors import ConfigError
from pipeline.federation.server import federate
from pipeline.labelling.precompute import precompute
from pipeline.methods import METHODS
from pipeline.params import with_settings
from pipeline.progress import Progress
from pipeline.results.evaluate import evaluate
from pipeline.results.pages import render
from pipeline.results.report import write_report
from pipeline.sam.finetune import finetune

DEMO_METHODS = ("supervised", "fedavg_ssl", "sam_fed")


@dataclass(frozen=True)
class DemoResult:
    """Pooled test scores of each method, and the report on all of them."""

    scores: dict[str, dict[str, Any]]
    report: Path

    def as_json(self) -> dict[str, Any]:
        """Return the scores by method, and under ``report`` the report's path."""
        return {**self.scores, "report": str(self.report)}

    def text(self) -> str:
        """Return a line for each method, and where the report is."""
        page = f"report: {self.report}"
        return render("scores.txt.j2", title="method", rows=self.scores, page=page)


def demo_config(base: Config, out: Path, *, seed: int | None = None) -> Config:
    """Return ``base`` with everything that comes in and goes out below ``out``."""
    places = {"data": {"root": out / "data"}, "cache": {"root": out / "cache"}}
    config = with_settings(base, "demo", **places)
    return config if seed is None else config.model_copy(update={"seed": seed})


def run_demo(
    config: Config, *, methods: Sequence[str] | None = None, progress: Progress | None = None
) -> DemoResult:
    """Generate, prepare, adapt SAM, label, federate each method, evaluate, report.

    Raises:
        ConfigError: there is no such method, or it does not fit the settings.
    """
    configs = [_with_method(config, method) for method in methods or DEMO_METHODS]
    write_dataset(config.data.root, **config.synth.model_dump())
    needs_truth = config.federate.audit or any(
        METHODS[each.federate.method].needs_truth for each in configs
    )
    prepare(config, with_oracle=needs_truth, progress=progress)
    card = finetune(config, progress=progress)
    precompute(config, progress=progress)
    scores, runs = {}, []
    for one in configs:
        runs.append(federate(one, progress=progress))
        found = evaluate(one, runs[-1], progress=progress)
        scores[found.method] = found.test["pooled"]
    title = f"samfed demo: teacher Dice {card.calibration_dice:.3f} on the calibration part"
    report = write_report(runs, config.cache.root / "report.html", title=title)
    return DemoResult(scores, report.path)


def _with_method(config: Config, method: str) -> Config:
    if method not in METHODS:
        known = ", ".join(METHODS)
        raise ConfigError(f"--method {method}: no such method; expected one of {known}")
    return with_settings(config, f"--method {method}", federate={"method": method, "name": method})
