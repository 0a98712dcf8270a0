"""Every command in README and docs works as it stands there.

Each is parsed by the program that it calls, and each command of ``samfed`` is run in the docs'
order in a folder with tiny settings, but for those that ``NOT_RUN`` names with a reason.
"""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from click import Command, Context, Group
from conftest import cli, tiny_config, write_params
from forks import Forks

from pipeline.params import load_config

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    # the page for users goes through the stages in order; others name one or the other again
    ROOT / "docs" / "usage.md",
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page.name != "usage.md"),
]
PROGRAMS = "samfed|make|dvc|python"

NOT_RUN = {
    "make *": "makes the environment that this test runs in",
    "dvc *": "tests/test_dvc_repro.py runs it, on tiny data",
    "python *": "measures for minutes, or needs real data",
    "samfed --install-completion ": "changes the shell's own files",
    "samfed cache ": "a family of commands",
    "samfed demo *": "takes minutes; tests/results/test_demo.py runs it with tiny settings",
    "samfed * --params benchmarks/*": "needs real data and hours",
    "samfed * --set precompute.precision=int8 *": "needs a CPU with VNNI; test_fidelity.py runs it",
    "samfed * --workers *": "starts processes that import torch; tests/labelling/ runs it",
    "samfed precompute-sam --scheduler *": "needs dask's workers; tests/labelling/ runs it",
    "samfed federate --scheduler *": "needs dask's workers; tests/federation/ runs it",
    "samfed * --superlink *": "needs a SuperLink; tests/federation/test_flower.py runs it",
    "samfed prepare --s*": "needs a cache of its own; tests/federation/test_sites.py runs it",
    "samfed site doctor *": "needs a server; tests/setup/test_site_doctor.py runs it",
    "samfed * import *.samfed *": "needs a site's cache; tests/federation/test_sites.py runs it",
    "samfed export-onnx ": "takes a quarter of a minute; tests/sam/test_onnx.py runs it",
    "samfed precompute-sam --backend onnx ": "needs that model; tests/sam/test_onnx.py runs it",
    "samfed import *": "needs data sets; tests/data/importers/ lays out tiny ones and imports them",
    "samfed fetch ?*": "downloads; tests/data/test_fetching.py does from a local server",
}

# --------------------------------------------------------------------------- reading the docs


def commands(text: str) -> Iterator[str]:
    """Yield every command of a page, of its blocks and of its lines, in the page's order."""
    text = text.replace("\\\n", " ")
    found = {
        match.start(1): " ".join(match[1].split())
        for match in re.finditer(rf"`((?:{PROGRAMS}) [^`]+)`", text)
    }
    for match in re.finditer(rf"^ {{4,}}(?:do )?((?:{PROGRAMS}) (?!.*──).*)$", text, re.MULTILINE):
        found[match.start(1)] = whole(text, match.start(1))
    for _, line in sorted(found.items()):
        yield from (" ".join(part.split()) for part in line.split(" && "))


def whole(text: str, start: int) -> str:
    """Return the command that starts here, over as many lines as its quotes go, uncommented."""
    end = start
    while True:
        end = text.find("\n", end + 1)
        command = re.sub(r"\s+#.*", "", text[start:end])
        if command.count("'") % 2 == command.count('"') % 2 == 0:
            return command.removesuffix("; done")


def is_name_alone(command: str) -> bool:
    """Whether a command is only named, and would need more words to be run."""
    known: Any = typer.main.get_command(cli.app)
    named = known.commands.get(command.removeprefix("samfed "))
    return named is not None and any(parameter.required for parameter in named.params)


EVERY = dict.fromkeys(each for page in PAGES for each in commands(page.read_text()))
FOUND = [command for command in EVERY if not is_name_alone(command)]


def is_run(command: str) -> bool:
    if any(fnmatch(f"{command} ", pattern) for pattern in NOT_RUN):
        return False
    found, _, words = resolve(words_of(command)[1:])
    return bool(words) or not any(each.required for each in found.params)  # else just its name


def resolve(words: list[str]) -> tuple[Command, Context | None, list[str]]:
    """The command that the words name, where it is found, and the words for it."""
    command: Command = typer.main.get_command(cli.app)
    context: Context | None = None
    while isinstance(command, Group) and words and not words[0].startswith("-"):
        context = Context(command, parent=context, info_name=command.name)
        name, found, words = command.resolve_command(context, words)
        assert found is not None, name
        command = found
    return command, context, list(words)


