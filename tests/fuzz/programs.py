"""Programs nobody thought of: drawn from a table of operators, run, read, and compared.

A seed is a program, its data and all that is asked of one engine, in several steps.
`python -m tests.fuzz.programs 0 1000` runs a thousand and prints what failed;
`python -m tests.fuzz.programs 17` prints the text of one, and the least of it that fails.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from tests.fuzz.programs_drawn import Program, Text
from tests.fuzz.programs_run import Failure, Run, Tally

__all__ = ["describe", "failures", "shrunk"]


def failures(seed: int, tally: Tally | None = None) -> list[Failure]:
    """What fails in the program of a seed; the first step that fails is the last."""
    return Run(Program.drawn(seed), Tally() if tally is None else tally).all()


def describe(program: Program | int) -> str:
    """The program as text that can be run, with the parameters' shapes and the steps."""
    program = Program.drawn(program) if isinstance(program, int) else program
    text = Text.of(program)
    shapes = [f"# p.{n}: {list(one.shape)}" for n, one in text.draft.parameters.items()]
    modules = [f"# p.{n}: {made}" for n, made in text.draft.modules.items()]
    engine = f"# Engine(p, check={program.check!r}, batch_dim={program.batch_dim})"
    steps = [f"# {step}" for step in program.steps]
    return "\n".join(
        [*shapes, *modules, engine, f"# x: [m, T, {program.width}]", *steps, str(text)]
    )


def shrunk(seed: int) -> Program:
    """The least of a program that fails in the same way: fewer operators, steps, readings."""
    program = Program.drawn(seed)
    kind = failures(seed)[0].kind
    shrinking = True
    while shrinking:
        shrinking = False
        for smaller in _smaller(program):
            try:
                found = Run(smaller, Tally()).all()
            except Exception:
                continue
            if smaller != program and found and found[0].kind == kind:
                program, shrinking = smaller, True
                break
    return program


def _smaller(program: Program) -> Iterator[Program]:
    """Programs with one thing less."""
    for steps in _shorter(program.steps):
        if steps:
            yield replace(program, steps=steps)
    for operators in _shorter(program.operators):
        yield replace(program, operators=operators)
    for i, step in enumerate(program.steps):
        easier = [replace(step, **{n: v}) for n, v in PLAIN.items() if getattr(step, n) != v]
        easier += [replace(step, readings=some) for some in _shorter(step.readings) if some]
        for one in easier:
            yield replace(program, steps=(*program.steps[:i], one, *program.steps[i + 1 :]))
    if (program.check, program.batch_dim) != ("first", "auto"):
        yield replace(program, check="first")
        yield replace(program, batch_dim="auto")


PLAIN: dict[str, Any] = {
    "data": "plain",
    "magnitude": "plain",
    "frozen": 0,
    "only": 1,
    "after": (),
    "training": False,
    "stated": False,
    "rows": 1,
    "count": 2,
}


def _shorter(items: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    return (items[:i] + items[i + 1 :] for i in range(len(items)))


def main(first: int, last: int | None) -> None:
    if last is None:
        program = shrunk(first) if failures(first) else Program.drawn(first)
        print(describe(program), *Run(program, Tally()).all(), sep="\n")
        return
    tally = Tally()
    for seed in range(first, last):
        for failure in failures(seed, tally)[:1]:
            print(failure, flush=True)
    print(*tally.invalid.most_common(), sep="\n")
    print(tally)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
