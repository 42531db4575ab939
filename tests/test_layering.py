"""Imports point one way, and a file holds one idea."""

import ast
from pathlib import Path

import pytest

import posegrad
from posegrad.graph._operators import OPERATORS

SRC = Path(posegrad.__file__).parent
ORDER = [
    "_torch", "_threads", "_restoring", "_warn", "errors", "ranks", "model", "combination",
    "weighting", "jacobian", "graph", "schedule", "engine", "multipose", "testing", "interop",
    "plot",
]  # fmt: skip
FILES = sorted(
    path.relative_to(SRC) for path in SRC.rglob("*.py") if path.parent != SRC or path.stem in ORDER
)


def _imports(path: Path) -> set[str]:
    tree = ast.parse((SRC / path).read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _room(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=str)
def test_rooms_import_only_what_lies_before_them(path: Path) -> None:
    own = ORDER.index(_room(path))
    rooms = {name.split(".")[1] for name in _imports(path) if name.startswith("posegrad.")}
    assert all(ORDER.index(room) <= own for room in rooms), rooms


def test_only_the_core_is_needed_to_import() -> None:
    core = [path for path in FILES if _room(path) not in ("interop", "plot")]
    outside = {name.split(".")[0] for path in core for name in _imports(path)}
    allowed = {"posegrad", "torch", "numpy", "hypothesis"}  # the last one in the strategies alone
    import sys

    assert outside <= allowed | set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_operators_are_named_in_their_table_alone(path: Path) -> None:
    nodes = ast.walk(ast.parse((SRC / path).read_text()))
    texts = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    assert path == Path("graph/_operators.py") or not texts & OPERATORS.keys()
