"""A small run whose numbers are pinned: whatever changes them makes earlier runs another result."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config

from pipeline.config import Config
from pipeline.federation.client import PrivateState
from pipeline.federation.inputs import RESULT_VERSION
from pipeline.federation.runs import Checkpoint, RunFolder
from pipeline.federation.server import federate
from pipeline.stores.plain_data import State, load

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from inputs import prepare_with_labels

ADVICE = (
    "the same settings and data give another result now: raise RESULT_VERSION in "
    "pipeline/federation/inputs.py, so that no earlier run goes on with it, and pin these numbers"
)
VERSION = 15  # with which the numbers below were made
#: By kind of networks: of the last round, the means over clients, and the norm of all weights.
GOLDEN: dict[str, dict[str, float]] = {
    "equal": {
        "loss": 2.2061,
        "loss_agree": 1.2248,
        "agreement": 0.4067,
        "coverage": 1.0,
        "drift": 0.00269,
        "sam_bias": -0.4,
        "norm": 170.145,
    },
    "own": {
        "loss": 2.0532,
        "loss_agree": 1.1375,
        "agreement": 0.4740,
        "coverage": 1.0,
        "drift": 0.00270,
        "sam_bias": -0.4,
        "norm": 266.289,
    },
}


@pytest.fixture(scope="module")
def config(tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Two clients whose labels no teacher made: the truth, spoilt a little."""
    config = tiny_config(
        tiny_images,
        tmp_path_factory.mktemp("golden"),
        partition={"scheme": "iid", "clients": 2, "server_images": 10, "calibration_min": 4},
        model={"encoder": "tu-mobilenetv3_small_050"},  # the one that users get
        federate={
            "local_steps": 4,
            "pretrain_steps": 10,
            "fusion_epochs": 1,
            "average_rounds": 2,
        },
    )
    prepare_with_labels(config)
    return config


@pytest.fixture(scope="module")
def runs(config: Config) -> dict[str, RunFolder]:
    """A run of each kind of networks, and of what they start from."""
    found = {}
    for method in ("sam_fed", "start"):
        for kind, networks in (("equal", ()), ("own", (config.model, config.model))):
            name = kind if method == "sam_fed" else f"{kind}-{method}"
            model = config.model.model_copy(update={"clients": networks})
            settings = config.federate.model_copy(update={"name": name, "method": method})
            changed = config.model_copy(update={"model": model, "federate": settings})
            found[name] = federate(changed)
    return found


@pytest.mark.parametrize("kind", ["equal", "own"])
def test_the_same_settings_and_data_give_the_same_result(
    runs: dict[str, RunFolder], kind: str
) -> None:
    """Other processors round otherwise, so numbers may differ a little, and no more."""
    run = runs[kind]
    last = run.history()[-1]
    names = ("loss", "loss_agree", "agreement", "coverage", "drift", "sam_bias")
    found: dict[str, Any] = {
        name: float(np.mean([client[name] for client in last["clients"].values()]))
        for name in names
    }
    own = [path.parent.name for path in sorted(run.path.glob("clients/*/model.safetensors"))]
    weights = [v for client in own or [None] for v in run.load_model(client).values()]
    found["norm"] = math.sqrt(sum(float(v.double().square().sum()) for v in weights))
    assert VERSION == RESULT_VERSION, ADVICE
    assert found == pytest.approx(GOLDEN[kind], rel=5e-3, abs=1e-4), f"{ADVICE}: {found}"


def test_a_run_ends_with_the_mean_of_its_last_rounds(runs: dict[str, RunFolder]) -> None:
    """Batch norm's counters are the last round's; each client averages its own network."""
    paths = {None: runs["equal"].path / "checkpoints"} | {
        path.name: path for path in (runs["own"].path / "clients").iterdir()
    }
    assert len(paths) == 3
    for client, folder in paths.items():
        kind = Checkpoint if client is None else PrivateState
        first, last = (load(folder / f"round_000{n}.safetensors", kind).weights for n in (1, 2))
        assert first is not None
        assert last is not None
        for name, found in runs["equal" if client is None else "own"].load_model(client).items():
            mean = (first[name].double() + last[name]) / 2
            expected = mean.float() if found.is_floating_point() else last[name]
            assert torch.equal(found, expected)


def test_a_start_is_the_first_model_of_every_run(
    config: Config, runs: dict[str, RunFolder]
) -> None:
    """It takes one round, in which nothing is trained."""
    start = runs["equal-start"]
    (entry,) = start.history()
    assert entry["val"]["dice"] is not None
    (path,) = (config.cache.root / "starts").iterdir()  # networks are of one kind
    first = load(path, State)
    own = runs["own-start"]
    models = [start.load_model(), *(own.load_model(name) for name in entry["clients"])]
    for weights in models:
        assert all(torch.equal(value, first[name]) for name, value in weights.items())
