"""Where a round's time goes: the clients' networks, agreement, and all that lies around them.

    python benchmarks/stage_two.py [--params FILE] [--set KEY=VALUE] [--rounds 5] [--json]

Four clients on generated images (``data.root`` where there is such a folder, else made anew), the
settings of ``params.yaml`` on one thread, and labels that no teacher made. ``samfed federate`` runs
as it is; functions are replaced by timed ones from here. Time is a function's own, without that
of timed functions below it; shares are medians over rounds, the first left out. With one thread on
a CPU the process's CPU time is shown too: beside other work only that is steady, but it does not
see the wait for a disk.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pipeline.segmentation.networks  # noqa: F401  (before segmentation_models_pytorch)

# isort: split
import segmentation_models_pytorch as smp
import torch
from inputs import prepare_with_labels

from pipeline.config import Config
from pipeline.data.synthetic import write_dataset
from pipeline.federation import averaging, client, exchange, targets, workplace
from pipeline.federation import local_update as training
from pipeline.federation.codistillation import BestClient
from pipeline.federation.runs import RoundFiles, RunFolder
from pipeline.federation.server import federate
from pipeline.params import load_config
from pipeline.runtime import resolve_device

NETWORKS = [  # of the heterogeneous clients, in turn
    {"encoder": "tu-mobilenetv3_small_050"},
    {"encoder": "tu-resnet10t"},
]
SETTINGS = {
    "sam_fed": ("federate.method=sam_fed",),
    "sam_fed, own networks": ("federate.method=sam_fed", f"model.clients={json.dumps(NETWORKS)}"),
    "rc_rf, own networks": ("federate.method=rc_rf", f"model.clients={json.dumps(NETWORKS)}"),
}
#: What is timed: owner, name, section. Sections nest; a path of them is what time is kept by.
TIMED: tuple[tuple[Any, str, str], ...] = (
    (client, "mean_dice", "validation"),
    (averaging, "measure_calibration", "calibration"),
    (client, "measure_calibration", "calibration"),
    (client, "local_update", "update"),
    (training, "labelled_batch", "augmentation"),
    (training, "draw_views", "augmentation"),
    (targets.Learner, "predict", "weak view"),
    (targets, "sources_of", "targets"),
    (targets, "agree", "agreement"),
    (training, "losses", "losses"),
    (smp.base.SegmentationModel, "forward", "forward"),
    (torch.Tensor, "backward", "backward"),
    (torch.nn.utils, "clip_grad_norm_", "optimiser"),
    (torch.optim.Optimizer, "zero_grad", "optimiser"),
    (torch.optim.AdamW, "step", "optimiser"),
    (averaging.Averaging, "accept", "aggregation"),
    (averaging.Averaging, "finish", "aggregation"),
    (client, "public_logits", "RC and RF"),
    (exchange, "public_logits", "RC and RF"),
    (client, "distil", "RC and RF"),
    (exchange, "distil", "RC and RF"),
    (workplace, "noised_public", "noise and grades"),
    (BestClient, "add", "noise and grades"),
    (exchange, "grades", "noise and grades"),
    (RunFolder, "append_history", "checkpoint"),
    (RunFolder, "save_checkpoint", "checkpoint"),
    (RoundFiles, "save", "checkpoint"),
    (client, "save", "checkpoint"),
    (client, "load", "checkpoint"),
)
Path_ = tuple[str, ...]


class Clock:
    """Wall and CPU nanoseconds by path of sections, each without the sections below it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._path: list[str] = []
        self.wall: Counter[Path_] = Counter()
        self.cpu: Counter[Path_] = Counter()
        self._last = self.now()

    def now(self) -> tuple[int, int]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter_ns(), time.process_time_ns()

    def charge(self) -> None:
        """Count what passed since the last call for the present path."""
        wall, cpu = self.now()
        key = tuple(self._path)
        self.wall[key] += wall - self._last[0]
        self.cpu[key] += cpu - self._last[1]
        self._last = wall, cpu

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        self.charge()
        self._path.append(name)
        try:
            yield
        finally:
            self.charge()
            self._path.pop()

    def timed(self, call: Callable[..., Any], section: str) -> Callable[..., Any]:
        @functools.wraps(call)
        def outer(*args: Any, **kwargs: Any) -> Any:
            with self.section(section):
                return call(*args, **kwargs)

        return outer

    @contextmanager
    def watching(self) -> Iterator[None]:
        """All of ``TIMED`` timed, and as it was afterwards."""
        torch.optim.AdamW([torch.zeros(1)])  # the first one gives its class a step of its own
        with ExitStack() as stack:
            for owner, name, section in TIMED:
                inner = vars(owner)[name]
                stack.callback(setattr, owner, name, inner)
                if isinstance(inner, classmethod):
                    setattr(owner, name, self.timed(getattr(owner, name), section))
                else:
                    setattr(owner, name, self.timed(inner, section))
            yield


