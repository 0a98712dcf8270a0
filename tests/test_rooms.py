"""Which room of pipeline/ may import which, and that dvc.yaml names the rooms behind each stage."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PIPELINE = ROOT / "pipeline"
GROUND = {
    "__init__",
    "__main__",
    "allocation",
    "cluster",
    "config",
    "deciding",
    "console",
    "cores",
    "dask_noise",
    "disk",
    "doubts",
    "errors",
    "folders",
    "methods",
    "names",
    "params",
    "progress",
    "runtime",
}
BELOW = {
    "stores": {"segmentation"},
    "segmentation": set(),
    "data": {"stores", "segmentation"},
    "sam": {"data", "stores", "segmentation"},
    "federation": {"data", "stores", "segmentation"},
    "labelling": {"sam", "data", "stores", "segmentation"},
    "inference": {"federation", "sam", "data", "stores", "segmentation"},
    "setup": {"labelling", "federation", "sam", "data", "stores", "segmentation"},
    "results": {"inference", "labelling", "federation", "sam", "data", "stores", "segmentation"},
    "commands": {"results", "setup", "labelling", "federation", "sam", "data"},
}
STAGES: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
ENTRIES = {
    "synth": ["data/synthetic"],
    "prepare": ["data/prepare"],
    "finetune-sam": ["sam/finetune"],
    "evaluate-sam": ["results/evaluate_teacher"],
    "precompute-sam": ["labelling/precompute"],
    "federate": ["federation/server"],
    "evaluate": ["results/evaluate"],
    "report": ["results/report"],
}


@cache
def imports(path: Path) -> set[str]:
    """Every module that ``path`` imports, for type checking too, and what it takes from them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@cache
def modules(path: Path) -> set[Path]:
    """Those of them that are files of this package."""
    files = (ROOT / (name.replace(".", "/") + ".py") for name in imports(path))
    return {file for file in files if PIPELINE in file.parents and file.is_file()}


def room(path: Path) -> str:
    """The room of a module, or the module itself where it lies on the ground."""
    return path.relative_to(PIPELINE).with_suffix("").parts[0]


def test_every_line_has_a_room() -> None:
    rooms = {room(path) for path in PIPELINE.rglob("*.py")}
    assert rooms == GROUND | set(BELOW)


@pytest.mark.parametrize("name", [*BELOW, *sorted(GROUND)])
def test_a_room_imports_only_what_lies_below(name: str) -> None:
    allowed = GROUND | BELOW.get(name, set()) | {name}
    for path in PIPELINE.rglob("*.py"):
        if room(path) == name:
            assert {room(module) for module in modules(path)} <= allowed, path


def test_modules_do_not_import_in_circles() -> None:
    arrows = {path: modules(path) for path in PIPELINE.rglob("*.py")}
    while arrows:
        free = [path for path, found in arrows.items() if not found & arrows.keys() - {path}]
        assert free, sorted(str(path) for path in arrows)
        for path in free:
            del arrows[path]


def test_libraries_stay_in_their_room() -> None:
    owners = {
        "zarr": {"stores"},
        "numcodecs": {"stores"},
        "segmentation_models_pytorch": {"segmentation"},
        "segment_anything": {"sam"},
        "onnxruntime": {"sam", "inference"},
        "SimpleITK": {"data"},
        "pydicom": {"data"},
        "distributed": {"cluster"},
        "flwr": {"federation"},
    }
    for package, allowed in owners.items():
        users = {
            room(path)
            for path in PIPELINE.rglob("*.py")
            if package in {name.split(".")[0] for name in imports(path)}
        }
        assert users <= allowed, package


@pytest.mark.parametrize("stage", list(STAGES))
def test_a_stage_depends_on_the_rooms_behind_it(stage: str) -> None:
    todo = [PIPELINE / f"{entry}.py" for entry in ENTRIES[stage]]
    seen = set(todo)
    while todo:
        for module in modules(todo.pop()) - seen:
            seen.add(module)
            todo.append(module)
    listed = {dep for dep in STAGES[stage]["deps"] if dep.startswith("pipeline/")}
    assert listed == {f"pipeline/{room(path)}" for path in seen if room(path) not in GROUND}
