"""The Jacobian as a linear operator: products with it, pairs of it, projections of it.

Each way runs the forward too. Time: the ratio to plain forward and backward of the summed output,
within a round. Errors: against rows by plain autograd in float64, in the same run.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from tqdm import tqdm

from benchmarks import operator_peers as peers
from benchmarks.cases import CASES, Problem, described
from benchmarks.rounds import interleaved
from benchmarks.settings import Row, Settings
from posegrad import Engine, Jacobian
from posegrad.jacobian._projection import Projection
from posegrad.testing import peak_live_bytes

__all__ = ["NAMES", "run"]

PLAIN = "plain"
WIDTH = 256  # of a projection: 16 x 16 for each layer
LEAST = 5.0  # seconds for a task on a case

Step = Callable[[], Tensor]
Bind = Callable[[nn.Module, Problem], Step]


def _direction(network: nn.Module) -> dict[str, Tensor]:
    """A direction of the parameters, always the same one."""
    generator = torch.Generator().manual_seed(2)
    return {
        name: torch.randn(p.shape, generator=generator).to(p.detach())
        for name, p in network.named_parameters()
    }


def _other(problem: Problem) -> Problem:
    """As many other poses."""
    generator = torch.Generator().manual_seed(3)
    inputs = tuple(torch.randn(x.shape, generator=generator).to(x) for x in problem.inputs)
    return replace(problem, inputs=inputs)


def _plain(network: nn.Module, problem: Problem) -> Step:
    parameters = list(network.parameters())
    return lambda: torch.autograd.grad(network(*problem.inputs).sum(), parameters)[0]


def _reader(network: nn.Module) -> Callable[[Problem], Jacobian]:
    engine = Engine(network)
    return lambda problem: engine.jacobian(network(*problem.inputs).squeeze(1))


def _rows(network: nn.Module) -> Callable[[Problem], dict[str, Tensor]]:
    """Rows by torch.func, `[m, ...]` by parameter."""
    parameters = {name: p.detach() for name, p in network.named_parameters()}

    def score(parameters: dict[str, Tensor], *pose: Tensor) -> Tensor:
        one = tuple(x.unsqueeze(0) for x in pose)
        y: Tensor = functional_call(network, parameters, one)
        return y.squeeze()

    def rows(problem: Problem) -> dict[str, Tensor]:
        places = (None, *[0] * len(problem.inputs))
        found: dict[str, Tensor] = vmap(grad(score), places, chunk_size=_AT_ONCE)(
            parameters, *problem.inputs
        )
        return found

    return rows


_AT_ONCE = 64  # poses; rows of more do not stay in a cache


def _along(network: nn.Module, problem: Problem) -> Step:
    read, direction = _reader(network), _direction(network)
    return lambda: read(problem) @ direction


def _along_rows(network: nn.Module, problem: Problem) -> Step:
    rows, direction = _rows(network), _direction(network)
    return lambda: _times(rows(problem), direction)


def _times(rows: Mapping[str, Tensor], direction: Mapping[str, Tensor]) -> Tensor:
    products = [rows[name].flatten(1) @ direction[name].flatten() for name in direction]
    return torch.stack(products).sum(0)


def _forward_mode(network: nn.Module, problem: Problem) -> Step:
    parameters = {name: p.detach() for name, p in network.named_parameters()}
    direction = _direction(network)

    def output(parameters: dict[str, Tensor]) -> Tensor:
        y: Tensor = functional_call(network, parameters, problem.inputs)
        return y.squeeze(1)

    def step() -> Tensor:
        moved: Tensor = jvp(output, (parameters,), (direction,))[1]
        return moved

    return step


def _met(network: nn.Module, problem: Problem) -> Step:
    read, other = _reader(network), _other(problem)
    return lambda: read(problem) @ read(other).T


def _gramians(network: nn.Module, problem: Problem) -> Step:
    """Not the same task, but the measure of it: the Gramian of each batch."""
    read, other = _reader(network), _other(problem)

    def step() -> Tensor:
        read(other).gramian()
        return read(problem).gramian()

    return step


def _met_rows(network: nn.Module, problem: Problem) -> Step:
    rows, other = _rows(network), _other(problem)
    return lambda: _products(rows(problem), rows(other))


def _products(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Tensor:
    """As in torch.func's own page on neural tangent kernels: contracted parameter by parameter."""
    return torch.stack(
        [torch.einsum("Nf,Mf->NM", first[n].flatten(1), second[n].flatten(1)) for n in first]
    ).sum(0)


def _met_by_dattri(network: nn.Module, problem: Problem) -> Step:
    return peers.dattri_met(network, problem, _other(problem))


def _kernel(network: nn.Module, problem: Problem) -> Step:
    engine = Engine(network, chunk_size=32)
    return lambda: engine.gramian(*problem.inputs)


def _kernel_rows(network: nn.Module, problem: Problem) -> Step:
    rows = _rows(network)

    def step() -> Tensor:
        found = rows(problem)
        return _products(found, found)

    return step


def _projected(network: nn.Module, problem: Problem) -> Step:
    read = _reader(network)
    return lambda: read(problem).project(WIDTH)


def _projected_rows(network: nn.Module, problem: Problem) -> Step:
    rows = _rows(network)
    return lambda: _all_projected(rows(problem))


def _all_projected(rows: Mapping[str, Tensor]) -> Tensor:
    each = (Projection(WIDTH, 0, name, own).of_rows(own).flatten(1) for name, own in rows.items())
    total = next(each)
    for projected in each:
        total += projected
    return total