def words_of(command: str) -> list[str]:
    """The words of a command; a shell's variables count as 0."""
    return shlex.split(re.sub(r"\$\{?\w+\}?", "0", command))


def test_commands_are_found() -> None:
    page = (
        "Say `samfed cache\nunlock --yes`, `samfed` or\n\n"
        "    . .venv/bin/activate\n"
        "    samfed a --set 'x=[1,\n      2]' # why\n"
        "    do samfed b \\\n      --seed $seed; done\n"
        "    samfed c && dvc repro  # both\n\nmake do with it\n"
        "    samfed d ──► a picture\n"
    )
    assert list(commands(page)) == [
        "samfed cache unlock --yes",
        "samfed a --set 'x=[1, 2]'",
        "samfed b --seed $seed",
        "samfed c",
        "dvc repro",
    ]
    assert len(FOUND) > 40


@pytest.mark.parametrize("pattern", NOT_RUN)
def test_what_is_not_run_is_in_the_docs(pattern: str) -> None:
    assert any(fnmatch(f"{command} ", pattern) for command in FOUND)


# --------------------------------------------------------------------------- parsed


def parse_samfed(words: list[str]) -> None:
    """Let the real command line read a command, without running it, and its settings."""
    command, context, words = resolve(words)
    if not words:
        return  # its name, as a sentence says it
    if isinstance(command, Group):
        # `samfed cache`, which is a family of commands, or an option of `samfed` itself
        assert set(words) <= {each for option in command.params for each in option.opts}
        return
    given = command.make_context(command.name, words, parent=context).params
    if "overrides" in given:
        params = ROOT / (given.get("params") or "params.yaml")
        load_config(params, tuple(given["overrides"] or ()))


def parse_make(words: list[str]) -> None:
    subprocess.run(["make", "--dry-run", *words], cwd=ROOT, check=True, capture_output=True)


def parse_dvc(words: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what DVC imports warns of itself
        from dvc.cli.parser import get_main_parser
    get_main_parser().parse_args(words)
    folder = ROOT
    if words[0] == "--cd":
        folder, words = ROOT / words[1], words[2:]
    stages = yaml.safe_load((folder / "dvc.yaml").read_text())["stages"]
    for stage in words[1:] if words[0] == "repro" else ():
        assert stage.partition("@")[0] in stages


class ParsedError(Exception):
    """Ends a script that has read its arguments."""


def parse_python(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Start a script and stop it once it has read its arguments."""
    parse = argparse.ArgumentParser.parse_args

    def stop(*given: Any, **named: Any) -> None:
        parse(*given, **named)
        raise ParsedError

    script = words[0]
    if script == "-m":
        module = words[1].replace(".", "/")
        places = (f"{module}/__main__.py", f"{module}.py")
        script = next(place for place in places if (ROOT / place).is_file())
    if "argparse" not in (ROOT / script).read_text():
        assert len(words) == 1 + (words[0] == "-m")  # it reads no arguments
        return
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", words[words[0] == "-m" :])
    monkeypatch.syspath_prepend((ROOT / script).parent)
    with pytest.raises(ParsedError):
        runpy.run_path(str(ROOT / script), run_name="__main__")


@pytest.mark.parametrize("command", FOUND)
def test_every_command_is_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *words = words_of(command)
    if program == "samfed":
        parse_samfed(words)
    elif program == "make":
        parse_make(words)
    elif program == "dvc":
        parse_dvc(words)
    else:
        parse_python(words, monkeypatch)


# --------------------------------------------------------------------------- run


def test_the_commands_run_in_the_docs_order(tmp_path: Path, forks: Forks) -> None:
    config = tiny_config(Path("data/synthetic"), Path("cache"), federate={"rounds": 1})
    write_params(tmp_path / "params.yaml", config)
    environment = os.environ | {"PATH": f"{forks.bin}{os.pathsep}{os.environ['PATH']}"}
    for command in filter(is_run, FOUND):
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    assert (tmp_path / "cache/runs/sam_fed/report.html").is_file()
