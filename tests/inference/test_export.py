"""``samfed export``: the same predictions without samfed's network code, and without torch."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
import yaml
from conftest import answer, build_once, call, fails
from PIL import Image

from pipeline.config import Config
from pipeline.inference.loading import Choice, load_model
from pipeline.inference.outputs import at_own_size
from pipeline.inference.torch_model import NetworkModel

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def exported(shared_pipeline: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported folder; tests only read it."""
    run = shared_pipeline.cache.root / "runs" / "sam_fed"

    def build(folder: Path) -> None:
        result = call("export", run, "--out", folder)
        assert result.exit_code == 0, result.output

    return build_once(tmp_path_factory, "exported", build)


@pytest.fixture
def network(exported: Path, shared_pipeline: Config) -> NetworkModel:
    """The same network in torch."""
    found = load_model(shared_pipeline, Choice(str(exported), device="cpu"))
    assert isinstance(found, NetworkModel)
    return found


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 48, 64), (3, 20, 21), (2, 97, 32)])
def test_onnx_and_torch_say_the_same_of_images_of_any_size(
    exported: Path, network: NetworkModel, batch: int, height: int, width: int
) -> None:
    rng = np.random.default_rng(height)
    small = rng.integers(0, 256, (batch, 6, 6, 3), dtype=np.uint8)
    images = np.stack([np.asarray(Image.fromarray(i).resize((width, height))) for i in small])
    session = ort.InferenceSession(exported / "model.onnx", providers=["CPUExecutionProvider"])
    mask, probabilities, distance = session.run(None, {"pixels": images})
    expected = network.predict([network.frame(image) for image in images])
    own = np.stack([at_own_size(each, (height, width)) for each in expected.probabilities])
    assert mask.shape == (batch, height, width)
    np.testing.assert_allclose(probabilities, own, atol=0.02)
    assert (mask != own.argmax(axis=1)).mean() < 0.01
    np.testing.assert_allclose(distance, expected.distances, rtol=0.02)


def test_a_frame_is_predicted_alike_to_rounding(exported: Path, network: NetworkModel) -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    session = ort.InferenceSession(exported / "model.onnx", providers=["CPUExecutionProvider"])
    _, probabilities, distance = session.run(None, {"pixels": frames})
    expected = network.predict(list(frames))
    np.testing.assert_allclose(probabilities, expected.probabilities, atol=1e-5)
    np.testing.assert_allclose(distance, expected.distances, rtol=1e-4)


def test_predict_without_torch(
    exported: Path, tiny_images: Path, shared_pipeline: Config, tmp_path: Path
) -> None:
    images = sorted((tiny_images / "images").iterdir())[:2]
    model = exported / "model.onnx"
    script = (
        "import sys\n"
        "class Forbid:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'torchvision', 'timm'):\n"
        "            raise ImportError(f'{name} is forbidden here')\n"
        "sys.meta_path.insert(0, Forbid())\n"
        "from pipeline.__main__ import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", script, "predict", model, *images, "--out", tmp_path / "a"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer("predict", exported, *images, "--out", tmp_path / "b")
    for path in (tmp_path / "b" / "masks").iterdir():
        one, other = (
            np.asarray(Image.open(f / "masks" / path.name))
            for f in (tmp_path / "a", tmp_path / "b")
        )
        assert (one != other).mean() < 0.01  # two runtimes, which round otherwise at boundaries


def test_the_card_says_what_it_is_and_its_code_loads_it(
    exported: Path, network: NetworkModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = (exported / "README.md").read_text()
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header)["pipeline_tag"] == "image-segmentation"
    for section in ("Data and method", "Use", "Intended use and limits", "Scores", "Calibration"):
        assert f"## {section}" in body
    assert network.spec.weights_sha256 in body
    assert re.search(r"\| internal test \| \d+ \| \d\.\d{3} \(", body)
    code = "\n".join(
        line.removeprefix("    ")
        for line in body[body.index("    import safetensors") :].split("\n\n")[0].splitlines()
    )
    assert code.count("\n") < 10
    monkeypatch.chdir(exported)
    names: dict[str, object] = {}
    exec(code, names)
    model = names["model"]
    assert isinstance(model, torch.nn.Module)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.inference_mode():
        found, expected = model.eval()(images), network.network(images)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_damaged_file_is_refused(exported: Path, tiny_images: Path, tmp_path: Path) -> None:
    content = bytearray((exported / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    path, out = tmp_path / "model.onnx", tmp_path / "out"
    path.write_bytes(bytes(content))
    assert "damaged" in fails(5, "predict", path, tiny_images, "--out", out)
    shutil.copy(exported / "model.safetensors", tmp_path)
    assert "not found" in fails(4, "predict", tmp_path, tiny_images, "--out", out)
    spec = json.loads((exported / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps(spec | {"format": 7}))
    assert "found format 7, expected 1" in fails(5, "predict", tmp_path, tiny_images, "--out", out)
    assert not out.exists()
