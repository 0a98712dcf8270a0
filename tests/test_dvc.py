"""dvc.yaml names the code and the parameters that can change a stage's result, and no others."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.cohort import _DECIDING_MODULES

ROOT = Path(__file__).parent.parent
STAGES: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
ENTRIES = {
    "synth": ["synthetic"],
    "prepare": ["prepare"],
    "finetune-sam": ["sam/finetune"],
    "evaluate-sam": ["sam/evaluate"],
    "precompute-sam": ["precompute"],
    "federate": ["federation"],
    "evaluate": ["evaluation"],
    "report": ["report", "gallery"],
}
GROUND = {"config", "errors", "files", "locks", "devices", "torchvision_ops"}


def imported(path: Path, *, types_too: bool = False) -> set[Path]:
    """Modules of this package that ``path`` imports, type checking aside."""
    found: set[Path] = set()
    tree = ast.parse(path.read_text())
    skipped = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped or not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            module = ROOT / (name.replace(".", "/") + ".py")
            if name.startswith("pipeline") and module.is_file():
                found.add(module)
    return found


def closure(entries: list[str]) -> set[str]:
    """Every module behind ``entries``, as paths below the repository."""
    todo = [ROOT / "pipeline" / f"{entry}.py" for entry in entries]
    seen = set(todo)
    while todo:
        for module in imported(todo.pop()) - seen:
            seen.add(module)
            todo.append(module)
    return {path.relative_to(ROOT).as_posix() for path in seen}


def listed(stage: dict[str, Any], kind: str) -> list[str]:
    return [
        next(iter(entry)) if isinstance(entry, dict) else entry for entry in stage.get(kind, [])
    ]


@pytest.mark.parametrize("name", list(STAGES))
def test_a_stage_depends_on_its_code(name: str) -> None:
    ground = {f"pipeline/{module}.py" for module in GROUND}
    code = {dep for dep in listed(STAGES[name], "deps") if dep.endswith(".py")}
    assert code == closure(ENTRIES[name]) - ground


def test_stages_are_complete_and_in_order() -> None:
    assert list(STAGES) == list(ENTRIES)
    assert all(STAGES[name]["cmd"].startswith(f"samfed {name}") for name in STAGES)


def test_nothing_of_a_users_is_an_output() -> None:
    """Outputs are files or leaf folders under cache/, and the generated default."""
    outs = [
        out
        for s in STAGES.values()
        for kind in ("outs", "metrics", "plots")
        for out in listed(s, kind)
    ]
    assert all(out.startswith("cache/") or out == "data/synthetic" for out in outs)
    assert len(outs) == len(set(outs))
    for out in outs:
        assert not any(other.startswith(out + "/") for other in outs)
    assert "cache/locks" not in outs
    assert "cache/aside" not in outs


def test_expensive_outputs_persist() -> None:
    persistent = [
        next(iter(out))
        for stage in STAGES.values()
        for out in stage.get("outs", [])
        if isinstance(out, dict) and next(iter(out.values())).get("persist")
    ]
    run = "cache/runs/${federate.name}"
    assert persistent == ["cache/sam", f"{run}/checkpoints", f"{run}/history.jsonl"]


def test_parameters_exist_and_reach_only_their_stages() -> None:
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    for stage in STAGES.values():
        for key in stage["params"]:
            value = params
            for part in key.split("."):
                value = value[part]
    users = {
        section: {
            n for n, s in STAGES.items() if any(p.split(".")[0] == section for p in s["params"])
        }
        for section in ("sam", "model", "agreement", "partition", "synth")
    }
    assert users == {
        "sam": {"finetune-sam", "evaluate-sam"},
        "model": {"federate"},
        "agreement": {"federate"},
        "partition": {"prepare"},
        "synth": {"synth"},
    }


def test_stage_one_never_imports_stage_two_nor_the_other_way() -> None:
    stage_two = {f"pipeline/{m}.py" for m in ("federation", "training", "agreement", "aggregation")}
    assert not closure(["sam/finetune", "sam/evaluate", "precompute"]) & stage_two
    assert not {m for m in closure(["federation"]) if m.startswith("pipeline/sam/")}
    assert "pipeline/images.py" not in closure(["federation"])


def test_only_stores_imports_zarr_and_only_models_smp() -> None:
    owners = {"zarr": "stores", "numcodecs": "stores", "segmentation_models_pytorch": "models"}
    for package, owner in owners.items():
        users = {
            path.relative_to(ROOT / "pipeline").with_suffix("").parts[0]
            for path in sorted((ROOT / "pipeline").rglob("*.py"))
            if any(
                isinstance(node, ast.Import | ast.ImportFrom)
                and package in ast.unparse(node).split()[1]
                for node in ast.walk(ast.parse(path.read_text()))
            )
        }
        assert users == {owner}


def test_a_run_goes_on_only_under_the_code_that_decides_it() -> None:
    """All of stage two, but for what only reads stores or writes reports."""
    reads = {"card", "partition", "runs"}
    reads |= {f"stores/{name}" for name in ("chunks", "decode", "images", "labels")}
    reports = {"diagnostics", "metrics"}
    code = {m.removeprefix("pipeline/").removesuffix(".py") for m in closure(["federation"])}
    assert set(_DECIDING_MODULES) == code - GROUND - reads - reports
