"""`dvc repro` for real, on tiny data: it runs what changed and nothing else."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import yaml
from conftest import TINY, digest
from forks import Forks

from pipeline.params import parse_config

ROOT = Path(__file__).parent.parent
STAGES = list(yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"])


def copy_of(root: Path, *names: str) -> None:
    """Copy files and folders of the repository to ``root``, without what DVC keeps there."""
    for name in names:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "tmp", "cache")
            shutil.copytree(ROOT / name, root / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, root / name)


# stands for `samfed`: makes what a stage of benchmarks/dvc.yaml is to make
STAND_IN = """\
#!/bin/sh
cd ../cache/four/polyp-many || exit
case $1 in
prepare) mkdir images oracle; touch partition.json images/x oracle/x ;;
finetune-sam) mkdir teacher; touch teacher/x ;;
precompute-sam) mkdir -p sam; touch sam/x ;;
esac
"""


def test_the_tables_are_a_project_of_their_own(tmp_path: Path, forks: Forks) -> None:
    """It makes what lies outside of it, and the root's status does not speak of it."""
    copy_of(tmp_path, ".dvc", "dvc.yaml", "params.yaml", ".dvcignore", ".gitignore", "benchmarks")
    for folder in ("data/polyp", "data/weights", "cache/four/polyp-many", "bin"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x").touch()
    script = tmp_path / "bin/samfed"
    script.write_text(STAND_IN)
    script.chmod(0o755)
    path = f"{script.parent}:{forks.bin}:{os.environ['PATH']}"

    def run(*command: str) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=os.environ | {"PATH": path}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("git", "init", "--quiet")
    made = run("dvc", "--cd", "benchmarks", "repro", "many_labels")
    assert "Running stage 'many_labels'" in made
    assert (tmp_path / "cache/four/polyp-many/sam/x").is_file()
    named = re.findall(r"^(\S.*):$", run("dvc", "status"), re.MULTILINE)
    assert set(named) == set(STAGES)


class Project:
    """A copy of the repository's files with tiny settings and a user's folder as input."""

    def __init__(self, root: Path, images: Path, commands: Path) -> None:
        self.root = root
        self.commands = commands  # a folder with `samfed` and `dvc`, to be first on PATH
        copy_of(root, "pipeline", ".dvc", "dvc.yaml", "cli.py", ".dvcignore", ".gitignore")
        (root / "data").mkdir()
        (root / "cache").mkdir()
        self.settings = json.loads(json.dumps(TINY))
        self.settings["data"]["root"] = str(images)
        self.write()
        self.run("git", "init", "--quiet")
        self.run("git", "add", ".")
        who = ("-c", "user.name=test", "-c", "user.email=test@localhost")
        self.run("git", *who, "commit", "--quiet", "--message", "begin")

    def write(self) -> None:
        config = parse_config(self.settings, source="test")
        text = yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False)
        (self.root / "params.yaml").write_text(text)

    def run(self, *command: str) -> str:
        environment = os.environ | {
            "PATH": os.pathsep.join([str(self.commands), os.environ["PATH"]])
        }
        done = subprocess.run(
            command, cwd=self.root, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def repro(self, *command: str) -> list[str]:
        """Stages that ran."""
        return re.findall(r"Running stage '([^']+)'", self.run("dvc", *(command or ("repro",))))


def test_repro_runs_what_changed(tiny_images: Path, tmp_path: Path, forks: Forks) -> None:
    before = digest(tiny_images)
    (tmp_path / "project").mkdir()
    project = Project(tmp_path / "project", tiny_images, forks.bin)
    assert project.repro() == STAGES
    assert (project.root / "cache/runs/sam_fed/report.html").is_file()

    assert project.repro() == []

    labels = digest(project.root / "cache/sam")
    experiment = ("exp", "run", "--set-param", "federate.rounds=1")
    assert project.repro(*experiment) == ["federate", "evaluate", "report"]
    assert digest(project.root / "cache/sam") == labels
    project.settings["federate"]["rounds"] = 1

    shown = json.loads(project.run("dvc", "metrics", "show", "--json"))[""]["data"]
    metrics = json.loads((project.root / "cache/runs/sam_fed/metrics.json").read_text())
    pooled = shown["cache/runs/sam_fed/metrics.json"]["data"]["test"]["pooled"]
    assert pooled["dice"] == metrics["test"]["pooled"]["dice"]
    project.run("dvc", "plots", "show")
    page = (project.root / "dvc_plots/index.html").read_text()
    assert "Validation Dice by round" in page
    assert "dvc_plots" not in project.run("git", "status", "--short")

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