@dataclass(frozen=True)
class _Task:
    """Something to find.

    Attributes:
        text: What, in words.
        cases: On which.
        exact: It, from rows in float64.
        ways: How.
        unfit: Why a way is not run on a kind of case.
        poses: How many, if not as many as the case has.
        is_random: Whether peers find something else, by random numbers of their own.
    """

    text: str
    cases: Sequence[str]
    exact: Callable[[Problem], Tensor]
    ways: Mapping[str, Bind]
    unfit: Mapping[tuple[str, str], str] = field(default_factory=dict)
    poses: int | None = None
    is_random: bool = False


_NO_ATTENTION = "does not see torch's attention"
_NO_FORWARD_MODE = "no forward mode for its attention on a CPU"
_OFTEN = ("mlp-64", "conv-32", "encoder-16")

TASKS: dict[str, _Task] = {
    "J @ v": _Task(
        "Forward, J v for a direction of all parameters",
        (*_OFTEN, "large-8"),
        lambda problem: _times(_exact(problem), _direction(problem.double().network)),
        {"posegrad": _along, "torch.func.jvp": _forward_mode, "vmap(grad)": _along_rows},
        {("torch.func.jvp", kind): _NO_FORWARD_MODE for kind in ("encoder", "large")},
    ),
    "J @ K.T": _Task(
        "Forwards, inner products of the per-pose gradients of two batches",
        _OFTEN,
        lambda problem: _products(_exact(problem), _exact(_other(problem))),
        {
            "posegrad": _met,
            "posegrad, two Gramians": _gramians,
            "vmap(grad)": _met_rows,
            "dattri-llm": _met_by_dattri,
        },
        {("dattri-llm", "encoder"): _NO_ATTENTION},
    ),
    "kernel": _Task(
        "Forwards, the neural tangent kernel of 512 images",
        ("conv-32",),
        lambda problem: _products(*[_exact(problem)] * 2),
        {"posegrad": _kernel, "vmap(grad)": _kernel_rows},
        poses=512,
    ),
    "projection": _Task(
        "Forward, random projections of the per-pose gradients, 16 x 16 for each layer",
        (*_OFTEN, "large-8"),
        lambda problem: _all_projected(_exact(problem)),
        {
            "posegrad": _projected,
            "vmap(grad)": _projected_rows,
            "dattri-llm": peers.dattri_projected,
            "bergson": peers.bergson_projected,
        },
        {
            **{(n, kind): _NO_ATTENTION for n in peers.NEEDS for kind in ("encoder", "large")},
            ("bergson", "convolutions"): "its hooks take [m, T, d] alone",
        },
        is_random=True,
    ),
}

NAMES = tuple(dict.fromkeys(case for task in TASKS.values() for case in task.cases))
"""The cases of the suite."""


def run(cases: Sequence[str], settings: Settings) -> dict[str, Any]:
    """Run the suite.

    Args:
        cases: Names out of `NAMES`.
        settings: How.

    Returns:
        What goes into the JSON file: one row for each case, task and method.
    """
    settings.prepare()
    rows: list[Row] = []
    for case in tqdm(cases):
        for task, what in TASKS.items():
            if case in what.cases:
                rows += [{"case": case, "task": task, **row} for row in _of(case, what, settings)]
    titles = {task: what.text for task, what in TASKS.items()}
    return settings.result("operator", rows, cases=described(cases), tasks=titles)


def _of(case: str, task: _Task, settings: Settings) -> Iterator[Row]:
    kind = CASES[case].kind
    problem = CASES[case].make(task.poses or CASES[case].m)
    steps: dict[str, Step] = {PLAIN: _plain(problem.network, problem)}
    for name, bind in task.ways.items():
        why = task.unfit.get((name, kind)) or _missing(name)
        if why is None:
            steps[name] = bind(copy.deepcopy(problem.network), problem)
        else:
            yield {"method": name, "unfit": why}
    found = {name: step() for name, step in steps.items() if name != PLAIN}
    live = {name: _live_mib(step) for name, step in steps.items()}
    exact = task.exact(problem)
    timed = interleaved(steps, settings.rounds, settings.stopwatch, least=LEAST)
    for name, seconds in timed.items():
        is_other = name not in found or "Gramians" in name
        is_other |= name in peers.NEEDS and task.is_random
        error = {} if is_other else {"error": float((found[name] - exact).norm() / exact.norm())}
        yield {"method": name, "seconds": seconds, "live_mib": live[name], **error}


def _missing(name: str) -> str | None:
    """Why a way cannot be run here, if its package is not installed."""
    package = peers.NEEDS.get(name)
    return None if package is None or find_spec(package) else "not installed"


def _live_mib(step: Step) -> float:
    """Bytes of the tensors that a call makes and holds at once, at most."""
    with peak_live_bytes() as peak:
        step()
    return peak.bytes / 2**20


def _exact(problem: Problem) -> dict[str, Tensor]:
    """Rows by plain autograd in float64, pose after pose."""
    double = problem.double()
    parameters = dict(double.network.named_parameters())
    each = []
    for i in range(len(double.inputs[0])):
        y = double.network(*(x[i : i + 1] for x in double.inputs)).squeeze()
        each.append(torch.autograd.grad(y, list(parameters.values())))
    columns = zip(*each, strict=True)
    return {name: torch.stack(own) for name, own in zip(parameters, columns, strict=True)}
