r"""Combination objects with mtenn's call signature, so that its GroupedModel takes any rule.

A GroupedModel hands over the predictions of N poses, cut from their graphs, and the gradient
:math:`g_i = \partial \hat y_i / \partial \theta` of each. A loss of what it gets back has the
gradient

.. math::
    \frac{\partial L}{\partial \theta} = \sum_{i=1}^{N} w_i g_i, \qquad
    w_i = \frac{\partial L}{\partial \hat y} \frac{\partial h}{\partial \hat y_i}
        + \frac{\partial L}{\partial \hat y_i}

for a rule h (equations 1 and 2 of mtenn's documentation of its combinations). So the predictions
are made functions of the parameters whose backward is that sum, and h is applied to them: autograd
finds w, and no rule derives anything by hand.
"""

from collections.abc import Mapping, Sequence
from typing import final

from torch import Tensor, nn

from posegrad.combination import Boltzmann, Max, Mean, Min
from posegrad.combination._base import Rule, flush_denormals, outcome
from posegrad.errors import (
    NonFinitePredictionError,
    NoPosesError,
    ShapeMismatchError,
    UnsupportedModuleError,
)
from posegrad.schedule._attach import Gradients, attach
from posegrad.schedule._gradients import GradientSum
from posegrad.schedule._inputs import Inputs
from posegrad.schedule._predictions import group_predictions
from posegrad.weighting._rules import rule_of_predictions

__all__ = [
    "BoltzmannCombination",
    "MaxCombination",
    "MeanCombination",
    "RuleCombination",
    "WithMtennSignature",
    "join_grad_dict",
    "split_grad_dict",
]

GradDict = Mapping[str, Sequence[Tensor]]
"""For each parameter by name, its N gradients."""


def split_grad_dict(grad_dict: GradDict) -> tuple[list[str], list[Tensor]]:
    """The gradients as one list, and beside it the name each belongs to.

    Example:
        >>> from posegrad.interop.mtenn import split_grad_dict
        >>> split_grad_dict({"a": [torch.zeros(1), torch.ones(1)], "b": [torch.ones(1)]})
        (['a', 'a', 'b'], [tensor([0.]), tensor([1.]), tensor([1.])])
    """
    names = [name for name, gradients in grad_dict.items() for _ in gradients]
    return names, [gradient for gradients in grad_dict.values() for gradient in gradients]


