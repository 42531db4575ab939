"""What others do to train on several poses of one compound, in as few lines as each allows.

Every peer is a function `step(model, predict, poses, rule, target)`: it scores the poses, combines
the scores by `rule`, takes the squared error of the combined prediction against `target`, and adds
its gradient to the parameters' `.grad`. All return the combined prediction, detached.
`predict(model, pose)` scores one pose, `[]` or `[1]`, or, where what is iterated over are chunks of
c joined poses, all of these, `[c]`; `rule` takes predictions `[m]` to `[]`.

All are exact, so their gradients agree up to rounding: they differ in time and memory only.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

__all__ = ["PEERS", "Predict", "Rule", "Step", "checkpoint", "mtenn_scheme", "plain", "two_pass"]

Predict = Callable[[nn.Module, Any], Tensor]
Rule = Callable[[Tensor], Tensor]
Step = Callable[[nn.Module, Predict, Sequence[Any], Rule, float], Tensor]


def plain(
    model: nn.Module, predict: Predict, poses: Sequence[Any], rule: Rule, target: float
) -> Tensor:
    """Plain autograd: the graphs of all poses are alive until the one backward."""
    predictions = torch.cat([predict(model, pose).reshape(-1) for pose in poses])  # [m]
    prediction = rule(predictions)
    _loss(prediction, target).backward()
    return prediction.detach()


def checkpoint(
    model: nn.Module, predict: Predict, poses: Sequence[Any], rule: Rule, target: float
) -> Tensor:
    """`torch.utils.checkpoint` around each pose: one line changed, every pose run twice."""
    run = partial(torch.utils.checkpoint.checkpoint, predict, model, use_reentrant=False)
    predictions = torch.cat([run(pose).reshape(-1) for pose in poses])  # [m]
    prediction = rule(predictions)
    _loss(prediction, target).backward()
    return prediction.detach()


def mtenn_scheme(
    model: nn.Module, predict: Predict, poses: Sequence[Any], rule: Rule, target: float
) -> Tensor:
    """Differentiate each pose at once, store its gradient, weight later: mtenn's documented scheme.

    mtenn itself is not on PyPI. This is its scheme written anew, in a form that favours it: any
    rule instead of two, gradients are accumulated instead of lost, parameters without gradient are
    skipped instead of an error, and the weighted sum makes no temporary.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    predictions, rows = [], []
    for pose in poses:
        prediction = predict(model, pose).squeeze()
        rows.append(torch.autograd.grad(prediction, parameters, allow_unused=True))
        predictions.append(prediction.detach())
    prediction, weights = _weights(torch.stack(predictions), rule, target)

    for weight, row in zip(weights.tolist(), rows, strict=True):
        for parameter, gradient in zip(parameters, row, strict=True):
            if gradient is not None:
                _accumulate(parameter, gradient, weight)
    return prediction


def two_pass(
    model: nn.Module, predict: Predict, poses: Sequence[Any], rule: Rule, target: float
) -> Tensor:
    """GradCache's two passes: predictions without graphs, then each pose again with its weight.

    The random state of each pose's first run is restored for its second (CPU generator only), else
    dropout makes the gradient that of a different network.
    """
    predictions, states = [], []
    with torch.no_grad():
        for pose in poses:
            states.append(torch.get_rng_state())
            predictions.append(predict(model, pose).reshape(-1))
    prediction, weights = _weights(torch.cat(predictions), rule, target)

    after = torch.get_rng_state()
    chunks = weights.split([len(chunk) for chunk in predictions])
    for pose, weight, state in zip(poses, chunks, states, strict=True):
        torch.set_rng_state(state)
        predict(model, pose).reshape(-1).backward(weight)
    torch.set_rng_state(after)
    return prediction


PEERS: dict[str, Step] = {
    "plain": plain,
    "checkpoint": checkpoint,
    "mtenn scheme": mtenn_scheme,
    "two passes": two_pass,
}


def _loss(prediction: Tensor, target: float) -> Tensor:
    return (prediction - target).square()


def _weights(predictions: Tensor, rule: Rule, target: float) -> tuple[Tensor, Tensor]:
    """Combined prediction `[]` and `w = ∂L/∂ŷ` `[m]`, by autograd on the predictions alone."""
    leaf = predictions.requires_grad_()
    prediction = rule(leaf)
    (weights,) = torch.autograd.grad(_loss(prediction, target), leaf)
    return prediction.detach(), weights


def _accumulate(parameter: nn.Parameter, gradient: Tensor, weight: float) -> None:
    if parameter.grad is None:
        parameter.grad = gradient * weight
    else:
        parameter.grad.add_(gradient, alpha=weight)
