"""A program in the making: lines of Python about one tensor, and the parameters they name."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

__all__ = ["Draft", "Kept", "Parameter"]

# How the tensor lies, beside `[m, T, f]`: m poses of T rows of f features. From that layout, and
# back to it; a tensor without rows comes from reductions alone.
LAYOUTS = {
    "m T f": ("", ""),
    "T m f": (".transpose(0, 1)", ".transpose(0, 1)"),
    "m f T": (".mT", ".mT"),
    "f m T": (".permute(2, 0, 1)", ".permute(1, 2, 0)"),
    "T f m": (".permute(1, 2, 0)", ".permute(2, 0, 1)"),
    "mT f": (".flatten(0, 1)", ".unflatten(0, (m, -1))"),
    "Tm f": (".transpose(0, 1).flatten(0, 1)", ".unflatten(0, (-1, m)).transpose(0, 1)"),
    "f mT": (".flatten(0, 1).t()", ".t().unflatten(0, (m, -1))"),
    "m 1 T f": (".unsqueeze(1)", ".squeeze(1)"),
    "1 mT f": (".flatten(0, 1)[None]", "[0].unflatten(0, (m, -1))"),
    "m f": ("", ".unsqueeze(1)"),
    "f m": ("", ".t().unsqueeze(1)"),
}


class Parameter(NamedTuple):
    """Shape and first values of a parameter."""

    shape: tuple[int, ...]
    centre: float
    spread: float
    seed: int


class Kept(NamedTuple):
    """An earlier value of the tensor that still has a name."""

    name: str
    layout: str
    width: int
    sizes: int


@dataclass
class Draft:
    """What is written so far.

    Args:
        width: The number f of features.
        may_mix: Whether poses may come to depend on each other.
    """

    width: int
    may_mix: bool
    layout: str = "m T f"
    lines: list[str] = field(default_factory=list)
    parameters: dict[str, Parameter] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    kept: list[Kept] = field(default_factory=list)
    sizes: int = 0  # grows when m or T change
    depth: int = 0
    single: bool = False  # whether float32 occurs
    cast: str = ""  # to the precision of the present lines
    mixes: bool = False
    regroups: bool = False  # whether rows may be in another order than they came in
    random: Random = field(default_factory=Random)
    names: int = 0

    def emit(self, *lines: str) -> None:
        self.lines += ["    " * self.depth + line for line in lines]

    def set(self, expression: str) -> None:
        self.emit(f"x = {expression}")

    @contextmanager
    def block(self, *opening: str) -> Iterator[None]:
        """Lines further in; names made there end with it."""
        before = len(self.kept)
        self.emit(*opening)
        self.depth += 1
        yield
        self.depth -= 1
        del self.kept[before:]

    def pick(self, *choices: str) -> str:
        return self.random.choice(choices)

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def name(self, letter: str) -> str:
        self.names += 1
        return f"{letter}{self.names}"

    def key(self) -> int:
        """Where a random constant of the text is drawn from."""
        return self.random.randrange(10**6)

    # -- the layout --------------------------------------------------------------------------

    @property
    def axes(self) -> list[str]:
        return self.layout.split()

    @property
    def ndim(self) -> int:
        return len(self.axes)

    @property
    def feature(self) -> int:
        return self.axes.index("f")

    @property
    def is_last(self) -> bool:
        return self.axes[-1] == "f"

    @property
    def rows(self) -> int | None:
        """The dimension of a pose's rows, if it is one by itself."""
        return self.axes.index("T") if "T" in self.axes else None

    def settle(self, layout: str = "m T f") -> None:
        """Brings the tensor into a layout that has rows."""
        if self.layout != layout:
            text = LAYOUTS[self.layout][1] + LAYOUTS[layout][0]
            self.set(f"x{text}")
            self.layout = layout

    def resized(self) -> None:
        self.sizes += 1

    # -- what a line can name ----------------------------------------------------------------

    def parameter(self, *shape: int, centre: float = 0.0, spread: float = 0.6) -> str:
        name = self.name("w")
        self.parameters[name] = Parameter(shape, centre, spread, self.key())
        return f"p.{name}{self.cast}"

    def tied(self, *shape: int) -> str | None:
        """A parameter of that shape that is used already."""
        text = "\n".join(self.lines)
        named = [name for name in self.parameters if f"p.{name}" in text]
        found = [name for name in named if self.parameters[name].shape == shape]
        return f"p.{self.random.choice(found)}{self.cast}" if found else None

    def module(self, text: str) -> str:
        name = self.name("n")
        self.modules[name] = text
        return f"p.{name}"

    def noise(self, *shape: int | str) -> str:
        return f"noise({self.key()}, {_listed(shape)}){self.cast}"

    def ints(self, high: int | str, *shape: int | str) -> str:
        return f"ints({self.key()}, {high}, {_listed(shape)})"

    def mask(self, *shape: int | str) -> str:
        return f"mask({self.key()}, {_listed(shape)})"

    def perm(self, count: int | str) -> str:
        return f"perm({self.key()}, {count})"

    def prune(self) -> None:
        """Drops what no line names; one parameter may stay, that nothing depends on."""
        words = set(re.findall(r"\bp\.(\w+)", "\n".join(self.lines)))
        spare = [name for name in self.parameters if name not in words][:1]
        self.parameters = {n: q for n, q in self.parameters.items() if n in {*words, *spare}}
        self.modules = {n: text for n, text in self.modules.items() if n in words}

    def along(self, text: str) -> str:
        """A vector `[f]`, shaped so that it meets the features."""
        behind = self.ndim - 1 - self.feature
        return text if not behind else f"({text}).view(-1{', 1' * behind})"


def _listed(shape: Sequence[int | str]) -> str:
    return ", ".join(map(str, shape))