def join_grad_dict(names: Sequence[str], gradients: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """The inverse of `split_grad_dict`.

    Raises:
        ValueError: if there are more of one than of the other.

    Example:
        >>> from posegrad.interop.mtenn import join_grad_dict
        >>> join_grad_dict(["a", "a"], [torch.zeros(1), torch.ones(1)])
        {'a': [tensor([0.]), tensor([1.])]}
    """
    joined: dict[str, list[Tensor]] = {}
    for name, gradient in zip(names, gradients, strict=True):
        joined.setdefault(name, []).append(gradient)
    return joined


class WithMtennSignature(nn.Module):
    """A rule with mtenn's call signature; subclasses say which rule.

    Args:
        rule: A combination rule, or any function from predictions `[N]` to `[]`.

    Raises:
        TypeError: if it is neither.
        UnsupportedModuleError: if it has parameters.
    """

    split_grad_dict = staticmethod(split_grad_dict)
    join_grad_dict = staticmethod(join_grad_dict)

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule_of_predictions(rule)
        names = [name for name, _ in self.rule.named_parameters()]
        if names:
            raise UnsupportedModuleError(
                f"The rule has parameters: {', '.join(names)}. mtenn's GroupedModel differentiates "
                f"one pose at a time, before it combines them, and fails on a parameter that this "
                f"leaves without a gradient.\n"
                f"Use posegrad.interop.mtenn.grouped(model, rule), which trains them."
            )

    def forward(
        self,
        pred_list: Sequence[Tensor],
        grad_dict: GradDict,
        param_names: Sequence[str],
        *model_params: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Combines N predictions; called by GroupedModel.

        Args:
            pred_list: The predictions, one number each, of shape `[]`, `[1]` or `[1, 1]`.
            grad_dict: For each parameter by name, the gradients of the N predictions.
            param_names: The names of the parameters.
            model_params: The parameters themselves, in that order.

        Returns:
            The combined prediction `[]` and the predictions `[N]`. Both carry the gradients on to
            the parameters, for any loss of the two.

        Raises:
            NoPosesError: if there are no predictions.
            NonFinitePredictionError: if some are nan or infinite; names the poses.
            ShapeMismatchError: if a prediction is not one number, or `grad_dict` does not hold N
                gradients for exactly the parameters named.

        In backward:
            StaleParametersError: if a parameter was changed since.
            HigherOrderError: if a second derivative is asked for.
        """
        predictions = _joined(pred_list)  # [N]
        _check_gradients(grad_dict, param_names, model_params, len(predictions))
        inputs = Inputs(dict(zip(param_names, model_params, strict=True)))
        rows = [row for name in inputs.names for row in grad_dict[name]]  # N of each parameter

        def pullback(rows: Gradients, cotangents: Gradients) -> Gradients:
            return _weighted_sum(cotangents[0], rows).delivered(inputs.tensors)

        (per_pose,) = attach([predictions], inputs, pullback, rows)
        prediction, _ = outcome(self.rule(per_pose))
        return prediction, per_pose


@final
class RuleCombination(WithMtennSignature):
    """Any rule, for an existing GroupedModel.

    Args:
        rule: A combination rule without parameters, or any function from `[N]` to `[]`.

    Raises:
        TypeError: if it is neither.
        UnsupportedModuleError: if it has parameters, which only `grouped` can train.

    Example:
        >>> from posegrad.interop.mtenn import RuleCombination
        >>> weight = nn.Parameter(torch.tensor([2.0]))
        >>> gradients = {"weight": [torch.tensor([-9.0]), torch.tensor([-8.0])]}
        >>> predictions = [torch.tensor(-18.0), torch.tensor(-16.0)]
        >>> best, _ = RuleCombination(Best())(predictions, gradients, ["weight"], weight)
        >>> best.backward()
        >>> weight.grad
        tensor([-9.])
    """


@final
class MeanCombination(WithMtennSignature):
    """mtenn's mean; `Mean` inside.

    References:
        Equations 3 and 4 of mtenn's documentation of its combinations.

    Example:
        >>> from posegrad.interop.mtenn import MeanCombination
        >>> MeanCombination().rule(torch.tensor([-9.0, -8.0, -4.0]))
        tensor(-7.)
    """

    def __init__(self) -> None:
        super().__init__(Mean())


@final
class MaxCombination(WithMtennSignature):
    """mtenn's smooth maximum, by default of the negated predictions: a smooth minimum.

    Args:
        negate_preds: Take the minimum, `Min` inside; else the maximum, `Max`.
        pred_scale: t, per kT for energies in kT. Positive and finite.

    Raises:
        ValueError: if `pred_scale` is not positive and finite.

    References:
        Equations 5 to 9 of mtenn's documentation of its combinations.

    Example:
        >>> from posegrad.interop.mtenn import MaxCombination
        >>> MaxCombination(pred_scale=1.0).rule(torch.tensor([-9.0, -8.0, -4.0]))
        tensor(-9.3182)
    """

    def __init__(self, negate_preds: bool = True, pred_scale: float = 1000.0) -> None:
        super().__init__((Min if negate_preds else Max)(scale=pred_scale))
        self.negate_preds = negate_preds
        self.pred_scale = pred_scale


@final
class BoltzmannCombination(WithMtennSignature):
    """mtenn's thermal average of energies in kT; `Boltzmann(kT=1)` inside.

    Example:
        >>> from posegrad.interop.mtenn import BoltzmannCombination
        >>> BoltzmannCombination().rule(torch.tensor([-9.0, -8.0, -4.0]))
        tensor(-8.7079)
    """

    def __init__(self) -> None:
        super().__init__(Boltzmann(kT=1.0))


def _weighted_sum(weights: Tensor | None, rows: Gradients) -> GradientSum:
    r"""Computes :math:`\sum_i w_i g_i`; a pose of weight zero is not looked at."""
    total = GradientSum()
    if weights is not None:
        for i, weight in enumerate(flush_denormals(weights).tolist()):
            if weight != 0:
                total.add(_of_pose(i, rows, len(weights)), weight)
    return total


def _of_pose(i: int, rows: Gradients, count: int) -> dict[int, Tensor]:
    """The gradients of one pose by number of parameter, out of `count` for each parameter."""
    return {number: row for number, row in enumerate(rows[i::count]) if row is not None}


def _joined(pred_list: Sequence[Tensor]) -> Tensor:
    """The predictions as `[N]`."""
    if len(pred_list) == 0:
        raise NoPosesError(
            "There are no predictions: a combination of none is undefined.\n"
            "Leave compounds without poses out of the loop."
        )
    shapes = {i: list(p.shape) for i, p in enumerate(pred_list) if p.numel() != 1}
    if shapes:
        shown = ", ".join(f"that of pose {i} has shape {shape}" for i, shape in shapes.items())
        raise ShapeMismatchError(
            f"A prediction is one number here, but {shown}.\n"
            f"GroupedModel differentiates each prediction by itself, which needs one number.\n"
            f"Use posegrad.interop.mtenn.grouped(model, rule), which takes vectors."
        )
    try:
        return group_predictions([prediction.detach().reshape(1) for prediction in pred_list])
    except NonFinitePredictionError as error:
        error.add_note("mtenn's GroupedModel, if that called, had cleared .grad before.")
        raise


def _check_gradients(
    grad_dict: GradDict, names: Sequence[str], parameters: Sequence[Tensor], count: int
) -> None:
    missing = [name for name in names if name not in grad_dict]
    unknown = [name for name in grad_dict if name not in set(names)]
    if missing or unknown or len(names) != len(parameters):
        raise ShapeMismatchError(
            f"There are {len(names)} param_names and {len(parameters)} parameters; grad_dict lacks "
            f"{_listed(missing)} and has {_listed(unknown)} besides.\n"
            f"A parameter gets the weighted sum of its own gradients, so the names must be equal.\n"
            f"Make all three from the same model.named_parameters()."
        )
    offenders = [
        f"{name} {list(p.shape)} has {len(grad_dict[name])} of {_shapes(grad_dict[name])}"
        for name, p in zip(names, parameters, strict=True)
        if [g.shape for g in grad_dict[name]] != [p.shape] * count
    ]
    if offenders:
        raise ShapeMismatchError(
            f"grad_dict must hold a gradient of each parameter, and of its shape, for each of the "
            f"{count} predictions; {'; '.join(offenders)}.\n"
            f"Append one gradient of every parameter for every pose."
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "none"


def _shapes(gradients: Sequence[Tensor]) -> str:
    return " and ".join(dict.fromkeys(str(list(g.shape)) for g in gradients)) or "any shape"
