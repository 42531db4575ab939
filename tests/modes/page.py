"""The table as a part of docs/support.md."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.modes.columns import MODES, REFUSED, Refused
from tests.modes.distributed import OUTCOMES
from tests.modes.overflow import OVERFLOW
from tests.modes.ways import COMBINE, JACOBIAN, WAYS

__all__ = ["PAGE", "page"]

PAGE = Path(__file__).parents[2] / "docs" / "support.md"

START, END = "<!-- made by `python -m tests.modes` -->\n", "<!-- until here -->"

Outcome = Refused | str


def page() -> str:
    """docs/support.md, with the table as it is now."""
    before, rest = PAGE.read_text(encoding="utf-8").split(START)
    return before + START + "\n".join(_lines()) + "\n" + END + rest.split(END, 1)[1]


def _rows() -> dict[str, tuple[str, Mapping[str, Outcome]]]:
    """Mode: what it is, and the outcome of each way."""
    rows: dict[str, tuple[str, Mapping[str, Outcome]]] = {}
    for name, mode in MODES.items():
        cells = {way: REFUSED.get((name, way), "exact") for way in WAYS}
        rows[name] = mode.what, cells
        if name == "GradScaler":
            rows["GradScaler, overflow"] = OVERFLOW, dict.fromkeys(WAYS, "exact")
    return rows | {name: ("", cells) for name, cells in OUTCOMES.items()}


def _lines() -> Iterator[str]:
    rows = _rows()
    errors = list(dict.fromkeys(c for _, cells in rows.values() for c in cells.values()))
    refused = [cell for cell in errors if isinstance(cell, Refused)]
    for title, ways in (
        ("`engine.combine` and `engine.embed`", COMBINE),
        ("The Jacobian", JACOBIAN),
    ):
        yield f"\n### {title}\n"
        yield "| mode | " + " | ".join(f"`{way}`" for way in ways) + " |"
        yield "|---" * (len(ways) + 1) + "|"
        for name, (_, cells) in rows.items():
            yield f"| {name} | " + " | ".join(_said(cells[w], refused) for w in ways) + " |"
    yield "\n### What the refusals say\n"
    for number, cell in enumerate(refused, 1):
        yield f"{number}. `{cell.error.__name__}`. {cell.instead}"
    yield "\n### What the modes are\n"
    yield from (f"- {name}: {what}" for name, (what, _) in rows.items() if what)


def _said(cell: Outcome, refused: list[Refused]) -> str:
    if isinstance(cell, str):
        return cell
    return f"`{cell.error.__name__}` ({refused.index(cell) + 1})"
