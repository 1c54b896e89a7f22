"""Imports point one way, and the program starts without what only workers need."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "search_spaces": {"search_spaces"},
    "trainables": {"trainables", "search_spaces"},
    "dpt_search": {"dpt_search", "trainables", "search_spaces"},
}
FILES = [path.relative_to(ROOT) for package in ALLOWED for path in sorted((ROOT / package).rglob("*.py"))]
HEAVY = {"torch", "torchvision", "timm", "torch_npu"}
NAMES_AND_SETTINGS = [
    *("search_spaces", "search_spaces.plan", "search_spaces.ratios", "search_spaces.budgets", "search_spaces.costs"),
    *("trainables", "trainables.tasks", "trainables.settings", "trainables.locations", "trainables.devices"),
    *("trainables.intervals", "trainables.preflight"),
]
RAY_FILES = {"trainables/pruning_trial.py", "trainables/long_finetune.py", "trainables/train_requests.py"}


def imported(node: ast.AST) -> Iterator[str]:
    """Yield the modules that an import statement, or a call of import_module on a text, names."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
        yield from (argument.value for argument in node.args if isinstance(argument, ast.Constant))


def for_types_only(tree: ast.Module) -> set[int]:
    """Return the nodes under `if TYPE_CHECKING`, which do not run."""
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    return {id(inner) for block in blocks for statement in block.body for inner in ast.walk(statement)}


def imports_of(path: Path) -> set[str]:
    """Return all that a file imports when it runs, at module level and in functions."""
    tree = ast.parse((ROOT / path).read_text())
    skipped = for_types_only(tree)
    return {name for node in ast.walk(tree) if id(node) not in skipped for name in imported(node)}


def top(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def test_every_file_of_the_packages_is_looked_at():
    assert {path.parts[0] for path in FILES} == set(ALLOWED)
    assert len(FILES) > 40


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_one_way(path):
    ours = top(imports_of(path)) & {*ALLOWED, "tests", "examples", "benchmarks", "cluster"}
    assert ours <= ALLOWED[path.parts[0]]


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[0] == "dpt_search"], ids=str)
def test_the_driver_imports_no_torch_not_even_in_a_function(path):
    assert not top(imports_of(path)) & HEAVY
    assert not any(name.startswith("ray.train") for name in imports_of(path))


def test_few_files_of_the_workers_are_about_ray():
    others = [path for path in FILES if path.parts[0] != "dpt_search"]
    assert {str(path) for path in others if "ray" in top(imports_of(path))} == RAY_FILES


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[0] == "dpt_search"], ids=str)
def test_the_driver_knows_only_those_files_of_the_workers_that_need_no_torch(path):
    known = {name.split(".")[1] for name in imports_of(path) if name.startswith("trainables.")}
    lazily = {"export"} if path == Path("dpt_search/__init__.py") else set()
    assert known <= {"settings", "tasks", "locations", "devices", "intervals", "preflight", "pruning_trial"} | lazily


def loaded_after(code: str) -> set[str]:
    """Return the top-level modules that a fresh process has loaded after running `code`."""
    program = f"{code}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_names_and_settings_load_without_torch_and_ray():
    loaded = loaded_after("import " + ", ".join(NAMES_AND_SETTINGS))
    assert "search_spaces" in loaded
    assert not loaded & (HEAVY | {"ray"})


@pytest.mark.parametrize("module", ["dpt_search", "dpt_search.cli", "dpt_search.config", "dpt_search.report"])
def test_the_quick_verbs_load_without_torch_and_ray(module):
    loaded = loaded_after(f"import {module}")
    assert "dpt_search" in loaded
    assert not loaded & (HEAVY | {"ray"})


@pytest.mark.timeout(120)
def test_the_driver_of_a_search_loads_without_torch():
    modules = [".".join(path.with_suffix("").parts) for path in FILES if path.parts[0] == "dpt_search"]
    modules = [name for name in modules if not name.endswith(("__main__", "__init__"))]
    loaded = loaded_after(f"import {', '.join([*modules, 'trainables.pruning_trial'])}")
    assert "ray" in loaded
    assert not loaded & HEAVY
