"""What one training step on one compound costs, four ways, measured side by side."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import peers
from examples.docked_poses.compounds import Compound
from examples.docked_poses.pignet import binding_energy, pretrained
from examples.docked_poses.precision import double_precision
from posegrad import Combination, Engine
from posegrad.testing import peak_live_bytes

__all__ = ["Cost", "measure"]

Predict = Callable[[nn.Module, Any], Tensor]
Step = Callable[[nn.Module, Predict, Sequence[Any], Combination, float], Tensor]


@dataclass(frozen=True)
class Cost:
    """What one way of taking a training step costs.

    Attributes:
        method: Whose way it is.
        seconds: CPU time of forward and backward of all poses, median over interleaved rounds.
        of_plain: The same as a ratio to plain autograd, median over rounds.
        peak_mib: Most memory held by tensors at once, beyond model and poses, MiB.
        gradient_error: Largest difference to plain autograd's gradient, relative to that
            gradient's largest entry, both in float64, for the four best poses by Vina's score.
    """

    method: str
    seconds: float
    of_plain: float
    peak_mib: float
    gradient_error: float


PLAIN = "plain autograd"
PEERS: dict[str, Step] = {
    PLAIN: peers.plain,
    "checkpoint per pose": peers.checkpoint,
    "mtenn's scheme": peers.mtenn_scheme,
}


def _posegrad(model: nn.Module, predict: Predict) -> Step:
    """A step with an engine made once, as in a training loop."""
    engine = Engine(model, predict=predict)

    def step(_: nn.Module, __: Predict, poses: Any, rule: Combination, target: float) -> Tensor:
        prediction, _per_pose = engine.combine(poses, rule)
        (prediction - target).square().backward()
        return prediction.detach()

    return step


def _steps(model: nn.Module) -> dict[str, Step]:
    return PEERS | {"posegrad": _posegrad(model, binding_energy)}


def measure(compound: Compound, rule: Combination, *, rounds: int = 3) -> list[Cost]:
    """Takes the same training step in each of four ways, pose by pose, on the current thread count.

    Args:
        compound: What to take the step on; all its poses.
        rule: How its poses are combined.
        rounds: How often each way is timed, in turns.
    """
    model = pretrained()
    steps = _steps(model)
    runs = (rounds + 2) * len(steps)
    with tqdm(total=runs, desc=f"Cost of {type(rule).__name__}", unit="step", leave=False) as bar:
        peaks = {}
        for method, step in steps.items():  # also warms up what is timed next
            with peak_live_bytes() as peak:
                _take(step, model, compound, rule)
            peaks[method] = peak.bytes / 2**20
            bar.update()
        times: dict[str, list[float]] = {method: [] for method in steps}
        for method in _in_turns(list(steps), rounds):
            start = time.process_time()
            _take(steps[method], model, compound, rule)
            times[method].append(time.process_time() - start)
            bar.update()
        errors = _gradient_errors(compound, rule, bar)
    return [
        Cost(m, statistics.median(times[m]), _ratio(times[m], times[PLAIN]), peaks[m], errors[m])
        for m in steps
    ]


def _in_turns(methods: list[str], rounds: int) -> Iterator[str]:
    """All methods each round, starting one later each time: none always follows the same one."""
    for i in range(rounds):
        yield from methods[i % len(methods) :] + methods[: i % len(methods)]


def _ratio(times: Sequence[float], plain: Sequence[float]) -> float:
    """Median of the ratios within a round: a clock that drifts between rounds cancels."""
    return statistics.median(t / p for t, p in zip(times, plain, strict=True))


def _take(step: Step, model: nn.Module, compound: Compound, rule: Combination) -> None:
    model.zero_grad()
    step(model, binding_energy, compound.poses, rule, compound.dg)


def _gradient_errors(compound: Compound, rule: Combination, bar: tqdm) -> dict[str, float]:
    gradients = {}
    with double_precision():
        model = pretrained().double()
        poses = [pose.clone().apply(_to_double) for pose in compound.top(4).poses]
        for method, step in _steps(model).items():
            model.zero_grad()
            step(model, binding_energy, poses, rule, compound.dg)
            gradients[method] = _flat_gradient(model)
            bar.update()
    reference = gradients[PLAIN]
    scale = reference.abs().max()
    return {m: float((g - reference).abs().max() / scale) for m, g in gradients.items()}


def _to_double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _flat_gradient(model: nn.Module) -> Tensor:
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(gradients)  # [n]
