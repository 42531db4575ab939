"""Drawn programs: what is heard of them is what autograd says row by row, or refused by name."""

import warnings

import pytest
import torch
from torch import Tensor

from posegrad.errors import PosegradError
from tests.fuzz.programs import describe
from tests.fuzz.programs_drawn import Program
from tests.fuzz.programs_oracle import Rows, row_norms
from tests.fuzz.programs_run import Run, Tally

BLOCKS, SIZE = 2, 40

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch's, on programs that nobody would write


@pytest.mark.parametrize("block", range(BLOCKS))
def test_drawn_programs_are_heard_as_autograd_reads_them(block: int) -> None:
    found = [_heard(seed) for seed in range(block * SIZE, (block + 1) * SIZE)]
    assert sum(found) > SIZE / 3  # the others are refused, or torch refuses them


# Backwards for rows of computed tensors passed hooks, once.
@pytest.mark.parametrize("seed", [155, 329, 473])
def test_programs_that_were_misheard_once_are_heard(seed: int) -> None:
    assert _heard(seed)


def _heard(seed: int) -> int:
    """How many steps of a program were heard, each compared."""
    program, count = Program.drawn(seed), 0
    run = Run(program, Tally())
    for number, step in enumerate(program.steps):
        try:
            output, _ = run.output(run.model, step)
            parameters = {n: p for n, p in run.model.named_parameters() if p.requires_grad}
            expected = Rows.of(output, parameters)
        except Exception:
            return count  # torch refuses it
        count += _is_heard(run, output, expected, seed + number)
    return count


def _is_heard(run: Run, output: Tensor, expected: Rows, seed: int) -> bool:
    drawn = torch.rand(output.shape, generator=torch.Generator().manual_seed(seed))
    weights = (drawn - 0.3).to(output)  # of both signs
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            heard = run.engine.listen(output)
    except PosegradError:
        return False
    plain = _gradients(run, output, weights, keep=True)
    with heard:
        found = _gradients(run, output, weights)
    for one, other in zip(found, plain, strict=True):
        assert (one is None) == (other is None), describe(seed)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)

    fine = expected.finite
    slack = expected.slack(run.tolerance)
    widths = [block.shape[1] for block in expected.blocks.values()]
    parts = heard.jacobian.matrix().double().split(widths, 1)
    for (name, block), part in zip(expected.blocks.items(), parts, strict=True):
        error = row_norms((part - block)[fine])
        floor = 1e-12 * float(weights.abs().max())  # gradients that are nothing but rounding
        assert bool((error <= 30 * slack[name][fine] + floor).all()), f"{name}\n{describe(seed)}"
    return True


def _gradients(
    run: Run, output: Tensor, weights: Tensor, *, keep: bool = False
) -> list[Tensor | None]:
    output.backward(weights.clone(), retain_graph=keep)
    found = [None if p.grad is None else p.grad.to_dense() for p in run.model.parameters()]
    for p in run.model.parameters():
        p.grad = None
    return found
