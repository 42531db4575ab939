"""The table as a page of the docs."""

from collections.abc import Iterator
from pathlib import Path

from tests.architectures import ARCHITECTURES, SECTIONS, Architecture

__all__ = ["PAGE", "page"]

PAGE = Path(__file__).parents[2] / "docs" / "support.md"

_INTRO = """# What a Jacobian can be read off

Each of these {count} architectures is a test: on one engine, three steps with fresh data, compared
with one plain `torch.autograd.grad` for each number of the output. `python -m tests.architectures`
writes this page from the table of the tests.

- **exact, fast**: every parameter's rows come from a closed form, a product of what its operator
  saved and the gradient at its output.
- **exact, slow**: some rows take the operator's own backward once for each pose, or a backward
  through the whole graph.
- an **error** is raised before any `.grad` is touched.

"warns" means that the first gather says which modules are slow, and why. "check" marks models that
are tested with the default `check="first"` only; the others are exact with `check="never"` too.
"""


def page() -> str:
    """docs/support.md."""
    return "\n".join([_INTRO.format(count=len(ARCHITECTURES)), *_tables()])


def _tables() -> Iterator[str]:
    for title, rows in SECTIONS.items():
        yield f"## {title}\n"
        yield "| model | outcome | remark |\n|---|---|---|"
        for name, row in rows.items():
            yield f"| {name} | {_said(row)} | {_remark(row)} |"
        yield ""


def _said(row: Architecture) -> str:
    return row.outcome.replace("-", ", ") if row.exact else f"`{row.outcome.__name__}`"


def _remark(row: Architecture) -> str:
    tests = [row.what, "warns" * row.warns, "check" * (row.exact and not row.dense)]
    return "; ".join(filter(None, tests))
