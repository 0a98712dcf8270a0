"""Every message that docs/troubleshooting.md explains is one that the program has."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROW = re.compile(r"^\| (?:`` (.+?) ``|`(.+?)`) \|", re.MULTILINE)
QUOTED = [
    one or other for one, other in ROW.findall((ROOT / "docs/troubleshooting.md").read_text())
]


def text_of(node: ast.expr) -> str:
    """The text of a string in the source, with an ellipsis for what differs."""
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(value) for value in node.values)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[.\d]*[sdfg]", "…", node.value).replace("%%", "%")
    return "…"


@cache
def messages() -> list[str]:
    def strings(path: Path) -> Iterator[str]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr | ast.Constant):
                yield text_of(node)

    files = [ROOT / "cli.py", *(ROOT / "pipeline").rglob("*.py")]
    return [text for path in files for text in strings(path)]


def test_messages_are_quoted() -> None:
    assert len(QUOTED) > 30


@pytest.mark.parametrize("quoted", QUOTED)
def test_the_program_says_what_is_quoted(quoted: str) -> None:
    assert any(quoted.strip("…") in message for message in messages())