def part_of(path: Path_) -> str:
    """Return the row of the breakdown that a path belongs to."""
    for outer in ("validation", "checkpoint", "noise and grades", "RC and RF"):
        if outer in path:
            return outer
    last = path[-1] if path else "rest of the round"
    if "calibration" in path:
        return "calibration: forward" if last == "forward" else "calibration: fit"
    if last == "forward":
        return "labelling: forward" if {"weak view", "targets"} & {*path} else "forward"
    # a prediction ends with a softmax; losses are the network's too
    return {
        "weak view": "labelling: forward",
        "targets": "labelling: forward",
        "update": "rest of the local update",
    }.get(last, last)


NETWORK = (
    "forward",
    "losses",
    "labelling: forward",
    "backward",
    "optimiser",
    "RC and RF",
)
UPDATE = (*NETWORK, "augmentation", "agreement", "rest of the local update")
FIT = ("calibration: fit",)
CALIBRATION = (*FIT, "calibration: forward")


def shares(spent: Counter[Path_]) -> dict[str, float]:
    """Return a round's parts, as shares of it, and what the bars are on."""
    total = spent.total()
    parts: dict[str, float] = defaultdict(float)
    for path, value in spent.items():
        parts[part_of(path)] += value / total

    def of(names: Sequence[str]) -> float:
        return sum(parts[name] for name in names)

    update = of(UPDATE) - parts["RC and RF"]
    return {
        **parts,
        "= outside local updates, RC and RF": 1 - of(UPDATE),
        "= outside forward, backward, optimiser, RC and RF": 1 - of(NETWORK),
        "= the same, augmentation aside": 1 - of((*NETWORK, "augmentation")),
        "= agreement, of a training step": parts["agreement"] / update,
        "= agreement and calibration's fit, of a training step": of(("agreement", *FIT)) / update,
        "= agreement and calibration, of a training step": of(("agreement", *CALIBRATION)) / update,
    }


def measure(config: Config) -> dict[str, Any]:
    """Run ``config`` under a clock: medians over rounds but the first."""
    clock = Clock(resolve_device(config.federate.device))
    rounds: list[dict[str, Counter[Path_]]] = []
    before: list[dict[str, Counter[Path_]]] = []

    def finished(what: str, done: int, total: int, note: str = "", /) -> None:
        if "rounds" not in what:
            return
        clock.charge()
        now = {"wall": clock.wall.copy(), "cpu": clock.cpu.copy()}
        if before:
            rounds.append({key: value - before[0][key] for key, value in now.items()})
        before[:] = [now]

    with clock.watching():
        federate(config, mode="restart", progress=finished)
    result: dict[str, Any] = {}
    steady = clock.device.type == "cpu" and config.federate.threads == 1
    for key in ("wall", "cpu") if steady else ("wall",):
        every = [shares(each[key]) for each in rounds]
        names = dict.fromkeys(name for each in every for name in each)
        result[key] = {
            "seconds": statistics.median(each[key].total() / 1e9 for each in rounds),
            **{name: statistics.median(e.get(name, 0.0) for e in every) for name in names},
        }
    return result


def show(results: dict[str, dict[str, Any]]) -> None:
    for setting, result in results.items():
        clocks = list(result)
        print(f"{setting:62}" + "".join(f"{clock:>9}" for clock in clocks))
        rows = sorted(result["wall"], key=lambda n: (n[0] == "=", n != "seconds"))
        for name in rows:
            values = [result[clock].get(name, 0.0) for clock in clocks]
            form = "9.2f" if name == "seconds" else "9.2%"
            print(f"  {name:60}" + "".join(f"{value:{form}}" for value in values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=5, help="the first is left out")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    base = (
        "federate.threads=1",
        "federate.pretrain_steps=20",  # what is learnt before does not change what a round costs
        "agreement.warn_agreement=0",  # nor do such labels and clients deserve a warning
        "agreement.warn_coverage=0",
        f"federate.rounds={options.rounds}",
        *options.set,
    )
    config = load_config(options.params, base)
    with tempfile.TemporaryDirectory() as name:
        root, synth = config.data.root, config.synth
        if not (root / "images").is_dir():
            root = Path(name) / "data"
            write_dataset(
                root, images_per_site=synth.images_per_site, size_px=synth.size_px, seed=synth.seed
            )
        places = (f"data.root={root}", f"cache.root={name}/cache")
        prepare_with_labels(load_config(options.params, (*base, *places)))
        results = {
            setting: measure(
                load_config(options.params, (*base, *places, *changes, f"federate.name={setting}"))
            )
            for setting, changes in SETTINGS.items()
        }
    if options.json:
        print(json.dumps(results, indent=1))
    else:
        show(results)


if __name__ == "__main__":
    main()
