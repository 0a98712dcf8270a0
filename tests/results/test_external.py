"""``samfed evaluate --data``: a finished model on another hospital's folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import answer, call, fails, write_params
from PIL import Image

from pipeline.config import Config
from pipeline.data.partition import load_partition


@pytest.fixture
def params(finished: Config, tmp_path: Path) -> Path:
    """A settings file for a copy of the finished pipeline."""
    return write_params(tmp_path / "params.yaml", finished)


@pytest.fixture
def hospital(finished: Config, tiny_images: Path, tmp_path: Path) -> Path:
    """A folder of the run's own test images, with the sites of its clients."""
    partition = load_partition(finished.cache.root / "partition.json")
    folder = tmp_path / "hospital"
    lines = ["image_id,site,group"]
    for client, part in partition.clients.items():
        for image_id in part.test:
            entry = partition.images[image_id]
            for file in (entry.image, str(entry.mask)):
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(tiny_images / file, folder / file)
            lines.append(f"{image_id},{client},{entry.group}")
    (folder / "sites.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_the_internal_test_images_score_as_they_did(
    finished: Config, params: Path, hospital: Path
) -> None:
    run = finished.cache.root / "runs" / "sam_fed"
    internal = json.loads((run / "metrics.json").read_text())["test"]
    found = answer("evaluate", "--params", params, "--data", hospital)
    for key in ("n", "dice", "iou", "hd95", "assd"):
        assert found["test"]["pooled"][key] == pytest.approx(internal["pooled"][key])
    assert found["test"]["clients"].keys() == internal["clients"].keys()
    assert 0 <= found["ece"] <= 1
    assert found == json.loads((run / "external" / "hospital.json").read_text())
    lines = (run / "external" / "hospital.csv").read_text().splitlines()
    assert len(lines) == found["test"]["pooled"]["n"] + 1
    table = call("compare", "--params", params).stdout
    assert f"| `sam_fed` | hospital | global | {found['test']['pooled']['n']} | " in table
    page = Path(answer("report", "--params", params)["report"]).read_text()
    assert "sam_fed: hospital<" in page


def test_the_teacher_and_another_name(finished: Config, params: Path, hospital: Path) -> None:
    result = call("evaluate", "--params", params, "--data", hospital, "--teacher", "--as", "north")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("north, teacher: Dice 0.")
    path = finished.cache.root / "runs" / "sam_fed" / "external" / "north-teacher.json"
    assert json.loads(path.read_text())["unlike"] is None


def test_images_of_the_runs_own_data_are_named(params: Path, hospital: Path) -> None:
    result = call("evaluate", "--params", params, "--data", hospital)
    count = len(list((hospital / "images").iterdir()))
    assert f"{count} of {count} images, e.g. " in result.stderr
    for path in (hospital / "images").iterdir():
        with Image.open(path) as image:
            image.rotate(180).save(path)
    result = call("evaluate", "--params", params, "--data", hospital)
    assert "not external" not in result.stderr


def test_images_without_masks_are_left_out(params: Path, hospital: Path) -> None:
    first, *others = sorted((hospital / "masks").iterdir())
    first.unlink()
    found = answer("evaluate", "--params", params, "--data", hospital)
    assert (found["without_mask"], found["test"]["pooled"]["n"]) == (1, len(others))
    for path in others:
        path.unlink()
    line = fails(3, "evaluate", "--params", params, "--data", hospital)
    assert line.endswith("images has a mask; there is no truth")


def test_options_that_do_not_go_together(params: Path, hospital: Path) -> None:
    assert "need --data" in fails(2, "evaluate", "--params", params, "--teacher")
    out = fails(2, "evaluate", "--params", params, "--data", hospital, "--out", hospital)
    assert "goes into the run's folder" in out
    assert "--as" in fails(2, "evaluate", "--params", params, "--data", hospital, "--as", "a/b")
