"""The installed command runs our cli.py, whatever else has that name, and starts fast."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HOSTILE = "raise SystemExit('another cli.py was run')"


def run(folder: Path, *command: str, path: str) -> str:
    """Run Python in ``folder``, with ``path`` on PYTHONPATH; return what it printed."""
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built of a copy without network, and unpacked as pip would install it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(
        ROOT / "pipeline", source / "pipeline", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("cli.py", "setup.py", "MANIFEST.in", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    code = "from setuptools import build_meta; build_meta.build_wheel('..')"
    run(source, "-c", code, path="")
    (built,) = folder.glob("*.whl")
    with zipfile.ZipFile(built) as file:
        file.extractall(folder / "installed")
    return folder / "installed"


def test_the_wheel_has_one_top_level_module(wheel: Path) -> None:
    top = {path.name for path in wheel.iterdir() if path.suffix != ".dist-info"}
    assert top == {"pipeline"}
    assert (wheel / "pipeline" / "cli.py").read_bytes() == (ROOT / "cli.py").read_bytes()
    assert list((wheel / "pipeline").glob("sam/weights/*.safetensors"))
    assert list((wheel / "pipeline").glob("results/templates/*.j2"))


@pytest.mark.parametrize("place", ["wheel", "clone"])
def test_another_cli_on_the_path_is_not_run(place: str, wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "cli.py").write_text(HOSTILE)
    path = os.pathsep.join([str(tmp_path), str(wheel if place == "wheel" else ROOT)])
    module, function = PROJECT["scripts"]["samfed"].split(":")
    script = f"import sys; sys.argv = ['samfed', '--version']; from {module} import {function} as f"
    expected = f"samfed {PROJECT['version']}\n"
    assert run(tmp_path, "-c", f"{script}; f()", path=path) == expected
    assert run(tmp_path, "-m", "pipeline", "--version", path=path) == expected


def test_only_what_is_tried_is_promised() -> None:
    systems = {each for each in PROJECT["classifiers"] if each.startswith("Operating System")}
    assert systems == {
        "Operating System :: POSIX :: Linux",
        "Operating System :: MacOS",
    }
    assert "win32" not in (ROOT / "pyproject.toml").read_text()
