"""Imports point one way; the core needs torch alone; operators are named in their table."""

import ast
import sys
from pathlib import Path

import posegrad
from posegrad.graph._operators import OPERATORS

SRC = Path(posegrad.__file__).parent
ORDER = [
    "_torch", "_threads", "_restoring", "_warn", "errors", "ranks", "combination", "weighting",
    "jacobian", "graph", "schedule", "engine", "multipose", "testing", "interop", "plot",
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


def test_rooms_import_only_what_lies_before_them() -> None:
    offenders = [
        f"{path} imports {name}"
        for path in FILES
        for name in _imports(path)
        if name.startswith("posegrad.")
        and ORDER.index(name.split(".")[1]) > ORDER.index(_room(path))
    ]
    assert not offenders


def test_only_the_core_is_needed_to_import() -> None:
    core = [path for path in FILES if _room(path) not in ("interop", "plot")]
    outside = {name.split(".")[0] for path in core for name in _imports(path)}
    allowed = {"posegrad", "torch", "numpy", "hypothesis"}  # the last one in the strategies alone
    assert outside <= allowed | set(sys.stdlib_module_names)


def test_operators_are_named_in_their_table_alone() -> None:
    others = [path for path in FILES if path != Path("graph/_operators.py")]
    offenders = {path: found for path in others if (found := _texts(path) & OPERATORS.keys())}
    assert not offenders


def _texts(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse((SRC / path).read_text()))
    return {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
