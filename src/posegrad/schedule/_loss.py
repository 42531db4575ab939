"""A scalar whose backward is a rule's gradient, for whoever calls that backward."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor, nn

from posegrad._restoring import restoring
from posegrad._torch import keeps_graph
from posegrad.errors import UntrackedTensorError, listed
from posegrad.graph import EdgeRegistry, Gatherer, KeptGraph, Sinks, leaves_beside
from posegrad.jacobian import PoseJacobian, of_all, owned, wide
from posegrad.ranks import Ranks
from posegrad.schedule._attach import Gradients, attach
from posegrad.schedule._inputs import Inputs
from posegrad.weighting._base import GradientRule
from posegrad.weighting._rules import AnyRule, as_gradient_rule

__all__ = ["LossCall"]

OUTSIDE = ("sum", "error")

_FIRST_ORDER = (
    "A second derivative was asked of engine.loss(), whose gradient is a rule's, not that of a "
    "function.\n"
    "Call backward() without create_graph=True; add what needs it by a backward of its own."
)


@final
@dataclass(frozen=True)
class LossCall:
    """One call of `Engine.loss`.

    Args:
        losses: As there.
        rule: Likewise.
        outside: Likewise.
        gatherer: Reads the rows.
        parameters: All parameters of the engine's modules, by name.
        modules: All modules of the engine, also those inside others.
    """

    losses: Tensor
    rule: Tensor | AnyRule
    outside: str
    gatherer: Gatherer
    parameters: Mapping[str, nn.Parameter]
    modules: Sequence[nn.Module]
    _beside: list[Tensor] = field(default_factory=list)  # leaves, and the gradients of the sum
    _of_sum: list[Tensor] = field(default_factory=list)
    _graphs: list[EdgeRegistry] = field(default_factory=list)
    _rules: list[GradientRule] = field(default_factory=list)

    @restoring
    def value(self, trained: Callable[[], Mapping[str, Tensor]], ranks: Ranks | None) -> Tensor:
        """The scalar; without graph, where none is made."""
        if self.outside not in OUTSIDE:
            raise ValueError(f"outside={self.outside!r} is unknown; it is 'sum' or 'error'.")
        if not torch.is_grad_enabled():
            return self._mean()
        jacobian = of_all(self._read, trained, ranks)
        or_nan = any(graph.has_float16() for graph in self._graphs)
        own, weights, of_rule, of_rule_trained = jacobian.made_by(self._rules[0], or_nan=or_nan)
        losses = wide(jacobian.predictions)
        value = losses.mean() if weights is None else (weights.to(losses) * losses).sum()
        places: list[Tensor] = [self.parameters[name] for name in own]
        places += [of_rule_trained[name] for name in of_rule]
        places += self._beside
        gradients = owned(own) + owned(of_rule) + self._of_sum
        named: dict[str, Tensor] = {**self.parameters}
        named |= {f"{name} of the rule": p for name, p in of_rule_trained.items()}
        named |= {f"leaf {i} {_shown(leaf)}": leaf for i, leaf in enumerate(self._beside)}
        return self._attached(value, places, gradients, named)

    def _mean(self) -> Tensor:
        self.gatherer.graph_of(self.losses.detach())
        return wide(self.losses.detach()).mean()

    def _read(self, parameters: Mapping[str, Tensor]) -> PoseJacobian:
        """The rows of this process, and the gradient of what lies beside the engine."""
        rule = as_gradient_rule(self.rule)
        self._rules.append(rule)
        graph = self.gatherer.graph_of(self.losses)
        leaves: list[Tensor] = []
        if graph is not None:
            leaves = leaves_beside(graph, {id(p) for p in self.parameters.values()})
            self._graphs.append(graph)
        if leaves and (self.outside == "error" or rule.has_noise):
            raise UntrackedTensorError(_refused(leaves, has_noise=rule.has_noise))
        with Sinks(graph):
            jacobian = self.gatherer.gather(
                self.losses, parameters, keep_graph=True, registry=graph
            )
            if graph is not None and leaves:
                of_sum = self.gatherer.beside(self.losses, graph, leaves, parameters)
                pairs = zip(leaves, of_sum, strict=True)
                self._beside.extend(leaf for leaf, g in pairs if g is not None)
                self._of_sum.extend(g for g in of_sum if g is not None)
        return jacobian

    def _attached(
        self,
        value: Tensor,
        places: Sequence[Tensor],
        gradients: Sequence[Tensor],
        named: Mapping[str, Tensor],
    ) -> Tensor:
        """The value, with a backward that hands out gradients.

        Args:
            value: The value.
            places: Tensors.
            gradients: That of each, which the backward may write to.
            named: All tensors that may have one, by name.
        """
        inputs = Inputs(named, modules=self.modules, call="engine.loss()")
        known = {id(tensor): number for number, tensor in enumerate(inputs.tensors)}
        numbers = [known.get(id(tensor)) for tensor in places]  # None for one frozen since
        kept = [KeptGraph(graph) for graph in self._graphs]
        sinks = [Sinks(graph) for graph in self._graphs]

        def pullback(saved: Gradients, cotangents: Gradients) -> Gradients:
            (scale,) = cotangents
            if scale is None:
                return [None] * len(inputs.tensors)
            for sink in sinks:
                sink.pass_all()
            is_last = not keeps_graph()
            if is_last:
                for graph in kept:
                    graph.free_after_backward()
            scaled = [g for g in saved if g is not None]
            if not is_last:
                scaled = [g * scale.to(g.device) for g in scaled]
            elif scale.device.type != "cpu" or float(scale) != 1:  # most often it is 1
                scaled = [g.mul_(scale.to(g.device)) for g in scaled]
            return _by_number(numbers, scaled, inputs.tensors)

        reached = {number for number in numbers if number is not None}
        awaited = set[int]().union(*(sink.awaited for sink in sinks))
        reached |= {number for key, number in known.items() if key in awaited}
        (attached,) = attach([value], inputs, pullback, gradients, reached, _FIRST_ORDER)
        return attached


def _by_number(
    numbers: Sequence[int | None], gradients: Sequence[Tensor], tensors: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients in the order of the tensors that they are of; two of one tensor are added up."""
    found: list[Tensor | None] = [None] * len(tensors)
    for number, gradient in zip(numbers, gradients, strict=True):
        if number is not None:
            other = found[number]
            found[number] = gradient if other is None else other.to(gradient) + gradient
    pairs = zip(found, tensors, strict=True)
    return [None if g is None else g.to(t.device, t.dtype) for g, t in pairs]


def _shown(leaf: Tensor) -> str:
    return f"{type(leaf).__name__} {list(leaf.shape)}"


def _refused(leaves: Sequence[Tensor], *, has_noise: bool) -> str:
    found = listed([_shown(leaf) for leaf in leaves])
    if has_noise:
        return (
            f"The losses also depend on {len(leaves)} tensors that require grad and are no "
            f"parameters of the engine's modules: {found}.\n"
            f"They would get the plain gradient of the sum, neither clipped nor hidden by the "
            f"noise.\nPass all modules that are trained: Engine(trunk, head). Freeze or detach "
            f"the rest."
        )
    return (
        f"outside='error', and the losses depend on {len(leaves)} tensors that require grad and "
        f"are no parameters of the engine's modules: {found}.\n"
        f"The rule says nothing about them.\nPass their modules to the engine, freeze or detach "
        f"them, or let them have the gradient of losses.sum(): outside='sum'."
    )
