"""A run's folder: checkpoints that prove themselves, and runs that are never deleted."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config, tiny_spec

from pipeline.config import Config
from pipeline.errors import ConfigError, CorruptStoreError, DataError, StageError
from pipeline.federation.runs import Checkpoint, RoundFiles, RunFolder

PRINT = "f" * 64
OTHER = "e" * 64


def checkpoint(number: int, fingerprint: str = PRINT) -> Checkpoint:
    values = torch.arange(6, dtype=torch.float32).reshape(2, 3) + number
    weights = {"conv.weight": values.t(), "bn.count": torch.tensor(number)}  # t(): not contiguous
    return Checkpoint(number, weights, {"site_a": number}, "p" * 64, fingerprint)


def equal(found: Checkpoint | None, expected: Checkpoint) -> None:
    assert found is not None
    assert replace(found, weights={}) == replace(expected, weights={})
    assert list(found.weights) == sorted(expected.weights)
    for name, value in expected.weights.items():
        assert found.weights[name].dtype == value.dtype
        assert torch.equal(found.weights[name], value)


@pytest.fixture
def settings(tmp_path: Path) -> Config:
    return tiny_config(tmp_path / "data", tmp_path / "cache")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "runs" / "sam_fed")


def begin(run: RunFolder, config: Config, fingerprint: str = PRINT, mode: str = "auto") -> str:
    aside = run.path.parent.parent / "archive"
    return run.begin(config, fingerprint, mode=mode, archive=aside) or ""


def files(run: RunFolder) -> list[str]:
    return sorted(path.name for path in (run.path / "checkpoints").iterdir())


def test_checkpoint_round_trip(run: RunFolder) -> None:
    assert run.load_checkpoint() is None
    run.save_checkpoint(checkpoint(3))
    equal(run.load_checkpoint(), checkpoint(3))


def test_the_same_checkpoint_gives_the_same_bytes(run: RunFolder) -> None:
    path = run.path / "checkpoints" / "round_0003.safetensors"
    run.save_checkpoint(checkpoint(3))
    before = path.read_bytes()
    run.save_checkpoint(checkpoint(3))
    assert path.read_bytes() == before


def test_only_the_last_two_are_kept(run: RunFolder) -> None:
    for number in range(12):
        run.save_checkpoint(checkpoint(number))
    assert files(run) == ["round_0010.safetensors", "round_0011.safetensors"]
    equal(run.load_checkpoint(), checkpoint(11))


def test_the_last_is_the_highest_round_beyond_four_digits(run: RunFolder) -> None:
    for number in (9998, 9999, 10000, 10001):
        run.save_checkpoint(checkpoint(number))
    assert files(run) == ["round_10000.safetensors", "round_10001.safetensors"]
    equal(run.load_checkpoint(), checkpoint(10001))


def test_every_flipped_bit_of_a_checkpoint_is_found(run: RunFolder) -> None:
    run.save_checkpoint(checkpoint(2))
    path = run.path / "checkpoints" / "round_0002.safetensors"
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    silent = []
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(damaged))
        try:
            equal(run.load_checkpoint(), checkpoint(2))
        except CorruptStoreError as error:
            if not str(error).startswith(f"{path}: damaged ("):
                silent.append(place)
    assert silent == []  # a flip that goes unseen must leave the content as it was


def test_a_flipped_byte_of_a_models_weights_is_found(run: RunFolder) -> None:
    weights = {"layer.weight": torch.arange(12.0).reshape(3, 4).t()}
    run.save_model(weights, tiny_spec())
    assert torch.equal(run.load_model()["layer.weight"], weights["layer.weight"])
    path = run.path / "models" / "global.safetensors"
    whole = path.read_bytes()
    run.save_model(weights, tiny_spec())
    assert path.read_bytes() == whole
    damaged = bytearray(whole)
    damaged[-3] ^= 1
    path.write_bytes(bytes(damaged))
    with pytest.raises(CorruptStoreError, match="sha256 differs"):
        run.load_model()


def test_a_flipped_byte_in_the_data_names_the_file(run: RunFolder) -> None:
    run.save_checkpoint(checkpoint(1))
    run.save_checkpoint(checkpoint(2))
    path = run.path / "checkpoints" / "round_0002.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-3] ^= 1
    path.write_bytes(bytes(damaged))
    with pytest.raises(CorruptStoreError) as caught:
        run.load_checkpoint()
    assert (
        str(caught.value)
        == f"{path}: damaged (sha256 differs); delete it and run `samfed federate`"
    )
    path.unlink()  # as the message says: the round before is still there
    equal(run.load_checkpoint(), checkpoint(1))


@pytest.mark.parametrize("size", [0, 5, 100])
def test_a_truncated_checkpoint(run: RunFolder, settings: Config, size: int) -> None:
    begin(run, settings)
    run.save_checkpoint(checkpoint(2))
    path = run.path / "checkpoints" / "round_0002.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CorruptStoreError, match=r"delete it and run `samfed federate`$"):
        begin(run, settings)
    assert "moved the earlier run to" in begin(run, settings, mode="restart")


# --------------------------------------------------------------------------- begin


def test_the_same_run_continues(run: RunFolder, settings: Config) -> None:
    assert begin(run, settings) == ""
    run.save_checkpoint(checkpoint(1))
    assert begin(run, settings) == ""
    assert begin(run, settings, mode="resume") == ""
    equal(run.load_checkpoint(), checkpoint(1))
    assert run.config() == settings


@pytest.mark.parametrize("link", [None, "runs", "runs/sam_fed"])
def test_another_run_is_moved_aside(
    run: RunFolder, settings: Config, tmp_path: Path, link: str | None
) -> None:
    """Also where the runs, or this one, lie behind a link, which stays."""
    if link is not None:
        (tmp_path / link).parent.mkdir(exist_ok=True)
        (tmp_path / link).symlink_to(tmp_path / "elsewhere" / link)
    for number in (1, 2):
        begin(run, settings, PRINT)
        run.save_checkpoint(checkpoint(number))
        notice = begin(run, settings, OTHER)
        suffix = "" if number == 1 else f"-{number}"
        target = tmp_path / "archive" / f"sam_fed-{PRINT[:12]}{suffix}"
        assert notice == f"{run.path}: moved the earlier run to {target}"
        equal(RunFolder(target).load_checkpoint(), checkpoint(number))
        assert run.load_checkpoint() is None
        if link is not None:
            assert (tmp_path / link).is_symlink()
            assert (tmp_path / "elsewhere" / "runs" / "sam_fed" / "params.yaml").is_file()


def test_restart_moves_the_same_run_aside(run: RunFolder, settings: Config, tmp_path: Path) -> None:
    assert begin(run, settings, mode="restart") == ""  # nothing there yet
    run.save_checkpoint(checkpoint(1))
    assert "moved the earlier run to" in begin(run, settings, mode="restart")
    assert run.load_checkpoint() is None
    assert len(list((tmp_path / "archive").iterdir())) == 1


def test_resume_without_a_run(run: RunFolder, settings: Config) -> None:
    with pytest.raises(ConfigError) as caught:
        begin(run, settings, mode="resume")
    assert str(caught.value) == (f"--resume: found no checkpoint in {run.path}; leave --resume out")
    assert not run.path.exists()


def test_resume_of_another_run(run: RunFolder, settings: Config) -> None:
    begin(run, settings)
    run.save_checkpoint(checkpoint(1))
    with pytest.raises(ConfigError) as caught:
        begin(run, settings, OTHER, mode="resume")
    assert str(caught.value) == (
        f"--resume: found a run with other parameters or data in {run.path}; leave --resume out"
    )
    equal(run.load_checkpoint(), checkpoint(1))


# --------------------------------------------------------------------------- history, model


def entry(number: int, dice: float | None = 0.5) -> dict[str, Any]:
    return {"round": number, "clients": {}, "val": {"dice": dice}}


def test_history_is_replaced_from_the_resumed_round_on(run: RunFolder) -> None:
    assert run.history() == []
    for number in (1, 2, 3):
        run.append_history(entry(number))
    run.append_history(entry(2, 0.75))
    assert run.history() == [entry(1), entry(2, 0.75)]
    assert run.text() == f"2 rounds, validation Dice 0.750; {run.path}"
    assert run.as_json() == {"run": str(run.path), "rounds": 2, "val_dice": 0.75}
    run.append_history(entry(3, None))
    assert run.text() == f"3 rounds; {run.path}"


def test_a_damaged_history_is_one_line(run: RunFolder) -> None:
    run.append_history(entry(1))
    path = run.path / "history.jsonl"
    whole = path.read_bytes()
    # a line separator within a string is no end of a line in JSON lines
    odd = '{"round": 2, "clients": {}, "val": {"dice": null}, "warnings": ["a\u2028b"]}\n'.encode()
    path.write_bytes(whole + odd)
    assert run.history()[1]["warnings"] == ["a\u2028b"]
    other_round, other_key = odd.replace(b": 2", b": 3"), odd.replace(b"dice", b"dicf")
    text, far = odd.replace(b": 2", b': "2"'), odd.replace(b"null", b"9.5")
    cut = (b'{"round": 2, "cli', b'{"round": 2}', b"[]", b"\xff")
    strange = [
        odd.replace(b'{}, "val"', b'{"a": {"drift": {}}}, "val"'),
        odd.replace(b'{}, "val"', b'{"a": 1}, "val"'),
        odd.replace(b"{}", b'{}, "server": ["x"]'),
        odd.replace(b"{}", b'{}, "server": {"loss": "x"}'),
        odd.replace(b'["', b'[7, "'),
    ]
    for damaged in (*cut, *strange, other_round, other_key, text, far):
        path.write_bytes(whole + damaged)
        with pytest.raises(DataError, match=r"line 2 is no round .*samfed federate --restart`$"):
            run.history()


def test_damaged_parameters_are_one_line(run: RunFolder, settings: Config) -> None:
    begin(run, settings)
    path = run.path / "params.yaml"
    for damaged in ("data: {image_sise: 3}", "data: [", "7"):
        path.write_text(damaged)
        with pytest.raises(ConfigError, match=re.escape(str(path))):
            run.config()


def test_the_final_model(run: RunFolder) -> None:
    with pytest.raises(StageError) as caught:
        run.load_model()
    assert str(caught.value) == f"{run.model_path}: not found; run `samfed federate` first"
    run.save_model(checkpoint(2).weights, tiny_spec())
    found = run.load_model()
    assert torch.equal(found["conv.weight"], checkpoint(2).weights["conv.weight"])


def test_settings_of_a_run_that_is_not_there(run: RunFolder) -> None:
    with pytest.raises(StageError) as caught:
        run.config()
    assert (
        str(caught.value) == f"{run.path / 'params.yaml'}: not found; run `samfed federate` first"
    )


def test_what_a_rejected_round_left_is_dropped_before_what_it_builds_on(tmp_path: Path) -> None:
    """A client whose updates are rejected for long still builds on its last accepted round."""
    files = RoundFiles(tmp_path, kept=3)
    for number, before in ((1, 0), (2, 1), (3, 2), (4, 2), (5, 2), (6, 2)):
        files.save(number, {"x": torch.tensor(number)}, before=before)
    kept = [files.path(number) for number in (1, 2, 6)]
    assert sorted(tmp_path.iterdir()) == kept
    assert files.last() == kept[-1]
    files.save(3, {"x": torch.tensor(3)}, before=2)  # it was given up, and writes late
    assert kept[-1].is_file()
    files.save(7, {"x": torch.tensor(7)}, before=6)
    assert [file.name[:10] for file in sorted(tmp_path.iterdir())][-2:] == [
        "round_0006",
        "round_0007",
    ]


def test_a_run_that_begins_again_outlives_its_old_checkpoints(run: RunFolder) -> None:
    """Old later rounds would hide the new ones, and a second kill would lose them."""
    for number in (14, 15):
        run.save_checkpoint(checkpoint(number))
    run.save_checkpoint(checkpoint(0))
    assert files(run) == ["round_0000.safetensors"]
    run.save_checkpoint(checkpoint(1))
    equal(run.load_checkpoint(), checkpoint(1))


def test_examples_that_are_missing_are_named(
    run: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    run.save_model({"layer.weight": torch.zeros(1)}, tiny_spec())
    run.save_examples([])
    run.private("a").mkdir(parents=True)
    run.save_examples([], "b")
    assert run.examples() == []
    missing = run.private("a") / "examples.safetensors"
    assert [record.getMessage() for record in caplog.records] == [
        f"{missing}: not found, so not shown; run `samfed federate` again"
    ]
