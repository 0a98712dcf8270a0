"""The site builds without a warning, and its pages say what is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from conftest import cli

from pipeline.config import Config
from tools import reference

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    """It takes two seconds: nothing else finds a link to an anchor that is not there."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    settings = (tmp_path / "reference/settings.html").read_text()
    assert '<a href="../method.html">method.md</a>' in settings  # its source says docs/method.md
    assert "fonts.g" not in (tmp_path / "index.html").read_text()  # nothing comes from elsewhere


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_of_the_repository(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    missing = [
        target
        for target in targets
        if not re.match(r"https?://", target) and not (page.parent / target).is_file()
    ]
    assert missing == []


def test_every_setting_has_a_meaning() -> None:
    for section in (Config, *(field.annotation for field in Config.model_fields.values())):
        if reference.is_section(section):
            meanings = reference.descriptions(section)
            own = {
                key
                for key, each in section.model_fields.items()
                if not reference.is_section(each.annotation)
            }
            assert {key for key in own if not meanings[key]} == set()


def test_a_setting_is_shown_with_its_type_range_default_and_mark() -> None:
    page = reference.settings().splitlines()
    assert (
        "| `rounds` | whole number > 0 | `15` | of local training and aggregation | run |" in page
    )
    (size,) = (line for line in page if line.startswith("| `image_size` |"))
    assert "| whole number ≥ 16, ≤ 2048, in steps of 16 | `64` |" in size
    assert size.endswith("| run, first model |")
    (variant,) = (line for line in page if line.startswith("| `variant` |"))
    assert variant.endswith("| labels |")
    (kept,) = (line for line in page if line.startswith("| `server_kept` |"))
    assert "| whole number > 0 or null | `null` |" in kept
    (audit,) = (line for line in page if line.startswith("| `audit` |"))
    assert audit.endswith("| run, repetition |")


def test_every_command_is_shown() -> None:
    def names(group: typer.core.TyperGroup, prefix: str) -> Iterator[str]:
        for name, command in group.commands.items():
            yield f"{prefix} {name}"
            if isinstance(command, typer.core.TyperGroup):
                yield from names(command, f"{prefix} {name}")

    page, group = reference.commands(), typer.main.get_command(cli.app)
    assert isinstance(group, typer.core.TyperGroup)
    assert {name for name in names(group, "samfed") if f"# `{name}`\n" not in page} == set()
    assert "* `--dry-run`: Only list." in page
