"""The habits of CONTRIBUTING that a machine can check: sizes, and who may know whose names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODE = [
    ROOT / "cli.py",
    *sorted(
        path for room in ("pipeline", "tools", "benchmarks") for path in (ROOT / room).rglob("*.py")
    ),
]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
OUTSIDE = [*TESTS, *sorted((ROOT / "benchmarks").glob("*.py"))]

Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions(path: Path) -> Iterator[Function]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, Function):
            yield node


def parameters(function: Function) -> list[str]:
    """The names of a function's parameters, ``self`` and ``cls`` aside."""
    given = function.args
    every = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
    return [each.arg for each in every if each is not None and each.arg not in ("self", "cls")]


# --------------------------------------------------------------------------- sizes


def test_no_module_is_over_400_lines() -> None:
    long = {name_of(path): len(path.read_text().splitlines()) for path in CODE}
    assert {name: count for name, count in long.items() if count > 400} == {}


def test_no_function_is_over_50_lines() -> None:
    long = {
        f"{name_of(path)}: {function.name}": function.end_lineno - function.lineno + 1
        for path in CODE
        for function in functions(path)
        if function.end_lineno is not None
    }
    assert {name: count for name, count in long.items() if count > 50} == {}


def test_no_function_has_more_than_6_parameters() -> None:
    """Commands aside, whose parameters are the options that a user sees."""
    many = {
        f"{name_of(path)}: {function.name}": len(parameters(function))
        for path in CODE
        if path.name != "cli.py" and path.parent.name != "commands"  # options of commands
        for function in functions(path)
    }
    assert {name: count for name, count in many.items() if count > 6} == {}


# --------------------------------------------------------------------------- names


def test_no_test_file_imports_another() -> None:
    """What they share lies in ``conftest.py`` or in a module that holds no test."""
    imports = {
        f"{name_of(path)}: {module}"
        for path in TESTS
        for node in ast.walk(ast.parse(path.read_text()))
        for module in (
            [str(node.module)]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else re.findall(r"(?:from|import) (test_\w+)", node.value)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
            else []
        )
        if module.startswith("test_")
    }
    assert imports == set()


def test_no_two_modules_beside_the_package_have_one_name() -> None:
    """Tests, tools and benchmarks are imported by their bare names, within one process of tests."""
    names = [path.stem for path in [*OUTSIDE, *(ROOT / "tools").rglob("*.py")]]
    assert (
        sorted({name for name in names if names.count(name) > 1} - {"__init__", "conftest"}) == []
    )


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def definitions(tree: ast.AST) -> Iterator[str]:
    """Every name that a module defines: functions, classes, variables and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


@cache
def private_names() -> set[str]:
    """Every private name that a module of ``pipeline`` defines."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "pipeline").rglob("*.py")]
    return {name for tree in trees for name in definitions(tree) if private(name)}


def private_uses(tree: ast.AST) -> Iterator[str]:
    """Every private name of something else that a file uses, in strings too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names if private(alias.name))
        elif isinstance(node, ast.Attribute) and private(node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield node.attr
        elif isinstance(node, ast.Constant) and re.fullmatch(r"[\w.]+", str(node.value)):
            last = str(node.value).split(".")[-1]  # as monkeypatch and setattr are given it
            if private(last):
                yield last


@pytest.mark.parametrize("path", OUTSIDE, ids=name_of)
def test_tests_and_benchmarks_use_public_names(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert set(private_uses(tree)) & private_names() - set(definitions(tree)) == set()
