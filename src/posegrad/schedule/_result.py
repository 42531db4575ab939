r"""From predictions and their pullback to a combined prediction, on one rank or on several.

Ranks that share a group see all m predictions :math:`\hat y`. Each scores its own poses and has a
loss :math:`L_r` of the combined prediction, usually the same. The gradient is that of the mean of
the losses over the R ranks, as in DistributedDataParallel:

.. math::
    w = \frac1R \sum_r \frac{\partial L_r}{\partial \hat y}, \qquad
    g = \sum_r \sum_{i \in r} w_i \frac{\partial \hat y_i}{\partial \theta} .

So the m numbers w are exchanged, and gradients of parameter size are summed once.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Self, final

import torch
from torch import Tensor

from posegrad._restoring import leaf_hooks_off
from posegrad._torch import in_fsdp_backward
from posegrad.combination import Combination
from posegrad.combination._base import outcome
from posegrad.errors import UnsupportedModuleError, UntrackedTensorError
from posegrad.graph import check_tracked, graph_clock
from posegrad.jacobian import wide
from posegrad.ranks import Ranks
from posegrad.schedule._attach import Gradients, Pullback, attach
from posegrad.schedule._inputs import Inputs
from posegrad.schedule._run import Run

__all__ = ["Combined", "attached", "combined"]


class _Fields(NamedTuple):
    prediction: Tensor
    per_pose: Tensor


@final
class Combined(_Fields):
    """What `Engine.combine` returns; all of it is differentiable.

    A tuple `(prediction, per_pose)`, followed by whatever else the rule returns.

    Args:
        prediction: The rule's combined prediction, `[...]`.
        per_pose: The predictions of the poses, `[m, ...]`.
        extra: What the rule returns beside the prediction.

    Example:
        >>> combined = Engine(nn.Linear(3, 1)).combine(torch.zeros(5, 3), Mean())
        >>> combined.prediction.shape, combined.per_pose.shape
        (torch.Size([]), torch.Size([5]))
        >>> lowest = lambda predictions: predictions.min(dim=0)  # a value and its index
        >>> combined = Engine(nn.Linear(3, 1)).combine(torch.zeros(5, 3), lowest)
        >>> combined.extra
        (tensor(0),)
    """

    def __new__(cls, prediction: Tensor, per_pose: Tensor, *extra: Tensor) -> Self:
        return tuple.__new__(cls, (prediction, per_pose, *extra))

    @classmethod
    def of(cls, found: object, per_pose: Tensor) -> Self:
        """Made of what a rule returned; raises as `outcome` does."""
        prediction, extra = outcome(found)
        return cls(prediction, per_pose, *extra)

    @property
    def extra(self) -> tuple[Tensor, ...]:
        """What the rule returned beside the combined prediction."""
        return tuple(self)[2:]

    def __repr__(self) -> str:
        extra = f", extra={self.extra}" if self.extra else ""
        return f"Combined(prediction={self.prediction}, per_pose={self.per_pose}{extra})"


def combined(
    run: Run,
    rule: Combination,
    predictions: Tensor,
    pullback: Pullback,
    saved: Gradients = (),
) -> Combined:
    """The rule's result for the predictions of all poses, differentiable.

    Args:
        run: Whose poses they are.
        rule: Differentiated by autograd, on a few numbers.
        predictions: `[m, ...]`, of all ranks.
        pullback: From the saved tensors and the cotangent `[m, ...]` of the predictions to the
            gradients of the run's inputs, for the poses of this rank.
        saved: What the pullback needs.
    """
    if run.ranks is None:
        (per_pose,) = attached(run, [predictions], pullback, saved)
        return Combined.of(rule(per_pose), per_pose)
    return _sealed(run, run.ranks, rule, predictions, pullback, saved)


def attached(
    run: Run, values: Sequence[Tensor], pullback: Pullback, saved: Gradients = ()
) -> tuple[Tensor, ...]:
    """Values as differentiable functions of a run's inputs, on one rank or several."""
    inputs, ranks = run.inputs, run.ranks
    if ranks is None:
        return attach(values, inputs, pullback, saved, run.reached)

    def shared(saved: Gradients, cotangents: Gradients) -> Gradients:
        means = _means(ranks, inputs, lambda: cotangents, values)
        return _summed(ranks, inputs, pullback, saved, means)

    return attach(values, inputs, shared, saved, run.reached)


