"""From a seed to a program, its engine and its steps; from a program to its text and model."""

import random
from dataclasses import dataclass

import torch
from torch import nn

from tests.fuzz.operators import BY_ROWS, COUPLING, OPERATORS, draw, ragged
from tests.fuzz.programs_draft import Draft
from tests.fuzz.programs_heads import head
from tests.fuzz.programs_names import MAGNITUDES
from tests.fuzz.programs_readings import AFTER, READINGS

__all__ = ["Program", "Step", "Text"]

DATA = ("plain", "plain", "plain", "twins", "one zero", "all zero", "one small", "one large")


@dataclass(frozen=True)
class Step:
    """One call of the program, and what is read of it."""

    seed: int
    count: int
    rows: int
    data: str
    magnitude: str
    training: bool
    frozen: float  # the share of parameters that is
    only: float  # the share of parameters that is asked for
    by_name: bool
    stated: bool
    readings: tuple[str, ...]
    after: tuple[str, ...]

    @property
    def keeps(self) -> bool:
        return bool(self.after) or self.seed % 3 == 0


@dataclass(frozen=True)
class Program:
    """Operators, each with the number its options are drawn by; an engine; steps."""

    seed: int
    operators: tuple[tuple[int, int], ...]  # kind: 0 usual, 1 rarely, 2 by rows
    is_ragged: bool
    may_mix: bool
    width: int
    check: str
    batch_dim: str
    steps: tuple[Step, ...]

    @classmethod
    def drawn(cls, seed: int) -> "Program":
        r = random.Random(seed)
        is_ragged, may_mix = r.random() < 0.12, r.random() < 0.1
        return cls(
            seed=seed,
            operators=tuple((i, r.randrange(10**9)) for i in range(r.randint(2, 5))),
            is_ragged=is_ragged,
            may_mix=may_mix and not is_ragged,
            width=r.randint(1, 4),
            check=r.choice(["first", "first", "always", "never"]),
            batch_dim=r.choice(["auto", "auto", "auto", "auto", "stated", "none"]),
            steps=tuple(_step(r) for _ in range(r.choice([2, 2, 3, 3, 4]))),
        )


def _step(r: random.Random) -> Step:
    return Step(
        seed=r.randrange(10**9),
        count=r.choice([1, 2, 3, 3, 3, 4, 5]),
        rows=r.choice([1, 2, 2, 3]),
        data=r.choice(DATA),
        magnitude=r.choice(["plain", "plain", *MAGNITUDES]),
        training=r.random() < 0.5,
        frozen=r.choice([0, 0, 0, 0.3, 0.6]),
        only=r.choice([1, 1, 1, 1, 0.5]),
        by_name=r.random() < 0.5,
        stated=r.random() < 0.5,
        readings=tuple(r.sample([*READINGS], r.randint(1, 3))),
        after=tuple(one for one in AFTER if r.random() < 0.35),
    )


@dataclass
class Text:
    """A program as Python."""

    draft: Draft
    batch: int | None

    @classmethod
    def of(cls, program: Program) -> "Text":
        d = Draft(program.width, program.may_mix)
        d.depth = 1
        if program.is_ragged:
            d.random = random.Random(program.seed)
            ragged(d)
        for position, seed in program.operators:
            d.random = random.Random(seed)
            table = OPERATORS
            if program.is_ragged:
                table = BY_ROWS
            elif program.may_mix and position == seed % len(program.operators):
                table = COUPLING
            draw(d, table)
        d.random = random.Random(program.seed + 1)
        batch = head(d)
        d.prune()
        return cls(d, None if d.mixes or d.regroups else batch)

    def __str__(self) -> str:
        lines = ["def program(p, x):", "    m = len(x)", *self.draft.lines, "    return y"]
        return "\n".join(lines)

    def model(self) -> nn.Module:
        model = nn.Module()
        for name, one in self.draft.parameters.items():
            generator = torch.Generator().manual_seed(one.seed)
            values = torch.randn(one.shape, generator=generator, dtype=torch.float64)
            model.register_parameter(name, nn.Parameter(one.centre + one.spread * values))
        torch.manual_seed(0)
        for name, text in self.draft.modules.items():
            model.add_module(name, eval(text, {"nn": nn}).double())
        return model
