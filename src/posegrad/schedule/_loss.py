"""`Engine.loss`: a scalar whose backward hands out a rule's gradient."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import final

import torch
from torch import Tensor, nn

from posegrad._restoring import restoring
from posegrad._torch import keeps_graph
from posegrad.errors import UntrackedTensorError, listed
from posegrad.graph import Beside, EdgeRegistry, Gatherer, KeptGraph, Sinks, leaves_beside
from posegrad.jacobian import Gradient, Jacobian, PoseJacobian, of_all, owned, wide
from posegrad.ranks import Ranks
from posegrad.schedule._attach import Gradients, attach
from posegrad.schedule._inputs import Inputs
from posegrad.weighting._rules import AnyRule, as_gradient_rule, is_noise_alone

__all__ = ["LossCall"]

OUTSIDE = ("sum", "error")

_FIRST_ORDER = (
    "A second derivative was asked of engine.loss(), whose gradient is made by a rule and is not "
    "that of a function.\n"
    "Call backward() without create_graph=True; give what needs it a backward of its own."
)


@final
@dataclass
class LossCall:
    """One call of `Engine.loss`.

    Args:
        losses: As for `Engine.loss`.
        rule: As for `Engine.loss`.
        outside: As for `Engine.loss`.
        gatherer: Reads the rows.
        parameters: All parameters of the engine's modules, by name.
        modules: All modules of the engine, submodules included.
    """

    losses: Tensor
    rule: Tensor | AnyRule
    outside: str
    gatherer: Gatherer
    parameters: Mapping[str, nn.Parameter]
    modules: Sequence[nn.Module]
    _graph: EdgeRegistry | None = field(default=None, init=False)  # None on a rank without losses
    _beside: Beside = field(default_factory=Beside, init=False)

    @restoring
    def value(self, trained: Callable[[], Mapping[str, Tensor]], ranks: Ranks | None) -> Tensor:
        """The scalar; without a graph under no_grad."""
        if self.outside not in OUTSIDE:
            raise ValueError(f"outside={self.outside!r} is unknown; it is 'sum' or 'error'.")
        if not torch.is_grad_enabled():
            self.gatherer.graph_of(self.losses.detach())  # refuses losses that have no rows
            return wide(self.losses.detach()).mean()
        rule = as_gradient_rule(self.rule)
        if ranks is None and is_noise_alone(self.losses, rule):
            jacobian: Jacobian = PoseJacobian.empty(self.losses, trained())
        else:
            jacobian = of_all(partial(self._read, has_noise=rule.has_noise), trained, ranks)
        in_float16 = self._graph is not None and self._graph.has_float16()
        made = jacobian.consumed().made_by(rule, or_nan=in_float16)
        losses, weights = wide(jacobian.predictions), made.weights
        value = losses.mean() if weights is None else (weights.to(losses) * losses).sum()
        return self._attached(value, made)

    def _read(self, parameters: Mapping[str, Tensor], *, has_noise: bool) -> PoseJacobian:
        """The rows of this process, with the gradients of leaves outside the engine's modules."""
        self._graph = graph = self.gatherer.graph_of(self.losses)
        if graph is not None:
            self._beside.leaves = leaves_beside(graph, {id(p) for p in self.parameters.values()})
        if self._beside.leaves and (self.outside == "error" or has_noise):
            raise UntrackedTensorError(_refused(self._beside.leaves, has_noise=has_noise))
        return self.gatherer.read(
            self.losses, parameters, keep_graph=True, registry=graph, beside=self._beside
        )

    def _attached(self, value: Tensor, made: Gradient) -> Tensor:
        """The value, with a backward that hands out the gradients made."""
        pairs = zip(self._beside.leaves, self._beside.gradients or (), strict=False)
        outside = [(leaf, gradient) for leaf, gradient in pairs if gradient is not None]
        places: list[Tensor] = [self.parameters[name] for name in made.own]
        places += [made.trained[name] for name in made.of_rule]
        places += [leaf for leaf, _ in outside]
        gradients = owned(made.own)
        count = len(gradients)
        gradients += [*made.of_rule.values()] + [gradient for _, gradient in outside]
        named: dict[str, Tensor] = {**self.parameters}
        named |= {f"{name} of the rule": p for name, p in made.trained.items()}
        named |= {f"leaf {i} {_shown(leaf)}": leaf for i, (leaf, _) in enumerate(outside)}
        inputs = Inputs(named, modules=self.modules, call="engine.loss()")
        known = {id(tensor): number for number, tensor in enumerate(inputs.tensors)}
        numbers = [known.get(id(tensor)) for tensor in places]  # None for one frozen since
        sinks = Sinks(self._graph)
        kept = KeptGraph(self._graph)

        def pullback(saved: Gradients, cotangents: Gradients) -> Gradients:
            (scale,) = cotangents
            if scale is None:
                return [None] * len(inputs.tensors)
            sinks.pass_all()
            is_last = not keeps_graph()
            if is_last:
                kept.free_after_backward()
            found = [gradient for gradient in saved if gradient is not None]
            # In place only where nobody else holds it: autograd may use one tensor twice.
            scaled = _scaled(found[:count], scale, in_place=is_last)
            scaled += _scaled(found[count:], scale, in_place=False)
            return _by_number(numbers, scaled, inputs.tensors)

        reached = {number for number in numbers if number is not None}
        reached |= {number for key, number in known.items() if key in sinks.awaited}
        (attached,) = attach([value], inputs, pullback, gradients, reached, _FIRST_ORDER)
        return attached


def _scaled(gradients: Sequence[Tensor], scale: Tensor, *, in_place: bool) -> list[Tensor]:
    if not in_place:
        return [gradient * scale.to(gradient.device) for gradient in gradients]
    if scale.device.type == "cpu" and float(scale) == 1:  # the usual case
        return [*gradients]
    return [gradient.mul_(scale.to(gradient.device)) for gradient in gradients]


def _by_number(
    numbers: Sequence[int | None], gradients: Sequence[Tensor], tensors: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients in the order of their tensors; two gradients of one tensor are added."""
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