def _sealed(
    run: Run,
    ranks: Ranks,
    rule: Combination,
    predictions: Tensor,
    pullback: Pullback,
    saved: Gradients,
) -> Combined:
    """As `combined`, but with the rule inside, so that its parameters' gradients are shared too."""
    inputs = run.inputs
    leaf = predictions.detach().requires_grad_()
    trained = [p for p in rule.parameters() if p.requires_grad]

    def applied() -> list[Tensor]:
        with torch.enable_grad(), graph_clock() as clock:
            prediction, extra = outcome(rule(leaf))
        found = [prediction, *extra]
        for tensor in found:
            used.update(_check_known(tensor, [leaf, *trained], clock))
        return found

    used: set[int] = set()
    outputs = run.apply(applied)
    numbers = inputs.joined(trained)
    own = zip(numbers, trained, strict=True)
    reached = run.reached | {number for number, p in own if id(p) in used}

    def through_rule(cotangents: Gradients) -> Gradients:
        *on_outputs, on_poses = cotangents
        reaching = [
            (output, cotangent)
            for output, cotangent in zip(outputs, on_outputs, strict=True)
            if cotangent is not None and output.requires_grad
        ]
        found: Gradients = [None] * (1 + len(trained))
        if reaching:
            with leaf_hooks_off(trained):  # they run once the gradient is summed over ranks
                found = torch.autograd.grad(
                    [output for output, _ in reaching],
                    [leaf, *trained],
                    [cotangent for _, cotangent in reaching],
                    retain_graph=True,
                    allow_unused=True,
                )
        return [_added(found[0], on_poses), *found[1:]]

    def shared(saved: Gradients, cotangents: Gradients) -> Gradients:
        weights, *of_rule = _means(
            ranks, inputs, lambda: through_rule(cotangents), [leaf, *trained]
        )
        gradients = _summed(ranks, inputs, pullback, saved, [weights])
        for number, gradient in zip(numbers, of_rule, strict=True):
            gradients[number] = _added(gradients[number], gradient)  # the model may have it too
        return gradients

    values = [*(output.detach() for output in outputs), leaf.detach()]
    prediction, *extra, per_pose = attach(values, inputs, shared, saved, reached)
    pairs = zip(extra, outputs[1:], strict=True)  # what the rule detached stays without a gradient
    return Combined(prediction, per_pose, *(a if o.requires_grad else o for a, o in pairs))


def _means(
    ranks: Ranks, inputs: Inputs, work: Callable[[], Gradients], like: Sequence[Tensor]
) -> list[Tensor | None]:
    """The means over ranks of a few small tensors; None where no rank has one."""

    def told() -> Gradients:
        inputs.freshness.check()
        _check_no_outer_backward(inputs)
        return [None if g is None else g.detach().cpu() for g in work()]

    means: list[Tensor | None] = []
    for tensor, each in zip(like, zip(*ranks.together("backward", told), strict=True), strict=True):
        present = [g for g in each if g is not None]
        if not present:
            means.append(None)
            continue
        mean = torch.stack([wide(g) for g in present]).sum(dim=0) / ranks.count
        means.append(mean.to(tensor.device, present[0].dtype))
    return means


def _check_no_outer_backward(inputs: Inputs) -> None:
    """Refuses a replay inside a backward of the sharded model itself, which FSDP2 cannot handle.

    Raises:
        UnsupportedModuleError: if such a backward is running.
    """
    if inputs.is_sharded() and in_fsdp_backward(inputs.modules):
        raise UnsupportedModuleError(
            "A backward of the sharded model itself is under way, and the poses would be "
            "differentiated inside it: FSDP2 would lose their gradients.\n"
            "Call backward() for that loss and for the combined prediction one after the other."
        )


def _summed(
    ranks: Ranks, inputs: Inputs, pullback: Pullback, saved: Gradients, cotangents: Gradients
) -> list[Tensor | None]:
    """The gradients of all ranks' poses; those of pose tensors are from this rank alone."""
    count = inputs.parameter_count
    gradients: list[Tensor | None] = []

    def work() -> list[bool]:
        gradients.extend(pullback(saved, cotangents))
        return [gradient is not None for gradient in gradients[:count]]

    has = ranks.together("differentiate poses", work)
    own, rest = gradients[:count], gradients[count:]
    gradients.clear()
    return [*ranks.sum(own, has, inputs.tensors[:count]), *rest]


def _added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a + b if a is not None and b is not None else a if b is None else b


def _check_known(prediction: Tensor, known: Sequence[Tensor], clock: int) -> set[int]:
    """Refuses a rule that depends on a tensor whose gradient would stay on this rank.

    Returns:
        The `id` of every leaf that the prediction depends on.
    """
    try:
        if prediction.requires_grad:
            return check_tracked(prediction, {id(t) for t in known}, clock).leaves
        return set()
    except UntrackedTensorError as error:
        error.add_note("It enters by the rule; there, make it a parameter of an nn.Module.")
        raise
