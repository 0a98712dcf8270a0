"""Every change that docs/extending.md shows applies to the code, can be chosen, and works."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/extending.md").read_text()
CHANGES = re.findall(r"^## (.+?)\n.*?```diff\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL)
CHOSEN = re.findall(r"`--set ([^`]+)`", PAGE)

USE_ALL = """
import sys
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image

import pipeline.sam
from pipeline.data.importers.importing import import_data
from pipeline.data.importers.items import Options
from pipeline.federation.aggregation import aggregate
from pipeline.federation.agreement import Sources, agree, spread
from pipeline.federation.updates import Updates
from pipeline.params import load_config
from pipeline.sam.build import build_sam
from pipeline.sam.checkpoints import build_base
from pipeline.segmentation.networks import build_model

folder = Path.cwd()
assert Path(pipeline.sam.__file__).is_relative_to(folder)
small = ("data.image_size=32", "model.encoder_depth=3", "model.decoder_channels=[16, 8, 8]")
config = load_config(None, (*small, *sys.argv[1:], "sam.checkpoint=vit_s.safetensors"))

network = build_model(config, seed=0).eval()
assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 2, 32, 32)

sam_label = torch.tensor([[[1, 1], [0, 0]]])  # the client says 1, 0, 0, 0: the Dice is 2/3
client = torch.tensor([[[0.1, 0.9], [0.9, 0.9]], [[0.9, 0.1], [0.1, 0.1]]])[None]
sources = Sources(spread(sam_label, torch.full((1, 2, 2), 0.8), 2), client)
label, weight = agree(sources, config=config.agreement)
assert torch.equal(label, sam_label)
assert torch.allclose(weight, torch.full((1, 2, 2), 2 / 3))

updates = Updates(folder / "updates", {"w": torch.zeros(1)})
updates.add("few", {"w": torch.tensor([1.0])}, 1)
updates.add("many", {"w": torch.tensor([4.0])}, 99)
state, chosen = aggregate(updates, config.federate.aggregation, byzantine=0, trained=["w"])
assert state["w"].item() == 2.5 and chosen == ["few", "many"]

for name in ("images/21_training.tif", "1st_manual/21_manual1.gif", "mask/21_training_mask.gif"):
    path = folder / "DRIVE/training" / name
    path.parent.mkdir(parents=True)
    pixels = np.zeros((8, 8, 3) if name.startswith("images") else (8, 8), np.uint8)
    pixels[:, 4:] = 255
    Image.fromarray(pixels).save(path)
import_data("drive", folder / "DRIVE", folder / "out", options=Options())
assert [path.stem for path in (folder / "out/masks").iterdir()] == ["21"]

safetensors.torch.save_file(build_sam("vit_s").state_dict(), "vit_s.safetensors")
teacher = build_base(config.sam, num_classes=1)
with torch.inference_mode():
    assert teacher.image_encoder(torch.zeros(1, 3, 256, 256)).shape == (1, 256, 16, 16)
"""


@pytest.mark.parametrize("change", [change for _, change in CHANGES], ids=[n for n, _ in CHANGES])
def test_a_change_has_under_20_lines(change: str) -> None:
    assert len(re.findall(r"^[+-] ", change, re.MULTILINE)) < 20


def test_every_change_applies_and_works(tmp_path: Path) -> None:
    """It takes seconds: another process imports the changed copy of the package."""
    shutil.copytree(
        ROOT / "pipeline", tmp_path / "pipeline", ignore=shutil.ignore_patterns("__pycache__")
    )
    assert len(CHANGES) == 5
    for title, change in CHANGES:
        done = subprocess.run(
            ["git", "apply"],
            input=change,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{title}\n{done.stderr}"
    done = subprocess.run(
        [sys.executable, "-c", USE_ALL, *CHOSEN],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
