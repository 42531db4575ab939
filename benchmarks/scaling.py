"""How time and memory grow with the number of poses, and with the number of parameters.

Light poses (128 numbers each) and an MLP, so that nothing but the schemes grows. Poses are of one
size, so plain autograd may take all in one batch, and does, beside one by one. Memory: a fresh
process for each case. Gradients: against plain autograd in float64, where that fits.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.exact import gradients, largest_difference
from benchmarks.methods import METHODS, RULES, TARGET
from benchmarks.peers import PEERS, Rule
from benchmarks.rounds import interleaved
from benchmarks.settings import Memory, Row, Settings
from posegrad import Engine

__all__ = ["CASES", "MEMORY", "STEPS", "Case", "Step", "run"]

MEMORY = Memory("benchmarks.scaling_memory", ("case", "method"))

FEATURES = 128
CHUNK = 100
MEMORY_OF_GRAPHS = "4MiB"
LARGEST_FLOAT64 = 10**8  # parameters; beyond, a copy in float64 and its gradients want 16 GB
MOST_WORK = 3 * 10**9  # poses times parameters; beyond, one by one takes minutes a step

Step = Callable[[Tensor, Rule], object]


@dataclass(frozen=True)
class Case:
    """One point of a sweep.

    Attributes:
        sweep: What the sweep changes.
        poses: m.
        widths: Of the network's two hidden layers.
        rule: The name of a rule.
    """

    sweep: str
    poses: int
    widths: tuple[int, int]
    rule: str

    def network(self) -> nn.Module:
        """Always the same one."""
        torch.manual_seed(0)
        first, second = self.widths
        hidden = (nn.Linear(FEATURES, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU())
        return nn.Sequential(*hidden, nn.Linear(second, 1))

    def inputs(self) -> Tensor:
        """The poses `[m, 128]`."""
        return torch.randn(self.poses, FEATURES, generator=torch.Generator().manual_seed(1))

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        first, second = self.widths
        return (FEATURES + 1) * first + (first + 1) * second + second + 1


_POSES = (10, 100, 1000, 10_000)
_WIDTHS = ((1000, 800), (3200, 3000), (10_000, 9900), (23_000, 21_700))

CASES: dict[str, Case] = {
    **{
        f"{m} poses, {rule}": Case("poses", m, (1024, 512), rule)
        for m in _POSES
        for rule in ("Mean", "Min(1000)")
    },
    **{
        f"{case.parameters / 1e6:.0f} M parameters, {case.rule}": case
        for case in (Case("parameters", 4, widths, "Mean") for widths in _WIDTHS)
    },
}


def _one_by_one(name: str, network: nn.Module) -> Step:
    step = METHODS[name](network, lambda model, pose: model(pose).squeeze())
    return lambda poses, rule: step(list(poses), rule, TARGET)


def _one_batch(network: nn.Module) -> Step:
    def step(poses: Tensor, rule: Rule) -> None:
        (rule(network(poses).squeeze(1)) - TARGET).square().backward()

    return step


def _sliced(network: nn.Module, **options: Any) -> Step:
    def step(poses: Tensor, rule: Rule) -> None:
        prediction, _ = engine.combine(poses, rule)
        (prediction - TARGET).square().backward()

    engine = Engine(network, **options)
    return step


STEPS: dict[str, Callable[[nn.Module], Step]] = {
    "plain, one batch": _one_batch,
    "posegrad, one batch": _sliced,
    f"posegrad, {MEMORY_OF_GRAPHS}": partial(_sliced, memory=MEMORY_OF_GRAPHS),
    f"posegrad, {CHUNK} a chunk": partial(_sliced, chunk_size=CHUNK),
    "plain": partial(_one_by_one, "plain"),
    "checkpoint": partial(_one_by_one, "checkpoint"),
    "mtenn scheme": partial(_one_by_one, "mtenn scheme"),
    "two passes": partial(_one_by_one, "two passes"),
    "posegrad": partial(_one_by_one, "posegrad auto"),
}


def run(names: Sequence[str], settings: Settings) -> dict[str, Any]:
    """Run the suite.

    Args:
        names: Names out of `CASES`.
        settings: How.

    Returns:
        What goes into the JSON file: one row for each case and method.
    """
    settings.prepare()
    rows: list[Row] = []
    for name in tqdm(names):
        rows += [{"case": name, **row} for row in _of(CASES[name], settings)]
    return settings.result("scaling", rows)


def _of(case: Case, settings: Settings) -> list[Row]:
    network, poses = case.network().to(settings.device), case.inputs().to(settings.device)
    rows: dict[str, Row] = {}
    calls = {}
    expected = _expected(network, poses, case.rule) if case.parameters <= LARGEST_FLOAT64 else None
    for name, bind in STEPS.items():
        rows[name] = {"method": name, "sweep": case.sweep, "poses": case.poses, "rule": case.rule}
        rows[name]["parameters"] = case.parameters
        if name in PEERS and case.poses * case.parameters > MOST_WORK:
            rows[name]["unfit"] = "not run: minutes"
            continue
        # One network for all: none of these hangs anything on it, and several do not fit.
        calls[name] = partial(_call, bind(network), network, poses, case.rule)
        calls[name]()
        if expected is not None:
            rows[name]["gradient_error"] = largest_difference(gradients(network), expected)
    for name, seconds in interleaved(calls, settings.rounds, settings.stopwatch).items():
        rows[name]["seconds"] = seconds
    return list(rows.values())


def _call(step: Step, network: nn.Module, poses: Tensor, rule: str) -> None:
    network.zero_grad()
    step(poses, RULES[rule]())


def _expected(network: nn.Module, poses: Tensor, rule: str) -> dict[str, Tensor]:
    exact = copy.deepcopy(network).double()
    exact.zero_grad()
    _one_batch(exact)(poses.double(), RULES[rule]())
    return gradients(exact)
