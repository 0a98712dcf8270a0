"""What the console shows of long work: bars, plain lines or JSON, the time left, and warnings."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import call, log_kept
from typer.main import get_command

import pipeline.progress
from pipeline.console import command
from pipeline.errors import SamfedError
from pipeline.progress import Progress, Style, Work, console_progress, duration

SGR = re.compile(r"\x1b\[([\d;]*)m")


class Terminal(io.StringIO):
    """Stands for stderr of a terminal."""

    def isatty(self) -> bool:
        return True


def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Make stderr a terminal, and forget this process's settings of colour."""
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    stderr = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    return stderr


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (59, "59 s"), (60, "1 min 00 s"), (3599, "59 min 59 s"), (7500, "2 h 05 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_time_left_follows_from_the_steps_since_it_began(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What an earlier run has done says nothing of the pace."""
    monkeypatch.setattr(time, "monotonic", lambda: 130.0)
    work = Work("images", done=60, total=100, note="", first=40, began=100.0)
    assert work.seconds_left() == 60
    assert work.text() == "images: 60/100, 30 s so far, 1 min 00 s left"
    work.done = 40
    assert work.seconds_left() is None
    assert work.text() == "images: 40/100, 30 s so far"
    work.done, work.note = 100, "Dice 0.71"
    assert work.text() == "images: 100/100, 30 s so far, Dice 0.71"


def work_and_warn(show: Progress) -> None:
    show("rounds", 0, 2)
    show("rounds", 1, 2, "Dice 0.70")
    logging.getLogger("samfed").warning("a client drifts")


def test_warnings_have_lines_of_their_own_above_the_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(config: Any, progress: Progress) -> Any:
        work_and_warn(progress)
        raise SamfedError("the round failed")

    app, stderr = typer.Typer(), terminal(monkeypatch)
    command(app, params_file=False)(work)
    with log_kept():
        assert get_command(app).main([], standalone_mode=False) == SamfedError.exit_code
    text = SGR.sub("", stderr.getvalue())
    lines = [re.sub(r"\x1b\[\??\d*[A-Za-z]", "", part) for part in re.split(r"[\r\n]", text)]
    assert "WARNING: a client drifts" in lines
    assert "error: the round failed" in lines
    assert any("rounds" in line and "1/2" in line and "left Dice 0.70" in line for line in lines)


@pytest.mark.parametrize("no_color", ["", "1"])
def test_no_color_is_heeded(monkeypatch: pytest.MonkeyPatch, no_color: str) -> None:
    stderr = terminal(monkeypatch)
    monkeypatch.setenv("NO_COLOR", no_color)
    with console_progress() as show:
        work_and_warn(show)
    codes = {
        int(code or 0) for found in SGR.findall(stderr.getvalue()) for code in found.split(";")
    }
    colours = {code for code in codes if 30 <= code <= 49 or 90 <= code <= 107}
    assert bool(colours) == (not no_color)


def test_nothing_is_drawn_before_there_is_work(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = terminal(monkeypatch)
    with console_progress():
        assert stderr.getvalue() == ""


def test_where_nobody_watches_a_plain_line_comes_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline.progress, "LINE_EVERY_SECONDS", 0.01)
    seen = ""
    with console_progress() as show:
        show("unpacking", 3, 3)
        show("rounds", 1, 4)
        deadline = time.monotonic() + 20
        while "rounds" not in seen and time.monotonic() < deadline:
            time.sleep(0.01)
            seen += capsys.readouterr().err
    first = seen.splitlines()[0]
    assert re.fullmatch(r"rounds: 1/4, \d+ s so far", first)  # what is done is not shown


def test_short_work_leaves_stderr_empty(capsys: pytest.CaptureFixture[str]) -> None:
    with console_progress() as show:
        show("rounds", 1, 2)
    assert capsys.readouterr() == ("", "")


def test_json_lines_tell_the_first_and_the_last_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline.progress, "JSON_EVERY_SECONDS", 60)
    with console_progress(Style.JSON) as show:
        for done in range(6):
            show("rounds", done, 5)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["done"] for line in lines] == [0, 5]
    assert lines[0]["seconds_left"] is None
    assert lines[1]["seconds_left"] == 0
    assert {line["event"] for line in lines} == {"progress"}


def test_every_line_of_a_command_is_json_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # without settings, which is worth a line
    done = call("synth", tmp_path / "out", "--progress", "json", "--set", "synth.images_per_site=1")
    assert done.exit_code == 0
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert {line["event"] for line in lines} == {"info", "progress"}
    assert lines[-1]["what"] == "generating images"
    assert (lines[-1]["done"], lines[-1]["total"]) == (4, 4)
    failed = call("synth", tmp_path, "--progress", "json")
    assert failed.exit_code == 3
    assert json.loads(failed.stderr.splitlines()[-1])["event"] == "error"


def test_progress_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = terminal(monkeypatch)
    with console_progress(Style.NONE) as show:
        show("rounds", 1, 2)
    assert stderr.getvalue() == ""
