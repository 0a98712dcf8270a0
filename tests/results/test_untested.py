"""Clients without masks: they train, are not tested, and every stage after that still answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from page_reader import Page

from pipeline.config import Config
from pipeline.data.prepare import prepare
from pipeline.errors import StageError
from pipeline.federation.engines import in_process
from pipeline.federation.inputs import load_inputs
from pipeline.federation.messages import EvaluateRequest
from pipeline.federation.runs import RunFolder
from pipeline.federation.server import federate
from pipeline.federation.workplace import Workplace, build_networks
from pipeline.results.compare import compare
from pipeline.results.evaluate import evaluate
from pipeline.results.report import write_report
from pipeline.results.scores import MEANS


def without_masks(images: Path, folder: Path, *sites: str) -> Config:
    """Settings for the tiny images without the masks of these sites; site_a's are the server's."""
    shutil.copytree(images, folder / "data")
    for site in sites:
        for path in (folder / "data" / "masks").glob(f"{site}_*"):
            path.unlink()
    return tiny_config(
        folder / "data",
        folder / "cache",
        partition={"server_site": "site_a", "server_images": 8},
        federate={"method": "supervised", "rounds": 1, "pretrain_steps": 1, "local_steps": 1},
    )


def run_of(config: Config) -> RunFolder:
    prepare(config)
    return federate(config)


def ask_for_scores(config: Config, run: RunFolder) -> dict[str, int]:
    """The number of test images that each client scores when it is asked to."""
    inputs, after = load_inputs(config), run.load_checkpoint()
    assert after is not None
    workplace = Workplace(config, inputs.public, build_networks(config, torch.device("cpu")))
    with in_process(inputs.contexts, workplace) as engine:
        requests = [
            EvaluateRequest(**after.address(c.name, 1), part="test", weights=after.weights)
            for c in inputs.contexts
        ]
        return {reply.client: reply.images for reply in engine.run(requests)}


def test_a_run_with_one_client_tested(
    tiny_images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = without_masks(tiny_images, tmp_path, "site_b", "site_c")
    run = run_of(config)
    assert (
        "2 of 3 clients have no group with masks, so they train and are not tested: site_b, site_c"
        in caplog.messages
    )
    assert run.history()[0]["clients"].keys() == {"site_b", "site_c", "site_d"}
    found = evaluate(config, run)
    assert list(found.test["clients"]) == ["site_d"]
    assert ask_for_scores(config, run) == {"site_b": 0, "site_c": 0, "site_d": 2}
    assert found.test["pooled"]["n"] > 0
    assert "site_b" in write_report([run]).path.read_text()


def test_a_run_without_any_test_part(
    tiny_images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = without_masks(tiny_images, tmp_path, "site_b", "site_c", "site_d")
    run = run_of(config)
    assert run.history()[0]["val"] == {"dice": None, "clients": {}}
    caplog.clear()
    found = evaluate(config, run)
    assert caplog.messages == [
        "no client has a test part, as their images have no masks; nothing is scored"
    ]
    assert found.text() == "supervised: no test images, so no scores"
    assert json.loads((run.path / "metrics.json").read_text())["test"] == {
        "pooled": {"n": 0} | dict.fromkeys(MEANS),
        "clients": {},
        "client_mean": dict.fromkeys(MEANS),
    }
    page = write_report([run]).path.read_text()
    assert Page(page).open == []
    assert "none of its clients has test images" in page
    with pytest.raises(StageError, match="no client has test images, so there is nothing to comp"):
        compare(run.path.parent)
