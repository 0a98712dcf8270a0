"""``samfed federate --tensorboard``: each round of the history once, also of a continued run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import fails
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.federation.tracking import following, scalars


def entry(number: int, **client: Any) -> dict[str, Any]:
    """A round as a history has it."""
    return {
        "round": number,
        "unlabelled_weight": 1.0,
        "learning_rate": 0.5**number,
        "clients": {"north": {"loss": 1 / number, "agreement": None} | client},
        "server": {"loss": 2.0},
        "warnings": ["a text is no number"],
        "val": {"dice": 0.7, "clients": {"north": 0.6}},
        "seconds": 12.0,
    }


def shown(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard's own reader finds: steps and values by name."""
    found = EventAccumulator(str(folder)).Reload()
    names = found.Tags()["scalars"]
    return {name: [(e.step, e.value) for e in found.Scalars(name)] for name in names}


def write(folder: Path, *numbers: int) -> None:
    with following(folder, "run") as track:
        assert track is not None
        for number in numbers:
            track(entry(number))


def test_the_numbers_of_a_round() -> None:
    assert scalars(entry(2)) == {
        "round/unlabelled_weight": 1.0,
        "round/learning_rate": 0.25,
        "round/seconds": 12.0,
        "val_dice/all": 0.7,
        "val_dice/north": 0.6,
        "loss/server": 2.0,
        "loss/north": 0.5,
    }


def test_a_continued_run_is_shown_as_one_that_never_stopped(tmp_path: Path) -> None:
    """A killed run wrote round 2, which was then played again."""
    write(tmp_path / "straight", 1, 2, 3)
    write(tmp_path / "stopped", 1, 2)
    (tmp_path / "stopped" / "run" / "notes.txt").write_text("a user's")
    write(tmp_path / "stopped", 1, 2, 3)
    straight = shown(tmp_path / "straight" / "run")
    assert shown(tmp_path / "stopped" / "run") == straight
    assert straight["loss/north"] == [(n, pytest.approx(1 / n)) for n in (1, 2, 3)]
    assert (tmp_path / "stopped" / "run" / "notes.txt").is_file()


def test_without_the_option_nothing_is_followed() -> None:
    with following(None, "run") as track:
        assert track is None


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert fails(2, "federate", "--tensorboard", tmp_path, "--set", f"cache.root={tmp_path}") == (
        "--tensorboard: tensorboard is not installed; run pip install 'samfed[tracking]'"
    )
    assert list(tmp_path.iterdir()) == []
