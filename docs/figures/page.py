"""Runs the code of a page, so that a figure shows what the page computes."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

__all__ = ["run", "save"]

HERE = Path(__file__).parent
PIECE = re.compile(
    r"^```python\n(.*?)^```|!\[[^\]]*\]\(figures/([^)]+)\)", re.DOTALL | re.MULTILINE
)


def run(page: str, at_figure: Callable[[str, dict[str, Any]], None]) -> None:
    """Executes the blocks of a page in order.

    Args:
        page: Its name in `docs/`.
        at_figure: Called where the page shows a figure, with its name and what was computed so far.
    """
    names: dict[str, Any] = {"__name__": page}
    for code, figure in PIECE.findall((HERE.parent / page).read_text(encoding="utf-8")):
        if figure:
            at_figure(figure, names)
        elif not code.startswith(">>>"):
            exec(compile(code, page, "exec"), names)


def save(figure: Figure, name: str) -> None:
    """Writes an SVG that is the same in every run."""
    with mpl.rc_context({"svg.fonttype": "path", "svg.hashsalt": "posegrad"}):
        figure.savefig(HERE / name, metadata={"Date": None}, facecolor="white")
