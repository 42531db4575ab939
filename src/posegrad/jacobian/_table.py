"""Tables of parameters: equal layers on one line, sizes in units that fit."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import final

__all__ = ["Line", "size", "table"]

_LAYERS = 4  # fewer equal layers are easier to read line by line


@final
@dataclass(frozen=True)
class Line:
    """What a table says about one parameter, or several that are alike.

    Args:
        name: Its dotted name; for several, with their numbers in braces.
        cells: The other columns.
        count: The number of parameters.
    """

    name: str
    cells: tuple[str, ...]
    count: int = 1


def size(count: float) -> str:
    """A number of bytes to three digits."""
    units = iter(("B", "KiB", "MiB", "GiB"))
    unit = next(units)
    for larger in units:
        if count < 999.5:
            break
        count, unit = count / 1024, larger
    return f"{count:.3g} {unit}" if count < 999.5 else f"{count:.0f} {unit}"


def table(header: Sequence[str], lines: Iterable[Line]) -> str:
    """Aligned columns; four or more lines that differ only in one number of the name become one."""
    rows = [tuple(header), *(_row(line) for line in _folded(list(lines)))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _row(line: Line) -> tuple[str, ...]:
    return (f"{line.name} (x {line.count})" if line.count > 1 else line.name, *line.cells)


def _folded(lines: list[Line]) -> list[Line]:
    """Folds the first number in the names, then the second, and so on; each fold is exact."""
    for place in range(max((line.name.count(".") for line in lines), default=0) + 1):
        groups: dict[object, list[Line]] = {}
        for line in lines:
            groups.setdefault(_alike(line, place), []).append(line)
        folded: list[Line] = []
        for line in lines:
            group = groups[_alike(line, place)]
            if len(group) < _LAYERS:
                folded.append(line)
            elif line is group[0]:
                folded.append(_joined(group, place))
        lines = folded
    return lines


def _alike(line: Line, place: int) -> tuple[object, ...]:
    """What lines must agree in to be folded: all but the number at one place of the name."""
    parts: list[str | None] = [*line.name.split(".")]
    if place < len(parts) and str(parts[place]).isdecimal():
        parts[place] = None
    return (*parts, line.cells, line.count)


def _joined(group: list[Line], place: int) -> Line:
    parts = group[0].name.split(".")
    parts[place] = _ranges([int(line.name.split(".")[place]) for line in group])
    return replace(group[0], name=".".join(parts), count=group[0].count * len(group))


def _ranges(numbers: list[int]) -> str:
    """Numbers in braces: {0-11}, {0-60 by 3}, {0-4,6-11}."""
    steps = {b - a for a, b in pairwise(numbers)}
    if len(steps) == 1 and (step := steps.pop()) > 1:
        return f"{{{numbers[0]}-{numbers[-1]} by {step}}}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ",".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs) + "}"
