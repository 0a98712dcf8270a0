"""``samfed doctor`` and what ``prepare`` refuses or warns of before anything is computed."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from conftest import Project, answer, call, fails, listing

from pipeline.sam import providers
from pipeline.sam.providers import failing_providers
from pipeline.setup import doctor


@pytest.fixture
def project(tiny_images: Path, tmp_path: Path) -> Project:
    project = Project(tmp_path)
    shutil.copytree(tiny_images, project.images)
    return project


def kinds(*arguments: object) -> dict[str, set[str]]:
    """The kinds of findings by what was looked at; the command may fail."""
    result = call("doctor", "--json", *arguments)
    found: dict[str, set[str]] = {}
    for each in json.loads(result.stdout)["findings"]:
        found.setdefault(each["what"], set()).add(each["kind"])
    assert result.exit_code == int(any("problem" in each for each in found.values()))
    return found


def test_a_sound_project_has_no_problem_and_is_left_as_it_was(project: Project) -> None:
    before = listing(project.folder)
    found = answer("doctor", *project.options)
    assert found["problem"] == 0
    assert {each["what"] for each in found["findings"]} == {
        *("versions", "device", "onnx", "precision", "threads", "disk", "locks", "data"),
        *("networks", "teacher", "settings"),
    }
    assert listing(project.folder) == before


@pytest.mark.parametrize(
    ("setting", "what"),
    [
        ("data.root=nowhere", "data"),
        ("model.encoder=no_such_net", "networks"),
        ("model.encoder_weights=nowhere.safetensors", "networks"),
        ("sam.variant=vit_b", "teacher"),
        ("sam.variant=timm:no_such_net", "teacher"),
        ("federate.device=cuda:99", "device"),
        ("cache.root=pyproject.toml/cache", "disk"),
    ],
)
def test_a_problem_is_named_and_sets_the_exit_code(
    project: Project, setting: str, what: str
) -> None:
    assert "problem" in kinds(*project.options, "--set", setting)[what]


def test_a_damaged_image_is_a_problem(project: Project) -> None:
    path = min((project.images / "images").iterdir())
    path.write_bytes(path.read_bytes()[:100])
    result = call("doctor", *project.options)
    assert result.exit_code == 1
    assert f"error: data: {path}: damaged image" in result.stderr


def test_a_lock_of_another_host_is_a_warning(project: Project) -> None:
    lock = project.cache / "locks" / "prepare.lock"
    lock.parent.mkdir(parents=True)
    lock.write_text(json.dumps({"host": f"not-{socket.gethostname()}", "pid": 1}))
    assert kinds(*project.options)["locks"] == {"warning"}


@pytest.mark.parametrize(("fast", "kind"), [(True, "ok"), (False, "warning")])
def test_emulated_bfloat16_is_a_warning(
    project: Project, monkeypatch: pytest.MonkeyPatch, fast: bool, kind: str
) -> None:
    monkeypatch.setattr(doctor, "has_fast_bf16", lambda device: fast)
    options = (*project.options, "--set", "federate.precision=bf16")
    assert kind in kinds(*options)["precision"] <= {"ok", kind}


def test_the_cpu_runs_a_node_of_onnx() -> None:
    assert failing_providers()["CPUExecutionProvider"] is None


def test_a_provider_that_cannot_be_loaded_prints_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    levels, during = list[int](), list[int]()
    session = providers.ort.InferenceSession

    def watch(*arguments: Any, **options: Any) -> Any:
        during.append(levels[-1])
        return session(*arguments, **options)

    monkeypatch.setattr(providers.ort, "set_default_logger_severity", levels.append)
    monkeypatch.setattr(providers.ort, "InferenceSession", watch)
    failing_providers()
    assert (during, levels) == ([4], [4, 2])  # fatal errors alone, and then as before


# --------------------------------------------------------------------------- at prepare


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("model.encoder=no_such_net", "model: unet with encoder 'no_such_net' cannot be"),
        (
            "model.clients=[{encoder_depth: 4}, {encoder: no_such_net}]",
            "model.clients.1 (client 2): unet with encoder 'no_such_net' cannot be built",
        ),
    ],
)
def test_prepare_refuses_a_network_that_cannot_be_built(
    project: Project, setting: str, expected: str
) -> None:
    before = listing(project.folder)
    assert fails(2, "prepare", *project.options, "--set", setting).startswith(expected)
    assert listing(project.folder) == before


def test_prepare_warns_of_settings_that_suit_the_generated_images_alone(project: Project) -> None:
    assert "WARNING" not in call("prepare", *project.options).stderr
    (project.images / "sites.csv").unlink()
    first = min((project.images / "images").iterdir())
    for kind in ("images", "masks"):
        path = project.images / kind / first.name
        if path.exists():
            path.rename(path.with_name("case.png"))
    teacher = ("--set", "sam.variant=timm:mobilenetv3_small_050")
    result = call("prepare", *project.options, *teacher)
    assert result.exit_code == 0, result.output
    for key in ("data.image_size: 32 px", "model.encoder_weights: null", "sam.checkpoint: null"):
        assert f"WARNING: {key}" in result.stderr
