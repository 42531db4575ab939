"""Inner products and projections of per-pose gradients by libraries for data attribution.

Both hook modules: layers whose parameters are used elsewhere, as those of torch's attention, go
unseen. Projections are theirs, so only time and memory can be compared.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Problem

__all__ = ["NEEDS", "bergson_projected", "dattri_met", "dattri_projected"]

NEEDS: Mapping[str, str] = {"dattri-llm": "dattri_llm", "bergson": "bergson"}
"""The package that each needs."""

SIDE = 16  # of a projection: 16 x 16 for each layer

Step = Callable[[], Tensor]


def dattri_met(network: nn.Module, problem: Problem, other: Problem) -> Step:
    """dattri-llm: the factors that its hooks hold of two batches, multiplied."""
    collect = _collector(network)

    def step() -> Tensor:
        first, second = collect(problem), collect(other)
        found: Tensor = first.similarity(second, reduce="all")
        return found

    return step


def dattri_projected(network: nn.Module, problem: Problem) -> Step:
    """dattri-llm: its factored projection of linear layers and kernels, a dense one of norms."""
    from dattri_llm.gradient.ops import DattriProjector

    collect, projector = _collector(network), DattriProjector(_signed)
    norms = {n for n, part in network.named_modules() if isinstance(part, nn.GroupNorm)}
    wishes = {"__default__": {"proj_dim": SIDE}}
    wishes |= {name: {"proj_dim": SIDE**2, "style": "dense"} for name in norms}

    def step() -> Tensor:
        found = collect(problem).project(projector, wishes, capture_style="materialized")
        total = torch.zeros(problem.m, SIDE**2)
        for own in found.data.values():
            total += own.flatten(1)
        return total

    return step


def _collector(network: nn.Module) -> Callable[[Problem], Any]:
    from dattri_llm import HookManager

    manager = HookManager(network)

    def collect(problem: Problem) -> Any:
        network.zero_grad()
        with manager.collect():
            network(*problem.inputs).sum().backward()
            return manager.get_gradient()

    return collect


def _signed(
    feature: Tensor, count: int, *, proj_dim: int, proj_seed: int = 0, **_: Any
) -> Callable[[Tensor], Tensor]:
    """Random signs, in the form that dattri's own projectors have."""
    signs = _signs(feature.shape[1], proj_dim, proj_seed)
    return lambda rows: rows @ signs.to(rows)


@cache
def _signs(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, 2, (rows, columns), generator=generator)
    return (2.0 * drawn - 1) / columns**0.5


def bergson_projected(network: nn.Module, problem: Problem) -> Step:
    """bergson: its double-sided projection of linear layers, biases with their weights."""
    from bergson import GradientProcessor
    from bergson.collector.collector import HookCollectorBase

    class Collector(HookCollectorBase):  # type: ignore[misc]
        """Keeps what its own collector would write to a disk."""

        def setup(self) -> None:
            self.found: dict[str, Tensor] = {}

        def teardown(self) -> None:
            pass

        def process_batch(self, indices: list[int], **_: Any) -> None:
            pass

        def backward_hook(self, module: Any, g: Tensor) -> None:
            self.found[module._name] = self._compute_gradient(module, g)

    processor = GradientProcessor(projection_dim=SIDE, include_bias=True)
    collector = Collector(network, processor=processor)
    (poses,) = problem.inputs
    tokens = poses.unsqueeze(1).requires_grad_()  # [m, 1, d]: its hooks want positions

    def step() -> Tensor:
        network.zero_grad()
        with collector.with_batch(None):
            network(tokens).sum().backward()
        total = torch.zeros(problem.m, SIDE**2)
        for own in collector.found.values():
            total += own
        return total

    return step
