"""dvc.yaml names the parameters that can change a stage's result, and safe outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
STAGES: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def listed(stage: dict[str, Any], kind: str) -> list[str]:
    return [
        next(iter(entry)) if isinstance(entry, dict) else entry for entry in stage.get(kind, [])
    ]


def test_stages_are_complete_and_in_order() -> None:
    assert list(STAGES) == [
        "synth",
        "prepare",
        "finetune-sam",
        "evaluate-sam",
        "precompute-sam",
        "federate",
        "evaluate",
        "report",
    ]
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
    assert "cache/archive" not in outs


def test_expensive_outputs_persist() -> None:
    persistent = [
        next(iter(out))
        for stage in STAGES.values()
        for out in stage.get("outs", [])
        if isinstance(out, dict) and next(iter(out.values())).get("persist")
    ]
    run = "cache/runs/${federate.name}"
    runs = [f"{run}/{name}" for name in ("clients", "checkpoints", "history.jsonl")]
    assert persistent == ["cache/sam", *runs]


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
        for section in ("sam", "model", "augment", "agreement", "partition", "synth")
    }
    assert users == {
        "sam": {"finetune-sam", "evaluate-sam"},
        "model": {"evaluate-sam", "federate"},
        "augment": {"finetune-sam", "evaluate-sam", "federate"},
        "agreement": {"federate"},
        "partition": {"prepare"},
        "synth": {"synth"},
    }
