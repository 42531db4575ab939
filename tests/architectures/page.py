"""The table as a part of docs/support.md."""

from collections.abc import Iterator
from pathlib import Path

from tests.architectures import ARCHITECTURES, SECTIONS, Architecture

__all__ = ["PAGE", "page"]

PAGE = Path(__file__).parents[2] / "docs" / "support.md"

START, END = "<!-- made by `python -m tests.architectures` -->\n", "<!-- until here -->"


def page() -> str:
    """docs/support.md, with the tables as they are now."""
    before, rest = PAGE.read_text(encoding="utf-8").split(START)
    count = f"{len(ARCHITECTURES)} architectures, each a test.\n"
    return before + START + "\n".join([count, *_tables()]) + END + rest.split(END, 1)[1]


def _tables() -> Iterator[str]:
    for title, rows in SECTIONS.items():
        yield f"### {title}\n"
        yield "| model | outcome | remark |\n|---|---|---|"
        for name, row in rows.items():
            yield f"| {name} | {_said(row)} | {_remark(row)} |"
        yield ""


def _said(row: Architecture) -> str:
    return row.outcome.replace("-", ", ") if row.exact else f"`{row.outcome.__name__}`"


def _remark(row: Architecture) -> str:
    tests = [row.what, "warns" * row.warns, "check" * (row.exact and not row.dense)]
    return "; ".join(filter(None, tests))
