"""Size is a design property: a newcomer reads the core in an hour."""

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("dpt_search", "trainables", "search_spaces")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
LONGEST_FILE, LONGEST_FUNCTION, MEDIAN_FUNCTION = 300, 50, 12

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(tree: ast.AST) -> Iterator[FUNCTION]:
    return (node for node in ast.walk(tree) if isinstance(node, FUNCTION))


def lines_of(function: FUNCTION) -> int:
    """Count a function's lines, its docstring left out: to explain is no fault."""
    assert function.end_lineno is not None
    text = function.body[0]
    is_docstring = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and ast.get_docstring(function)
    documented = text.end_lineno - text.lineno + 1 if is_docstring and text.end_lineno else 0
    return function.end_lineno - function.lineno + 1 - documented


def where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"


def calls_of(name: str, path: Path) -> list[str]:
    calls = (node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call))
    return [where(path, call) for call in calls if isinstance(call.func, ast.Name) and call.func.id == name]


def is_public(name: str) -> bool:
    return not name.startswith("_") or name == "__init__"


def test_there_is_something_to_look_at() -> None:
    assert len(FILES) > 30
    assert {path.parent.name for path in FILES} >= set(PACKAGES)


@every_file
def test_no_file_is_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE


@every_file
def test_no_function_is_long(path: Path) -> None:
    long = {f"{where(path, f)} {f.name}": lines_of(f) for f in functions(tree_of(path))}
    assert {name: lines for name, lines in long.items() if lines > LONGEST_FUNCTION} == {}


def test_most_functions_are_short() -> None:
    assert statistics.median(lines_of(f) for path in FILES for f in functions(tree_of(path))) < MEDIAN_FUNCTION


def test_every_file_is_named_by_what_it_is_about() -> None:
    assert [path for path in FILES if path.stem in ("utils", "util", "helpers", "common", "misc")] == []


@every_file
def test_no_file_asks_what_an_object_has(path: Path) -> None:
    assert calls_of("hasattr", path) == []


@every_file
def test_no_public_function_takes_whatever_it_is_given(path: Path) -> None:
    assert [where(path, f) for f in functions(tree_of(path)) if f.args.kwarg is not None and is_public(f.name)] == []


@every_file
def test_only_the_command_line_prints(path: Path) -> None:
    if path != ROOT / "dpt_search/cli.py":
        assert calls_of("print", path) == []
