"""Imports point one way; the core needs torch alone; operators are named in their table.

Tests use public names, but for those of `BEHIND_THE_DOOR`.
"""

import ast
import sys
from collections.abc import Iterable
from pathlib import Path

import posegrad
from posegrad.graph._operators import OPERATORS

SRC = Path(posegrad.__file__).parent
ORDER = [
    "_torch", "_threads", "_restoring", "_warn", "errors", "ranks", "model", "combination",
    "weighting", "jacobian", "graph", "schedule", "engine", "multipose", "testing", "interop",
    "plot",
]  # fmt: skip
TESTS = Path(__file__).parent
BEHIND_THE_DOOR = {
    "_torch": "what torch may rename, one name after the other",
    "_threads.thread_state": "torch's own state, which an interrupt leaves alone",
    "graph._hearing": "how gradients are counted is seen in no result, as the slower way is right",
    "graph._inference": "counted: the backwards of one row that a reading takes",
    "graph._operators": "the table of operators, each row of which has a test",
    "graph._probes": "the probes, on numbers instead of a graph",
    "graph._pulled": "counted: backwards",
    "graph._reading": "made to fail, and counted: backwards",
    "graph._together": "from what size on networks are read so, which no test's is",
    "graph._trial": "counted: probes, of which there must be none",
    "graph._verify": "counted: comparisons with a plain backward",
    "graph._vjp": "counted: backwards",
    "jacobian._form": "what a closed form is given",
    "jacobian._joining": "what becomes of drawn parts, in combinations no network has",
    "jacobian._products": "what a closed form is given; inner products of any shape",
    "jacobian.layers._image_products": "each way that a size of image may take",
    "schedule._cost": "the choice of a schedule, a pure function of sizes that no test can have",
    "schedule._memory": "what is free on machines that are not here",
    "schedule._tiles": "the order of tiles, seen in no result",
    "schedule.recompute": "digits of accelerators",
}
"""What tests take from inside, by reason: no public name shows the same."""
FILES = sorted(
    path.relative_to(SRC) for path in SRC.rglob("*.py") if path.parent != SRC or path.stem in ORDER
)


def _imports(path: Path) -> set[str]:
    tree = ast.parse((SRC / path).read_text())  # SRC / path is path, if that is a whole one
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
    needs_others = ("interop", "plot")
    core = [
        path for path in SRC.rglob("*.py") if path.relative_to(SRC).parts[0] not in needs_others
    ]
    names = {name for path in core for name in _imports(path)}
    allowed = {"posegrad", "torch", "numpy", "hypothesis"}  # the last one in the strategies alone
    assert {name.split(".")[0] for name in names} <= allowed | set(sys.stdlib_module_names)
    assert not [name for name in names if name.startswith(("posegrad.plot", "posegrad.interop"))]


def test_operators_are_named_in_their_table_alone() -> None:
    others = [path for path in FILES if path != Path("graph/_operators.py")]
    offenders = {path: found for path in others if (found := _texts(path) & OPERATORS.keys())}
    assert not offenders


def _texts(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse((SRC / path).read_text()))
    return {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}


def test_a_class_is_abstract_or_final() -> None:
    classes = {
        f"{path}: {node.name}": node
        for path in FILES
        for node in ast.walk(ast.parse((SRC / path).read_text()))
        if isinstance(node, ast.ClassDef)
    }
    bases = {name for node in classes.values() for name in _names(node.bases)}
    offenders = [
        where
        for where, node in classes.items()
        if "final" not in _names(node.decorator_list)
        and node.name not in bases
        and not _names(node.bases) & {"ABC", "Protocol", "Enum"}
    ]
    assert not offenders


def _names(nodes: Iterable[ast.expr]) -> set[str]:
    return {ast.unparse(node).split("[")[0].split("(")[0].split(".")[-1] for node in nodes}


def test_tests_use_public_names() -> None:
    offenders = [
        f"{path.relative_to(TESTS)} imports {name}"
        for path in sorted(TESTS.rglob("*.py"))
        for name in _imports(path)
        if name.startswith("posegrad.") and "._" in name and not _is_behind_the_door(name)
    ]
    assert not offenders


def _is_behind_the_door(name: str) -> bool:
    return name.removeprefix("posegrad.").startswith((*BEHIND_THE_DOOR,))
