"""``samfed demo`` from the command line: its numbers, its files, and a second call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import answer, call, listing, tiny_config

from pipeline.results import demo as demo_module
from pipeline.results.demo import DEMO_METHODS, DemoResult, run_demo

TINY = (
    "synth.images_per_site=8",
    "synth.size_px=48",
    "data.image_size=32",
    "partition.server_images=6",
    "partition.calibration_min=2",
    "partition.server_site=null",
    "sam.epochs=1",
    "sam.threads=1",
    "precompute.threads=1",
    "model.encoder=tu-test_byobnet",
    "model.encoder_depth=3",
    "model.decoder_channels=[16,8,8]",
    "federate.rounds=1",
    "federate.pretrain_steps=2",
    "federate.local_steps=1",
    "federate.labelled_batch=2",
    "federate.unlabelled_batch=2",
    "federate.threads=1",
)


def demo(out: Path) -> list[object]:
    return ["demo", "--out", out, *(word for setting in TINY for word in ("--set", setting))]


def test_a_long_name_moves_no_column() -> None:
    scores = {"dice": 0.5, "dice_ci95": (0.4, 0.6), "hd95": 9.0, "n": 12}
    result = DemoResult(dict.fromkeys(("oracle", "fed_mean_teacher"), scores), Path("report.html"))
    heading, *rows = result.text().splitlines()[:3]
    assert {len(row) for row in rows} == {len(heading)}
    assert [row.index("0.500") for row in rows] == [heading.index("Dice") - 1] * 2


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The demo's folder, and what the first call printed."""
    out = tmp_path_factory.mktemp("demo") / "out"
    return out, answer(*demo(out))


@pytest.fixture
def finished_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on neither a label nor a round may be computed."""

    def again(*_: object, **__: object) -> None:
        raise AssertionError("computed a second time")

    monkeypatch.setattr("pipeline.sam.teacher.Teacher.label", again)
    monkeypatch.setattr("pipeline.federation.client.local_update", again)


def test_three_methods_and_a_report(first: tuple[Path, dict[str, Any]]) -> None:
    out, said = first
    assert DEMO_METHODS == ("supervised", "fedavg_ssl", "sam_fed")
    assert set(said) == {*DEMO_METHODS, "report"}
    assert len({said[method]["n"] for method in DEMO_METHODS}) == 1
    for method in DEMO_METHODS:
        assert 0 <= said[method]["dice"] <= 1
        assert said[method]["hd95"] >= 0
        assert said[method]["n"] > 0
        metrics = json.loads((out / "cache" / "runs" / method / "metrics.json").read_text())
        assert metrics["method"] == method
        assert metrics["test"]["pooled"] == said[method]
    page = Path(said["report"])
    assert page == out / "cache" / "report.html"
    assert all(method in page.read_text() for method in DEMO_METHODS)


def test_everything_lies_below_out(first: tuple[Path, dict[str, Any]]) -> None:
    out, _ = first
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert sorted(path.name for path in out.iterdir()) == ["cache", "data"]


def all_but_what_was_sent(out: Path) -> dict[str, bytes]:
    """The cache without the logs that say when clients were asked who they are."""
    found = listing(out / "cache")
    return {name: content for name, content in found.items() if not name.startswith("sent/")}


@pytest.mark.usefixtures("finished_stages")
def test_a_second_call_continues(first: tuple[Path, dict[str, Any]]) -> None:
    """Nothing is computed again; without --json there is a line for each method."""
    out, said = first
    before = all_but_what_was_sent(out)
    result = call(*demo(out))
    assert result.exit_code == 0, result.output
    assert all_but_what_was_sent(out) == before
    title, *rows, report = result.stdout.splitlines()
    assert title.split()[:2] == ["method", "Dice"]
    assert [row.split()[0] for row in rows] == list(DEMO_METHODS)
    for row, method in zip(rows, DEMO_METHODS, strict=True):
        cells = row.split()
        assert cells[1] == f"{said[method]['dice']:.3f}"
        assert cells[-2:] == [f"{said[method]['hd95']:.2f}", str(said[method]["n"])]
    assert report == f"report: {said['report']}"


def test_an_audited_demo_prepares_the_truth_it_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_module, "finetune", stop)
    config = tiny_config(tmp_path / "data", tmp_path / "cache", federate={"audit": True})
    with pytest.raises(KeyboardInterrupt):
        run_demo(config)
    assert (config.cache.root / "oracle" / "site_a.zarr").is_dir()
