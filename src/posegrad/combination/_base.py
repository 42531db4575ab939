"""What a combination rule is: predictions in, one combined prediction out.

A rule's author writes `forward` and nothing else. Its gradient comes from autograd on the vector of
predictions, which is a few numbers; the model's graphs are the schedules' business.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor, nn

from posegrad._restoring import restoring
from posegrad.combination._compiled import uncovered
from posegrad.combination._online import OnlineForm
from posegrad.errors import described

__all__ = ["Combination", "Rule", "as_combination", "flush_denormals", "outcome"]


def flush_denormals(weights: Tensor) -> Tensor:
    """Returns `weights` with subnormal numbers replaced by exact zeros.

    A subnormal weight (below 1.2e-38 in float32) cannot change a sum it enters, but it makes every
    product of the backward it starts ten times slower on a CPU. Half precisions are left alone:
    float16 is subnormal from 6e-5 on, where it still says something.
    """
    if weights.dtype in (torch.float16, torch.bfloat16):
        return weights
    tiny = torch.finfo(weights.dtype).tiny
    return torch.where(weights.abs() < tiny, torch.zeros_like(weights), weights)


class Combination(nn.Module, ABC):
    r"""A rule :math:`\hat y = h(\hat y_1, \dots, \hat y_m)` on the predictions of one group.

    Laws, held for every rule by `posegrad.testing.assert_combination`: one prediction is its own
    combination; the order of the poses does not matter; equal calls give equal results; the
    gradient exists and is finite; an online form, where there is one, gives the same weights.

    Shape:
        predictions `[m, ...]` to `[...]`; a rule may act on each trailing component by itself
        (`Mean`, `Min`) or mix them (`AttentionPooling`). Of a tuple of tensors, the first is the
        combined prediction, and the others are `Combined.extra`.

    Note:
        Rules may have trainable parameters. They are differentiated by autograd as usual. A rule
        costs what autograd on m predictions costs, and the forwards and backwards of the schedule.

    Example:
        >>> class Midrange(Combination):
        ...     def forward(self, predictions):
        ...         return (predictions.amin(0) + predictions.amax(0)) / 2
        >>> Midrange()(torch.tensor([-9.0, -8.0, -4.0]))
        tensor(-6.5000)
        >>> Midrange().weights(torch.tensor([-9.0, -8.0, -4.0]))
        tensor([0.5000, 0.0000, 0.5000])
    """

    @abstractmethod
    def forward(self, predictions: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Combines predictions `[m, ...]` into one `[...]`, differentiably."""

    def online(self) -> OnlineForm | None:
        """The rule's weights as a running sum, or None if they do not separate.

        Only rules that can run under the `stream` schedule give one; None is always correct.
        """
        return None

    def counting(self) -> int | None:
        """How many poses of a group carry weight, if that is known beforehand; else None."""
        return None

    @final
    @restoring
    def weights(self, predictions: Tensor) -> Tensor:
        r"""The weight of every pose, :math:`w_i = \partial \hat y / \partial \hat y_i`.

        Args:
            predictions: `[m, ...]`; its own graph, if any, is left alone.

        Returns:
            `[m, ...]`, detached; subnormal numbers are exact zeros. For rules that mix trailing
            components, the gradient of the sum of the combined components.
        """
        with torch.enable_grad():
            leaf = predictions.detach().requires_grad_()
            (weights,) = torch.autograd.grad(outcome(self(leaf))[0].sum(), leaf)
        return flush_denormals(weights)

    def _hold(self, name: str, value: float | Tensor) -> None:
        """Keeps a number on the rule so that `to(device)` and `state_dict` see a tensor."""
        if isinstance(value, Tensor) and not value.requires_grad:
            self.register_buffer(name, value)
        else:
            setattr(self, name, value)


type_of_rule = "a Combination, an nn.Module, or any function of the predictions"
Rule = Combination | Callable[[Tensor], Tensor | tuple[Tensor, ...]]


def outcome(found: object) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What a rule returned: the combined prediction, and whatever stood beside it in a tuple.

    Raises:
        TypeError: if it is neither a tensor nor a tuple of them.
    """
    parts = found if isinstance(found, tuple) else (found,)
    odd = [part for part in parts if not isinstance(part, Tensor)]
    if not odd and parts:
        return parts[0], tuple(parts[1:])
    inside = f" with {described(odd[0])} in it" if isinstance(found, tuple) and odd else ""
    raise TypeError(
        f"The rule made {described(found)}{inside} of the predictions, but a combined prediction "
        f"is one tensor, with its graph.\nReturn that tensor, or a tuple of tensors that begins "
        f"with it."
    )


@final
class _Function(Combination):
    """Any callable as a rule."""

    def __init__(self, function: Callable[[Tensor], Tensor | tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.function = function

    def forward(self, predictions: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.function(predictions)


def as_combination(rule: Rule) -> Combination:
    """Returns `rule` as a `Combination`; a callable is wrapped.

    Raises:
        TypeError: if `rule` is a class or cannot be called.
    """
    rule = uncovered(rule)
    if isinstance(rule, Combination):
        return rule
    if isinstance(rule, type):
        raise TypeError(
            f"The rule is the class {rule.__name__}, not an instance of it. "
            f"Write {rule.__name__}(...) with its arguments."
        )
    if not callable(rule):
        raise TypeError(f"The rule is {rule!r}; it must be {type_of_rule}.")
    return _Function(rule)
