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


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_the_shell_completes_commands_and_choices(tmp_path: Path) -> None:
    module, function = PROJECT["scripts"]["samfed"].split(":")
    script = tmp_path / "samfed"
    script.write_text(f"#!{sys.executable}\nfrom {module} import {function} as f\nf()\n")
    script.chmod(0o755)
    press_tab = (
        'eval "$(samfed --show-completion)"; COMP_WORDS=({}); COMP_CWORD=$(({} - 1)); '
        '_samfed_completion samfed; echo "${{COMPREPLY[@]}}"'
    )
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    for words, count, expected in (
        ("samfed fin", 2, "finetune-sam"),
        ("samfed prepare --progress ''", 4, "auto json none"),
    ):
        typed = ["bash", "-c", press_tab.format(words, count)]
        done = subprocess.run(typed, env=os.environ | path, capture_output=True, text=True)
        assert done.stdout == f"{expected}\n", done.stderr


def test_only_what_is_tried_is_promised() -> None:
    systems = {each for each in PROJECT["classifiers"] if each.startswith("Operating System")}
    assert systems == {
        "Operating System :: POSIX :: Linux",
        "Operating System :: MacOS",
    }
    assert "win32" not in (ROOT / "pyproject.toml").read_text()
