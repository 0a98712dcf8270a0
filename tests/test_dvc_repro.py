"""`dvc repro` for real, on tiny data: it runs what changed and nothing else."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml
from conftest import TINY, digest
from forks import Forks

from pipeline.params import parse_config

ROOT = Path(__file__).parent.parent
STAGES = list(yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"])


class Project:
    """A copy of the repository's files with tiny settings and a user's folder as input."""

    def __init__(self, root: Path, images: Path, commands: Path) -> None:
        self.root = root
        self.commands = commands  # a folder with `samfed`, to be first on PATH
        for name in ("pipeline", ".dvc"):
            ignored = shutil.ignore_patterns("__pycache__", "tmp", "cache")
            shutil.copytree(ROOT / name, root / name, ignore=ignored)
        for name in ("dvc.yaml", "cli.py", ".dvcignore"):
            shutil.copy(ROOT / name, root / name)
        (root / "data").mkdir()
        (root / "cache").mkdir()
        self.settings = json.loads(json.dumps(TINY))
        self.settings["data"]["root"] = str(images)
        self.write()
        self.run("git", "init", "--quiet")

    def write(self) -> None:
        config = parse_config(self.settings, source="test")
        text = yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False)
        (self.root / "params.yaml").write_text(text)

    def run(self, *command: str) -> str:
        environment = os.environ | {
            "PATH": os.pathsep.join(
                [str(self.commands), str(Path(sys.executable).parent), os.environ["PATH"]]
            )
        }
        done = subprocess.run(
            command, cwd=self.root, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def repro(self) -> list[str]:
        """Stages that ran."""
        return re.findall(r"Running stage '([^']+)'", self.run("dvc", "repro"))


def test_repro_runs_what_changed(tiny_images: Path, tmp_path: Path, forks: Forks) -> None:
    before = digest(tiny_images)
    (tmp_path / "project").mkdir()
    project = Project(tmp_path / "project", tiny_images, forks.bin)
    assert project.repro() == STAGES
    assert (project.root / "cache/runs/sam_fed/report.html").is_file()

    assert project.repro() == []

    labels = digest(project.root / "cache/sam")
    project.settings["federate"]["rounds"] = 1
    project.write()
    assert project.repro() == ["federate", "evaluate", "report"]
    assert digest(project.root / "cache/sam") == labels

    # forced, DVC deletes the model and keeps the checkpoints: the run ends as it did, with history
    run = project.root / "cache/runs/sam_fed"
    model, history = (run / "models/global.safetensors").read_bytes(), run / "history.jsonl"
    project.run("dvc", "repro", "--force", "--single-item", "federate")
    assert (run / "models/global.safetensors").read_bytes() == model
    assert len(history.read_text().splitlines()) == 1

    project.settings["sam"]["lora_rank"] = 3
    project.write()
    assert project.repro() == STAGES[2:]
    assert digest(project.root / "cache/sam") != labels
    # the old labels were moved aside, not away, and the user's folder was only read
    assert list((project.root / "cache/archive/server").glob("*.zarr"))
    assert digest(tiny_images) == before
