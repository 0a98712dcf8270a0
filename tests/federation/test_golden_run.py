"""A small run whose numbers are pinned: whatever changes them makes earlier runs another result."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_config

from pipeline.config import Config
from pipeline.federation.inputs import RESULT_VERSION
from pipeline.federation.server import federate

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from inputs import prepare_with_labels

ADVICE = (
    "the same settings and data give another result now: raise RESULT_VERSION in "
    "pipeline/federation/inputs.py, so that no earlier run goes on with it, and pin these numbers"
)
VERSION = 4  # with which the numbers below were made
#: By kind of networks: of the last round, the means over clients, and the norm of all weights.
GOLDEN: dict[str, dict[str, float]] = {
    "equal": {
        "loss": 2.1842,
        "loss_agree": 1.1945,
        "agreement": 0.4313,
        "coverage": 0.9708,
        "drift": 0.00268,
        "conflict_log_odds": 0.0130,
        "norm": 169.898,
    },
    "own": {
        "loss": 1.9795,
        "loss_agree": 1.0581,
        "agreement": 0.4422,
        "coverage": 0.9611,
        "drift": 0.00271,
        "conflict_log_odds": 0.0655,
        "norm": 266.088,
    },
}


@pytest.fixture(scope="module")
def config(tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Two clients whose labels no teacher made: the truth, spoilt a little."""
    config = tiny_config(
        tiny_images,
        tmp_path_factory.mktemp("golden"),
        partition={"scheme": "iid", "clients": 2, "server_images": 10, "calibration_min": 4},
        federate={"local_steps": 4, "pretrain_steps": 10, "fusion_epochs": 1},
    )
    prepare_with_labels(config)
    return config


@pytest.mark.parametrize("kind", ["equal", "own"])
def test_the_same_settings_and_data_give_the_same_result(config: Config, kind: str) -> None:
    """Other processors round otherwise, so numbers may differ a little, and no more."""
    networks = {"equal": (), "own": (config.model, config.model)}[kind]
    model = config.model.model_copy(update={"clients": networks})
    settings = config.federate.model_copy(update={"name": kind})
    run = federate(config.model_copy(update={"model": model, "federate": settings}))
    last = run.history()[-1]
    names = ("loss", "loss_agree", "agreement", "coverage", "drift", "conflict_log_odds")
    found: dict[str, Any] = {
        name: float(np.mean([client[name] for client in last["clients"].values()]))
        for name in names
    }
    own = [path.parent.name for path in sorted(run.path.glob("clients/*/model.safetensors"))]
    weights = [v for client in own or [None] for v in run.load_model(client).values()]
    found["norm"] = math.sqrt(sum(float(v.double().square().sum()) for v in weights))
    assert VERSION == RESULT_VERSION, ADVICE
    assert found == pytest.approx(GOLDEN[kind], rel=5e-3, abs=1e-4), f"{ADVICE}: {found}"
