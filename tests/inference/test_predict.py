"""``samfed predict``: what it writes, what it keeps, and what it refuses."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import answer, call, digest, fails, write_params
from PIL import Image

from pipeline.config import Config
from pipeline.data.decoding import decode
from pipeline.data.images import read_image
from pipeline.data.masks import read_mask
from pipeline.inference.torch_model import NetworkModel

RUN = "sam_fed"


@pytest.fixture
def images(tiny_images: Path, tmp_path: Path) -> Path:
    """A folder of three images of the tiny data set, of two sizes."""
    folder = tmp_path / "new"
    folder.mkdir()
    for path in sorted((tiny_images / "images").iterdir())[:3]:
        shutil.copy(path, folder)
    with Image.open(path) as image:
        image.resize((70, 41)).save(path_in := folder / path.name)
    assert path_in.is_file()
    return folder


@pytest.fixture
def run(shared_pipeline: Config) -> Path:
    """The folder of the run that all tests share; tests only read it."""
    return shared_pipeline.cache.root / "runs" / RUN


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "predictions.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_masks_have_the_images_own_size_and_are_masks_of_the_input_layout(
    run: Path, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    found = answer("predict", run, images, "--out", out, "--overlays", "--probabilities")
    assert (found["computed"], found["kept"], found["unreadable"]) == (3, 0, [])
    lines = rows(out)
    names = sorted(path.stem for path in images.iterdir())
    assert [line["file"] for line in lines] == names
    for line, path in zip(lines, sorted(images.iterdir()), strict=True):
        size_hw = read_image(path).pixels.shape[:2]
        mask = read_mask(out / "masks" / f"{path.stem}.png", size_hw=size_hw, num_classes=1).pixels
        assert int(line["area_px"]) == mask.sum()
        assert line["area_mm2"] == line["volume_mm3"] == ""
        assert 0.5 <= float(line["confidence"]) <= 1
        assert decode(out / "overlays" / f"{path.stem}.png").values.shape == (*size_hw, 3)
        probability = decode(out / "probabilities" / f"{path.stem}_class1.png").values / 65535
        np.testing.assert_array_equal(probability > 0.5 + 1e-4, mask & (probability > 0.5 + 1e-4))
        np.testing.assert_array_equal(probability < 0.5 - 1e-4, ~mask & (probability < 0.5 - 1e-4))


def test_a_second_call_computes_nothing_that_is_finished(
    run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    answer("predict", run, images, "--out", out)
    whole = digest(out)
    journal = out / "predictions.jsonl"
    kept = journal.read_bytes().splitlines(keepends=True)
    # as a kill leaves it: one line is cut off, and one mask is gone
    journal.write_bytes(b"".join(kept[:-1]) + kept[-1][:20])
    (out / "masks" / f"{json.loads(kept[1])['name']}.png").unlink()
    seen: list[int] = []
    predict = NetworkModel.predict

    def count(self: NetworkModel, frames: Any) -> Any:
        seen.append(len(frames))
        return predict(self, frames)

    monkeypatch.setattr(NetworkModel, "predict", count)
    found = answer("predict", run, images, "--out", out)
    assert (found["computed"], found["kept"], seen) == (2, 1, [2])
    assert digest(out, leave_out=(journal.name,)) == {
        name: sha for name, sha in whole.items() if name != journal.name
    }
    again = answer("predict", run, images, "--out", out)
    assert (again["computed"], again["kept"], seen) == (0, 3, [2])
    line = fails(2, "predict", run, images, "--out", out, "--overlays")
    assert line.endswith("with overlays False, this call has True; give another --out")


def test_what_cannot_be_read_is_named_and_the_rest_is_predicted(
    run: Path, images: Path, tmp_path: Path
) -> None:
    broken = images / "broken.png"
    broken.write_bytes(b"no image")
    out = tmp_path / "out"
    result = call("predict", run, images, "--out", out)
    assert result.exit_code == 6
    assert f"error: {broken}: not an image that can be read" in result.stderr
    assert result.stdout.startswith("3 predicted")
    assert len(rows(out)) == 3


def test_batches_change_nothing(run: Path, images: Path, tmp_path: Path) -> None:
    one, three = tmp_path / "one", tmp_path / "three"
    for out, size in ((one, 1), (three, 3)):
        answer("predict", run, images, "--out", out, "--batch-size", size)
    for path in (one / "masks").iterdir():
        first, second = (np.asarray(Image.open(out / "masks" / path.name)) for out in (one, three))
        assert (first != second).mean() < 1e-3


def test_a_volume_comes_back_on_its_own_grid(run: Path, tmp_path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    rng = np.random.default_rng(0)
    image = sitk.GetImageFromArray(rng.integers(0, 900, (4, 20, 24)).astype(np.int16))
    image.SetSpacing((0.5, 0.75, 4.0))
    image.SetOrigin((3.0, -2.0, 7.0))
    image.SetDirection((-1, 0, 0, 0, 1, 0, 0, 0, 1))  # x runs to the right
    path = tmp_path / "scan.nii.gz"
    sitk.WriteImage(image, str(path))
    out = tmp_path / "out"
    answer("predict", run, path, "--out", out, "--probabilities")
    mask = sitk.ReadImage(str(out / "masks" / "scan.nii.gz"))
    assert mask.GetSize() == image.GetSize()
    for name in ("GetSpacing", "GetOrigin", "GetDirection"):
        assert getattr(mask, name)() == pytest.approx(getattr(image, name)())
    pixels = sitk.GetArrayFromImage(mask)
    chance = sitk.GetArrayFromImage(
        sitk.ReadImage(str(out / "probabilities" / "scan_class1.nii.gz"))
    )
    np.testing.assert_array_equal(pixels, chance > 0.5)
    (line,) = rows(out)
    assert int(line["area_px"]) == pixels.sum()
    assert float(line["volume_mm3"]) == pytest.approx(pixels.sum() * 1.5)
    assert line["area_mm2"] == ""


def test_a_slice_of_a_volume_is_predicted_as_the_image_it_is(run: Path, tmp_path: Path) -> None:
    """Cut along y, where slices are turned upright: the mask is turned back."""
    sitk = pytest.importorskip("SimpleITK")
    ramp = np.zeros((30, 3, 26), np.uint8)
    ramp[:9, :, :7] = 255  # at the feet and the right
    volume = sitk.GetImageFromArray(ramp)
    volume.SetSpacing((1.0, 5.0, 1.0))
    sitk.WriteImage(volume, str(tmp_path / "v.nii"))
    Image.fromarray(ramp[::-1, 0]).save(tmp_path / "slice.png")
    out = tmp_path / "out"
    answer("predict", run, tmp_path / "v.nii", tmp_path / "slice.png", "--out", out)
    found = sitk.GetArrayFromImage(sitk.ReadImage(str(out / "masks" / "v.nii.gz")))
    expected = np.asarray(Image.open(out / "masks" / "slice.png"))
    assert 0 < expected.mean() < 1
    for index in range(3):
        np.testing.assert_array_equal(found[::-1, index], expected)


def test_spacing_of_an_import_gives_square_millimetres(
    run: Path, images: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "study"
    shutil.copytree(images, folder / "images")
    first = min(images.iterdir()).stem
    (folder / "spacing.csv").write_text(
        f"image_id,row_mm,column_mm,slice_mm\n{first},0.5,0.25,\n", encoding="utf-8"
    )
    answer("predict", run, folder, "--out", tmp_path / "out", "--tiff")
    known, *others = rows(tmp_path / "out")
    assert float(known["area_mm2"]) == int(known["area_px"]) * 0.125
    assert {line["area_mm2"] for line in others} == {""}
    assert (tmp_path / "out" / "masks" / f"{first}.tiff").is_file()


def test_the_teacher_predicts_too(
    shared_pipeline: Config, run: Path, images: Path, tmp_path: Path
) -> None:
    params = write_params(tmp_path / "params.yaml", shared_pipeline)
    out = tmp_path / "out"
    answer("predict", run, images, "--out", out, "--teacher", "--params", params)
    assert {line["unlike"] for line in rows(out)} == {""}
    assert len(list((out / "masks").iterdir())) == 3


def test_a_run_folder_alone_is_enough(run: Path, images: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(run / "models", alone / "models")
    answer("predict", alone, images, "--out", tmp_path / "a")
    answer("predict", alone / "models" / "global.safetensors", images, "--out", tmp_path / "b")
    answer("predict", run, images, "--out", tmp_path / "c")
    assert digest(tmp_path / "a") == digest(tmp_path / "b") == digest(tmp_path / "c")


@pytest.mark.parametrize(
    ("damage", "code", "reason"),
    [
        ({"format": 2}, 5, "found format 2, expected 1"),
        ({"num_classes": "many"}, 5, "damaged at num_classes"),
        ({"num_classes": 0}, 5, "; copy it again, or write it anew: `samfed federate` does"),
        ({"image_size": 40}, 5, "damaged at image_size (Input should be a multiple of 16)"),
        ({"class_names": []}, 5, "damaged at (top level) (expected 1 class_names)"),
        (
            {"calibration": {"images": 2, "ece_before": 0, "ece": 0, "reliability": {}}},
            5,
            "damaged at calibration.reliability (expected pixels, confidence and accuracy of each",
        ),
        ({"temperature": 3.0, "weights_sha256": "0"}, 5, "sha256 differs"),
    ],
)
def test_bad_models_are_one_line_and_leave_nothing(
    run: Path, images: Path, tmp_path: Path, damage: dict[str, Any], code: int, reason: str
) -> None:
    shutil.copytree(run / "models", tmp_path / "models")
    path = tmp_path / "models" / "global.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    out = tmp_path / "out"
    weights = tmp_path / "models" / "global.safetensors"
    assert reason in fails(code, "predict", weights, images, "--out", out)
    assert not out.exists()


def test_weights_without_their_description(images: Path, tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"")
    line = fails(4, "predict", weights, images, "--out", tmp_path / "out")
    assert line.startswith(f"{tmp_path}/model.json: not found; copy it there from where")
    assert not (tmp_path / "out").exists()


def test_a_network_that_is_not_installed(run: Path, images: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "models", tmp_path / "models")
    path = tmp_path / "models" / "global.json"
    spec = json.loads(path.read_text())
    spec["network"]["encoder"] = "tu-of_another_version"
    path.write_text(json.dumps(spec))
    weights = path.with_suffix(".safetensors")
    assert "cannot be built" in fails(2, "predict", weights, images, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_pickle_is_opened(images: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(b"\x80\x04cos\nsystem\n")
    line = fails(2, "predict", path, images, "--out", tmp_path / "out")
    assert "not a model that can be opened" in line


def test_names_that_collide_or_lead_nowhere(run: Path, images: Path, tmp_path: Path) -> None:
    first = min(images.iterdir())
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(first, other)
    out = tmp_path / "out"
    shutil.copy(first, other / f"{first.stem}.bmp")
    for both in ((images, other / first.name), (other,)):
        line = fails(3, "predict", run, *both, "--out", out)
        assert (
            f"both would be written as '{first.stem}'; rename one, or give each in a call" in line
        )
    assert "no such file" in fails(3, "predict", run, tmp_path / "nowhere", "--out", out)
    assert "no such run" in fails(4, "predict", "nowhere", images, "--out", out)
    assert not out.exists()


def test_images_of_another_kind_are_named(
    shared_pipeline: Config, run: Path, images: Path, tmp_path: Path
) -> None:
    answer("predict", run, images, "--out", tmp_path / "a")
    distance = {line["file"]: float(line["distance"]) for line in rows(tmp_path / "a")}
    farthest = max(distance, key=lambda name: distance[name])
    shutil.copytree(run / "models", tmp_path / "run" / "models")
    path = tmp_path / "run" / "models" / "global.json"
    spec = json.loads(path.read_text())
    spec["likeness"]["threshold"] = distance[farthest] * 0.999
    path.write_text(json.dumps(spec))
    result = call("predict", tmp_path / "run", images, "--out", tmp_path / "b")
    assert f"1 of 3 are unlike what this model was trained on, e.g. {farthest}" in result.stdout
    flags = {line["file"]: line["unlike"] for line in rows(tmp_path / "b")}
    assert flags == {name: "yes" if name == farthest else "no" for name in distance}
