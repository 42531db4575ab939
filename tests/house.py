"""`python -m tests.house`: writes the map in docs/house.md from the docstrings of the source."""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.test_layering import ORDER, SRC

__all__ = ["PAGE", "page"]

PAGE = Path(__file__).parents[1] / "docs" / "house.md"
START, END = "<!-- made by `python -m tests.house` -->\n", "<!-- until here -->"


def page() -> str:
    """docs/house.md, with the map as it is now."""
    before, rest = PAGE.read_text(encoding="utf-8").split(START)
    return before + START + "\n".join(_lines()) + "\n" + END + rest.split(END)[1]


def _lines() -> Iterator[str]:
    yield "Imports point one way, and a test holds it:\n"
    yield " ← ".join(ORDER) + "\n"
    files = [SRC / f"{room}.py" for room in ORDER]
    yield from _table(path for path in files if path.exists())
    for room in ORDER:
        if (SRC / room).is_dir():
            yield from _room(SRC / room)


def _room(folder: Path) -> Iterator[str]:
    yield f"\n### {folder.relative_to(SRC).as_posix()}/\n"
    yield f"{_first_sentence(folder / '__init__.py')}\n"
    files = sorted(folder.glob("*.py"), key=lambda path: (path.name.startswith("_"), path.name))
    yield from _table(path for path in files if path.name != "__init__.py")
    for inner in sorted(path.parent for path in folder.glob("*/__init__.py")):
        yield from _room(inner)


def _table(files: Iterator[Path]) -> Iterator[str]:
    lines = [f"| `{path.name}` | {_first_sentence(path)} |" for path in files]
    if lines:
        yield "| file | what is in it |\n|---|---|"
        yield from lines


def _first_sentence(path: Path) -> str:
    """The first paragraph of a module's docstring."""
    found = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert found, f"{path} has no docstring"
    return " ".join(found.split("\n\n")[0].split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
