"""Pages of the site that nobody writes: commands, settings, and those that lie beside docs/.

A hook of MkDocs (mkdocs.yml): ``make docs`` builds the pages from the command line, the models of
the settings and the files at the root. None of them is committed.
"""

from __future__ import annotations

import inspect
import json
import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer.cli import get_docs_for_click

import cli
from pipeline.config import Config, Decides, Section
from pipeline.deciding import mark_of

ROOT = Path(__file__).resolve().parent.parent
#: Pages of the site that are files at the root.
BESIDE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}

_ANY = 2**31  # a limit so high is no advice

_COMMANDS = """\
# Commands

What `samfed COMMAND --help` says. Exit codes are in [Use samfed](../usage.md).

"""
_SETTINGS = """\
# Settings

The keys of `params.yaml`, which `--set section.key=value` overrides;
[Use samfed](../usage.md#settings) says where they come from. The last column says what another
value changes:

* *run*: the result of the rounds, so that a run of this name begins anew. With *first model* it
  also changes the network before round 1, which runs share. With *repetition* both runs still
  count as the same experiment.
* *labels*: the teacher, hence the labels, and with them the run.
* nothing: the value itself is never compared. What the settings of `data`, `synth` and `partition`
  decide is compared by the content of the partition and of the images.
"""
_TYPES = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "true or false",
    "null": "null",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages to those of docs/; MkDocs calls it by this name."""
    for name, content in pages().items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: object) -> str:
    """Make links of pages that a text calls by their place in the repository; MkDocs' name too."""
    folder = str(PurePosixPath(page.file.src_uri).parent)

    def link(found: re.Match[str]) -> str:
        return f"[{found[1]}]({posixpath.relpath(found[1], folder)})"

    lines = markdown.splitlines()
    return "\n".join(
        line if line.startswith("    ") else re.sub(r"`?docs/([\w/]+\.md)`?", link, line)
        for line in lines
    )


def pages() -> dict[str, str]:
    """Return the Markdown of each page by its place in the site."""
    beside = {page: (ROOT / name).read_text() for page, name in BESIDE.items()}
    for page, name in BESIDE.items():
        beside = {key: text.replace(f"]({name}", f"]({page}") for key, text in beside.items()}
    moved = {page: text.replace("](docs/", "](") for page, text in beside.items()}
    return moved | {"reference/commands.md": commands(), "reference/settings.md": settings()}


def commands() -> str:
    """Return every command with its arguments and options, from the command line itself."""
    command = typer.main.get_command(cli.app)
    context = typer.Context(command, info_name="samfed")
    text = get_docs_for_click(obj=command, ctx=context, name="samfed", indent=1)
    # each has a section of its own, with more than the first words of its help
    return _COMMANDS + re.sub(r"\*\*Commands\*\*:\n\n(?:\* .*\n)+\n", "", text)


def settings() -> str:
    """Return every setting with its type, range, default, meaning and what it decides."""
    schema = Config.model_json_schema()
    models = schema["$defs"]
    lines = [_SETTINGS, *_table(Config, schema, models)]
    for name, field in Config.model_fields.items():
        section = field.annotation
        if is_section(section):
            lines += ["", f"## {name}", "", inspect.cleandoc(str(section.__doc__)), ""]
            lines += _table(section, models[section.__name__], models)
    return "\n".join(lines) + "\n"


def is_section(annotation: Any) -> TypeGuard[type[Section]]:
    """Return whether a setting is a section of others."""
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _table(
    model: type[Section], schema: Mapping[str, Any], models: Mapping[str, Any]
) -> Iterator[str]:
    yield "| key | type | default | meaning | decides |"
    yield "|---|---|---|---|---|"
    meanings, defaults = descriptions(model), model().model_dump(mode="json")
    for key, field in model.model_fields.items():
        if not is_section(field.annotation):
            kind = " or ".join(_kinds(schema["properties"][key], models))
            mark = decision(mark_of(model, key))
            default = json.dumps(defaults[key])
            yield f"| `{key}` | {kind} | `{default}` | {meanings[key]} | {mark} |"


def descriptions(model: type[Section]) -> dict[str, str]:
    """Return the comment beside each field of a model, or above it, and of those it inherits."""
    found: dict[str, str] = {}
    for each in reversed(model.__mro__[: model.__mro__.index(Section)]):
        above: list[str] = []
        for line in inspect.getsource(each).splitlines():
            field = re.match(r"    (\w+): [^#]+?(?:  # (.*))?$", line)
            comment = re.match(r"    # (.*)", line)
            if field:
                found[field[1]] = " ".join([*above, *([field[2]] if field[2] else [])])
            above = [*above, comment[1]] if comment else []
    return {key: found[key].replace("|", "\\|").replace("<", "&lt;") for key in model.model_fields}


def decision(mark: Decides) -> str:
    """Return what a setting decides, in a word or two."""
    if not mark.run:
        return "labels" if mark.experiment else ""
    more = ("first model" if mark.first_model else "", "" if mark.experiment else "repetition")
    return ", ".join(["run", *filter(None, more)])


def _kinds(schema: Mapping[str, Any], models: Mapping[str, Any]) -> Iterator[str]:
    """Yield the types that a setting may have, each with its range."""
    if "anyOf" in schema:
        for each in schema["anyOf"]:
            yield from _kinds(each, models)
    elif "$ref" in schema:
        yield "keys of `model`"
    elif "enum" in schema:
        yield ", ".join(f"`{value}`" for value in schema["enum"])
    elif schema["type"] == "array":
        yield f"list of: {' or '.join(_kinds(schema['items'], models))}"
    else:
        kind = "path" if schema.get("format") == "path" else _TYPES[schema["type"]]
        yield " ".join([kind, *_range(schema)])


def _range(schema: Mapping[str, Any]) -> Iterator[str]:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{signs[key]} {schema[key]:g}" for key in signs if schema.get(key, _ANY) < _ANY]
    if "multipleOf" in schema:
        limits.append(f"in steps of {schema['multipleOf']}")
    if limits:
        yield ", ".join(limits)
