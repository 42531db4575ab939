"""One step of each rule: forward, Jacobian, the rule, gradients in `.grad`.

Rules of predictions and rules of gradients alike go by `engine.backward(output, rule)` on one
batch, beside a plain backward of the summed output, which is the unit. A new rule has its row by
its line in `posegrad.testing.table`. For clipping the peers are Opacus's two ways: all rows (flat),
and norms first, with a second backward (ghost). Errors: the gradient against that of the same rule
on rows by plain autograd in float64. The allocator matters as in `gramian.py`.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.cases import CASES, Problem
from benchmarks.environment import environment
from benchmarks.exact import Exact, Named, largest_difference
from benchmarks.opacus_hooks import clipped_flat, clipped_ghost, packed
from benchmarks.per_example import missing
from benchmarks.rounds import CLOCKS, Clock, interleaved, prepare
from benchmarks.side_by_side import Row
from posegrad import Clip, Engine
from posegrad.combination import Combination
from posegrad.testing.table import RULES
from posegrad.weighting import Weighting
from posegrad.weighting._rules import AnyRule

__all__ = ["NETWORKS", "run"]

NETWORKS = ("mlp-64", "conv-32", "encoder-16")
"""Of the cases of the suite `gramian` those that Opacus takes too."""

PLAIN = "plain"
PEERS: dict[str, Callable[[nn.Module, float], Callable[..., Named]]] = {
    "Opacus, flat clipping": clipped_flat,
    "Opacus, ghost clipping": clipped_ghost,
}


def run(
    cases: Sequence[str], *, rounds: int = 5, threads: int = 1, clock: str = "wall"
) -> dict[str, Any]:
    """Run the suite.

    Args:
        cases: Names out of `NETWORKS`.
        rounds: How often each rule is timed.
        threads: Threads of torch.
        clock: One of `CLOCKS`.

    Returns:
        What goes into the JSON file: environment, cases, and a row for each case and rule, with its
        raw seconds and its error.
    """
    prepare(threads)
    absent = missing()
    rows: list[Row] = []
    for case in tqdm(cases):
        problem = CASES[case].make(CASES[case].m)
        rows += [{"case": case, **row} for row in _of(problem, absent, rounds, CLOCKS[clock])]
    return {
        "suite": "rules",
        "rounds": rounds,
        "clock": clock,
        "environment": environment(),
        "missing": absent,
        "cases": [{"case": n, "text": CASES[n].text, "poses": CASES[n].m} for n in cases],
        "rows": rows,
    }


def _of(problem: Problem, absent: Mapping[str, str], rounds: int, now: Clock) -> list[Row]:
    exact = Exact.of(problem)
    norm = float(exact.gramian.diagonal().sqrt().median())  # clips half of the poses
    calls = {PLAIN: partial(_plain, copy.deepcopy(problem.network), problem.inputs)}
    errors: dict[str, float] = {}
    rules = {n: row.make() for n, row in RULES.items() if not row.components}
    rules["Clip(1)"] = Clip(norm)
    for name, rule in rules.items():
        network = copy.deepcopy(problem.network)
        calls[name] = partial(_ours, Engine(network), network, rule, problem.inputs)
        errors[name] = largest_difference(calls[name](), _expected(rule, problem, exact))
    for name, bind in PEERS.items() if "opacus" not in absent else ():
        calls[name] = partial(bind(copy.deepcopy(problem.network), norm), *problem.inputs)
        clipped = _expected(rules["Clip(1)"], problem, exact)
        errors[name] = largest_difference(packed(calls[name](), 0), clipped)
    found = interleaved(calls, rounds, now)
    return [
        {"rule": name, "seconds": seconds}
        | ({"gradient_error": errors[name]} if name in errors else {})
        for name, seconds in found.items()
    ]


def _plain(network: nn.Module, inputs: Sequence[Tensor]) -> None:
    network.zero_grad()
    network(*inputs).sum().backward()


def _ours(
    engine: Engine, network: nn.Module, rule: AnyRule, inputs: Sequence[Tensor]
) -> dict[str, Tensor]:
    network.zero_grad()
    engine.backward(network(*inputs).squeeze(1), rule)
    gradients = {name: p.grad for name, p in network.named_parameters()}
    return {name: gradient for name, gradient in gradients.items() if gradient is not None}


def _expected(rule: Any, problem: Problem, exact: Exact) -> dict[str, Tensor]:
    """The rule's gradient from exact rows, in the shapes of the parameters."""
    shapes = {name: p.shape for name, p in problem.network.named_parameters()}
    if isinstance(rule, Combination | Weighting):
        with torch.no_grad():
            y = copy.deepcopy(problem.network).double()(*_doubled(problem.inputs)).squeeze(1)
        weights = rule.weights(y) if isinstance(rule, Combination) else rule(exact.gramian, y)
        return {name: (weights @ rows).view(shapes[name]) for name, rows in exact.rows.items()}
    return {name: rule(rows).view(shapes[name]) for name, rows in exact.rows.items()}


def _doubled(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [x.double() if x.is_floating_point() else x for x in inputs]
