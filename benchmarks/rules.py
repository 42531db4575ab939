"""One step of each rule: forward, Jacobian, the rule, gradients in `.grad`.

Rules of predictions and rules of gradients alike go by `engine.backward(output, rule)` on one
batch, beside a plain backward of the summed output, which is the unit. A new rule has its row by
its line in `posegrad.testing.table`. Errors: the gradient against that of the same rule on rows by
plain autograd in float64. The allocator matters as in `batches.py`.
"""

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.cases import CASES, Problem, described
from benchmarks.exact import Exact, gradients, largest_difference
from benchmarks.per_pose import PLAIN
from benchmarks.rounds import interleaved
from benchmarks.settings import Row, Settings
from posegrad import Clip, Engine
from posegrad.combination import Combination
from posegrad.testing.table import RULES
from posegrad.weighting import Weighting

__all__ = ["NETWORKS", "run"]

NETWORKS = ("mlp-64", "conv-32", "encoder-16")
"""Of the cases of the suite `gramian`."""


def run(cases: Sequence[str], settings: Settings) -> dict[str, Any]:
    """Run the suite.

    Args:
        cases: Names out of `NETWORKS`.
        settings: How.

    Returns:
        What goes into the JSON file: cases, and a row for each case and rule.
    """
    settings.prepare()
    rows: list[Row] = []
    for case in tqdm(cases):
        problem = CASES[case].make(CASES[case].m).to(settings.device)
        rows += [{"case": case, **row} for row in _of(problem, settings)]
    return settings.result("rules", rows, cases=described(cases))


def _of(problem: Problem, settings: Settings) -> list[Row]:
    exact = Exact.of(problem)
    calls = {PLAIN: partial(_plain, copy.deepcopy(problem.network), problem.inputs)}
    errors: dict[str, float] = {}
    rules = {n: row.make() for n, row in RULES.items() if not row.components}
    rules["Clip(1)"] = Clip(problem.max_norm)  # of the median norm
    for name, rule in rules.items():
        network = copy.deepcopy(problem.network)
        calls[name] = partial(_ours, Engine(network), network, rule, problem.inputs)
        errors[name] = largest_difference(calls[name](), _expected(rule, problem, exact))
    found = interleaved(calls, settings.rounds, settings.stopwatch)
    return [
        {"rule": name, "seconds": seconds}
        | ({"gradient_error": errors[name]} if name in errors else {})
        for name, seconds in found.items()
    ]


def _plain(network: nn.Module, inputs: Sequence[Tensor]) -> None:
    network.zero_grad()
    network(*inputs).sum().backward()


def _ours(
    engine: Engine, network: nn.Module, rule: Any, inputs: Sequence[Tensor]
) -> dict[str, Tensor]:
    network.zero_grad()
    engine.backward(network(*inputs).squeeze(1), rule)
    return gradients(network)


def _expected(rule: Any, problem: Problem, exact: Exact) -> dict[str, Tensor]:
    """The rule's gradient from exact rows, in the shapes of the parameters."""
    shapes = {name: p.shape for name, p in problem.network.named_parameters()}
    if isinstance(rule, Combination | Weighting):
        double = problem.double()
        with torch.no_grad():
            y = double.network(*double.inputs).squeeze(1)
        weights = rule.weights(y) if isinstance(rule, Combination) else rule(exact.gramian, y)
        return {name: (weights @ rows).view(shapes[name]) for name, rows in exact.rows.items()}
    return {name: rule(rows).view(shapes[name]) for name, rows in exact.rows.items()}
