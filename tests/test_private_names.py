"""Names that torch does not promise to keep are used in `_torch.py` alone.

There rows stay exact when a release of torch lacks one: each is hidden here, one after the other.
"""

import ast
from collections.abc import Iterator, Set
from functools import cache
from pathlib import Path

import pytest
from torch import Tensor, nn
from torch.autograd.graph import Node

import posegrad

SRC = Path(posegrad.__file__).parent
COMPAT = Path("_torch.py")
FILES = sorted(p.relative_to(SRC) for p in SRC.rglob("*.py") if p.name != COMPAT.name)
READS_BY_NAME = {"getattr", "hasattr", "setattr", "delattr", "attrgetter", "methodcaller"}
NOT_OF_TORCH = {
    "_fields", "_replace",  # of named tuples
    "_getframe",  # of sys
    "_combine",  # of TorchJD
}  # fmt: skip


def foreign(source: str, inherited: Set[str] = frozenset()) -> Iterator[str]:
    """Names with a leading underscore that a file uses and does not define.

    Args:
        source: The text of the file.
        inherited: What classes of the library define, and `self` may have from them.
    """
    tree = ast.parse(source)
    own = set(_defined(tree))
    for node in ast.walk(tree):
        names: list[str] = []
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name):
                names = [] if name in inherited else [name]
            case ast.Attribute(attr=name):
                names = [name]
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=arguments):
                given = arguments if name in READS_BY_NAME else []
                names = [text for argument in given for text in _texts(argument)]
            case ast.Subscript(slice=key):
                names = [*_texts(key)]
            case ast.Import(names=aliases):
                names = [part for alias in aliases for part in alias.name.split(".")]
            case ast.ImportFrom(module=str(module), names=aliases):
                if not module.startswith("posegrad"):
                    names = [*module.split("."), *(alias.name for alias in aliases)]
        yield from (name for name in names if _is_private(name) and name not in own)


def _texts(argument: ast.AST) -> Iterator[str]:
    """The names in what `getattr` and the like are given, also in an f-string or a sum."""
    found = [node.value for node in ast.walk(argument) if isinstance(node, ast.Constant)]
    return (part for text in found if isinstance(text, str) for part in text.split("."))


def _defined(tree: ast.AST) -> Iterator[str]:
    """The functions, classes and attributes of `self` that a file defines."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                yield name
            case ast.AnnAssign(target=ast.Name(id=name)):  # a field of a dataclass
                yield name


def _is_private(name: str) -> bool:
    is_special = name.startswith("__") and name.endswith("__")
    return name.startswith("_") and not is_special and name not in NOT_OF_TORCH


@cache
def _inherited() -> Set[str]:
    found = {name for path in FILES for name in _defined(ast.parse((SRC / path).read_text()))}
    return found - {name for kind in (Tensor, nn.Module(), Node) for name in dir(kind)}


def test_no_other_file_uses_a_name_of_torch_s_own() -> None:
    texts = {path: (SRC / path).read_text() for path in FILES}
    found = {path: {*foreign(text, _inherited())} for path, text in texts.items()}
    assert not {path: names for path, names in found.items() if names}


@pytest.mark.parametrize(
    "line",
    [
        "x._version",
        "torch._C._set_grad_enabled(True)",
        "from torch._C import _InferenceMode",
        "from torch import _C",
        "import torch.utils._pytree",
        "getattr(x, '_backward_hooks', None)",
        "getattr(node, f'_saved_{name}')",
        "hasattr(node, '_saved_' + name)",
        "attrgetter('grad_fn._sequence_nr')",
        "operator.methodcaller('_sequence_nr')",
        "self._parameters",
        "vars(x)['_version']",
    ],
)
def test_such_a_name_is_found_however_it_is_written(line: str) -> None:
    assert [*foreign(line, _inherited())]
