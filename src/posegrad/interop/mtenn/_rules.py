"""Which rule a combination object of mtenn's stands for."""

import copy
from collections.abc import Callable, Iterator
from typing import Any, final

import torch
from torch import Tensor, nn

from posegrad.combination import Boltzmann, Combination, Max, Mean, Min
from posegrad.interop.mtenn._combination import WithMtennSignature
from posegrad.weighting._rules import rule_of_predictions

__all__ = ["picks_the_worst", "rule_of"]


def rule_of(combination: Any) -> Combination:
    """The rule in a combination object: of ours, of mtenn's, or derived from mtenn's.

    Raises:
        TypeError: if it is none of these and no rule either.
    """
    if isinstance(combination, WithMtennSignature):
        return combination.rule
    if isinstance(combination, type | Combination) or not hasattr(combination, "split_grad_dict"):
        return rule_of_predictions(combination)
    theirs = _ByHand(combination)
    if type(combination).__module__.partition(".")[0] != "mtenn":
        return theirs
    values = torch.tensor([-2.0, 1.5, -2.001, 1.499], dtype=torch.float64)  # sharp and soft differ
    found = theirs(values)
    same = (rule for rule in _rules_of_mtenn(combination) if torch.allclose(rule(values), found))
    return next(same, theirs)


def _rules_of_mtenn(theirs: Any) -> Iterator[Combination]:
    """Rules that an object of mtenn's may stand for, by its attributes; ours sum to 1."""
    scale = getattr(theirs, "pred_scale", None) or getattr(theirs, "scale", None)  # the older name
    yield from [Mean(), Boltzmann(kT=1.0)] if scale is None else [Min(scale), Max(scale)]


@final
class _ByHand(Combination):
    r"""A combination with a backward written by hand, as mtenn asks for, as a rule.

    Its backward makes :math:`\sum_i w_i g_i` of the gradients :math:`g_i` it is given. The
    gradients of the predictions by the predictions themselves are the unit vectors :math:`e_i`, and
    of these it makes :math:`\sum_i w_i e_i = w`.
    """

    def __init__(self, combination: Callable[..., Any]) -> None:
        super().__init__()
        self.combination = combination

    def forward(self, predictions: Tensor) -> Tensor:
        """Combines predictions `[N]`."""
        unit = torch.eye(len(predictions), dtype=predictions.dtype, device=predictions.device)
        gradients = {"predictions": list(unit)}
        outputs = self.combination(
            list(predictions.detach()), gradients, ["predictions"], predictions
        )
        combined: Tensor = outputs[0] if isinstance(outputs, tuple) else outputs
        return combined


def picks_the_worst(readout: Callable[[Tensor], Tensor], rule: Combination) -> bool:
    """Whether a readout turns the order of energies around, and the rule then prefers low numbers.

    Both are tried on some numbers. If they cannot take these, nothing is known: False.
    """
    energies = torch.arange(-32.0, 33.0, device="cpu")  # symmetric: Mean and Sum give 0
    try:
        with torch.no_grad():
            steps = _trial(readout)(energies[:, None]).flatten().diff()
            combined = _trial(rule)(energies)
        return bool(combined < 0) and bool((steps <= 0).all()) and bool((steps < 0).any())
    except Exception:
        return False


def _trial(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A copy to try out, whose buffers may change; in evaluation, so that it draws nothing."""
    twin = copy.deepcopy(function)
    return twin.cpu().float().eval() if isinstance(twin, nn.Module) else twin
