"""Every differentiable operator of torch: its rows are exact, and most take one backward.

Poses are put along dimensions that keep them apart, and along dimensions that mix them.

`POSEGRAD_PROFILE=soak` looks at all samples and all dimensions.
"""

import os

import pytest
import torch

from tests.operators.coverage import examined, line
from tests.operators.network import Outcome
from tests.operators.page import PAGE, known_operators
from tests.operators.samples import LOOKED_AT, OPERATORS, SKIPPED

SOAK = os.environ.get("POSEGRAD_PROFILE") == "soak"
SAMPLES, PAIRS = (LOOKED_AT, None) if SOAK else (1, 1)

LEAST = 0.98  # of the pairs that keep poses apart, the share that takes one backward

BLOCKS = [list(OPERATORS)[start::12] for start in range(12)]

_found: dict[str, list[Outcome]] = {}


def _outcomes(names: list[str]) -> list[Outcome]:
    """What came of some operators; each is examined once."""
    for name in names:
        if name not in _found:
            _found[name] = list(examined(name, SAMPLES, PAIRS))
    return [outcome for name in names for outcome in _found[name]]


@pytest.mark.parametrize("names", BLOCKS, ids=[f"block {i}" for i in range(len(BLOCKS))])
def test_rows_around_an_operator_are_those_of_autograd(names: list[str]) -> None:
    outcomes = _outcomes(names)
    assert outcomes
    wrong = [line(o) for o in outcomes if o.reading.kind in ("wrong", "doubted")]
    assert not wrong, "\n".join(wrong)


def test_most_operators_that_keep_poses_apart_take_one_backward() -> None:
    outcomes = [o for o in _outcomes(list(OPERATORS)) if o.pair.keeps]
    fast = [o for o in outcomes if o.reading.is_fast]
    assert len(fast) >= LEAST * len(outcomes)


def test_the_page_shows_the_table_of_operators_and_all_of_torch_s_own() -> None:
    text = PAGE.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert not [line for line in known_operators() if line not in lines]
    if f"torch {torch.__version__.split('+')[0]}," in text:  # other releases have others
        assert not [name for name in OPERATORS if f"| {name} | " not in text]


def test_what_is_skipped_has_a_reason_and_most_is_not() -> None:
    assert all(SKIPPED.values())
    assert len(SKIPPED) < len(OPERATORS)
