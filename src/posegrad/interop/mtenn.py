r"""mtenn's multi-pose models: combination objects that take any rule, and GroupedModel anew.

mtenn itself is not imported. Its GroupedModel hands a combination the predictions of N poses, cut
from their graphs, and the gradient :math:`g_i = \partial \hat y_i / \partial \theta` of each. A
loss of what it gets back has the gradient

.. math::
    \frac{\partial L}{\partial \theta} = \sum_{i=1}^{N} w_i g_i, \qquad
    w_i = \frac{\partial L}{\partial \hat y} \frac{\partial h}{\partial \hat y_i}
        + \frac{\partial L}{\partial \hat y_i}

for a rule h (equations 1 and 2 of mtenn's documentation of its combinations). Here the predictions
are functions of the parameters whose backward is that sum, and h is applied to them: autograd
finds w, and no rule needs a gradient by hand.
"""

import copy
from abc import ABC
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, cached_property
from typing import Any, final

import torch
from torch import Tensor, nn

from posegrad._warn import warn
from posegrad.combination import Boltzmann, Combination, Max, Mean, Min
from posegrad.combination._base import Rule, as_combination, flush_denormals, outcome
from posegrad.engine import Engine
from posegrad.errors import NonFinitePredictionError, ShapeMismatchError, UnsupportedModuleError
from posegrad.schedule._attach import Gradients, attach
from posegrad.schedule._gradients import GradientSum
from posegrad.schedule._inputs import Inputs
from posegrad.schedule._poses import Pose
from posegrad.schedule._predictions import group_predictions
from posegrad.weighting._rules import rule_of_predictions

__all__ = [
    "BoltzmannCombination",
    "Grouped",
    "MaxCombination",
    "MeanCombination",
    "RuleCombination",
    "grouped",
    "join_grad_dict",
    "split_grad_dict",
]

GradDict = Mapping[str, Sequence[Tensor]]
"""For each parameter by name, its N gradients."""

Readout = Callable[[Tensor], Tensor]


def split_grad_dict(grad_dict: GradDict) -> tuple[list[str], list[Tensor]]:
    """The gradients as one list, and beside it the name that each belongs to."""
    pairs = [(name, gradient) for name, rows in grad_dict.items() for gradient in rows]
    return [name for name, _ in pairs], [gradient for _, gradient in pairs]


def join_grad_dict(names: Sequence[str], gradients: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """The inverse of `split_grad_dict`; ValueError if one list is longer than the other."""
    joined: dict[str, list[Tensor]] = {}
    for name, gradient in zip(names, gradients, strict=True):
        joined.setdefault(name, []).append(gradient)
    return joined


class _WithRule(nn.Module, ABC):
    """A rule with mtenn's call signature; subclasses say which rule."""

    split_grad_dict = staticmethod(split_grad_dict)
    join_grad_dict = staticmethod(join_grad_dict)

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule_of_predictions(rule)
        if names := [name for name, _ in self.rule.named_parameters()]:
            raise UnsupportedModuleError(
                f"The rule has parameters: {', '.join(names)}. mtenn's GroupedModel differentiates "
                f"each pose before it combines them, and fails on those, which get no gradient.\n"
                f"Use posegrad.interop.mtenn.grouped(model, rule), which trains them."
            )

    def forward(
        self,
        pred_list: Sequence[Tensor],
        grad_dict: GradDict,
        param_names: Sequence[str],
        *model_params: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Combines N predictions, each one number, with the gradients of each by every parameter.

        Returns:
            The combined prediction `[]` and the predictions `[N]`, for any loss of the two.

        Raises:
            NoPosesError: if there are no predictions.
            NonFinitePredictionError: if some are nan or infinite; names the poses.
            ShapeMismatchError: if a prediction is not one number, or `grad_dict` does not hold N
                gradients for exactly the parameters named.
        """
        predictions = _joined(pred_list)  # [N]
        _check_gradients(grad_dict, param_names, model_params, len(predictions))
        inputs = Inputs(dict(zip(param_names, model_params, strict=True)))
        saved = [row for name in inputs.names for row in grad_dict[name]]  # N of each parameter

        def pullback(rows: Gradients, cotangents: Gradients) -> Gradients:
            total, weights = GradientSum(), cotangents[0]
            for i, w in enumerate([] if weights is None else flush_denormals(weights).tolist()):
                if w != 0:
                    of_pose = enumerate(rows[i :: len(predictions)])
                    total.add({number: g for number, g in of_pose if g is not None}, w)
            return total.delivered(inputs.tensors)

        (per_pose,) = attach([predictions], inputs, pullback, saved)
        return outcome(self.rule(per_pose))[0], per_pose


@final
class RuleCombination(_WithRule):
    """Any rule without parameters, or function from `[N]` to `[]`, for an existing GroupedModel.

    Raises:
        TypeError: if it is no rule.
        UnsupportedModuleError: if it has parameters, which only `grouped` can train.

    Example:
        >>> from posegrad.interop.mtenn import RuleCombination
        >>> combination = RuleCombination(Best())  # for GroupedModel(representation, strategy, ...)
        >>> combination.rule(torch.tensor([-9.0, -8.0, -4.0]))
        tensor(-9.)
    """


@final
class MeanCombination(_WithRule):
    """`Mean`, as mtenn's (equations 3 and 4 there)."""

    def __init__(self) -> None:
        super().__init__(Mean())


@final
class MaxCombination(_WithRule):
    """`Min(pred_scale)`, or `Max` without `negate_preds`, as mtenn's (equations 5 to 9 there)."""

    def __init__(self, negate_preds: bool = True, pred_scale: float = 1000.0) -> None:
        super().__init__((Min if negate_preds else Max)(scale=pred_scale))
        self.negate_preds, self.pred_scale = negate_preds, pred_scale


@final
class BoltzmannCombination(_WithRule):
    """`Boltzmann(kT=1)`, as mtenn's: predictions are energies in kT."""

    def __init__(self) -> None:
        super().__init__(Boltzmann(kT=1.0))


def _joined(pred_list: Sequence[Tensor]) -> Tensor:
    """The predictions as `[N]`."""
    odd = [f"pose {i} has shape {[*p.shape]}" for i, p in enumerate(pred_list) if p.numel() != 1]
    if odd:
        raise ShapeMismatchError(
            f"A prediction is one number here, which GroupedModel can differentiate, but that of "
            f"{', that of '.join(odd)}.\n"
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
    pairs = zip(names, parameters, strict=False)
    needed = {name: f"{count} of {list(parameter.shape)}" for name, parameter in pairs}
    found = {name: _shapes(rows) for name, rows in grad_dict.items()}
    wrong = [
        f"{name} has {found.get(name, 'no entry')}, needs {needed.get(name, 'no entry')}"
        for name in needed | found
        if found.get(name) != needed.get(name)
    ]
    if wrong or len(names) != len(parameters):
        raise ShapeMismatchError(
            f"There are {count} predictions, {len(names)} param_names and {len(parameters)} "
            f"parameters. In grad_dict: {'; '.join(wrong) or 'one entry a name'}.\n"
            f"Each parameter gets the weighted sum of its own gradients, one for each prediction.\n"
            f"Make all three from the same model.named_parameters()."
        )


def _shapes(rows: Sequence[Tensor]) -> str:
    kinds = dict.fromkeys(str(list(row.shape)) for row in rows)
    return f"{len(rows)} of {' and '.join(kinds) or 'any shape'}"


class Grouped(nn.Module, ABC):
    """What `grouped` makes, with the model's own class behind this one.

    So each parameter, part and key of `state_dict` has the name that it has there.
    """

    combination: Combination
    readout: Readout | None
    comb_readout: Readout | None
    schedule: str
    engine_options: dict[str, Any]

    def forward(self, input_list: Iterable[Pose] | Tensor) -> tuple[Tensor, Tensor]:
        """The combined prediction of a list of poses, and their predictions `[N, ...]`.

        Raises and accumulates as `Engine.combine`; `comb_readout` has acted on the first.
        """
        found = self._engine.combine(input_list, self.combination, schedule=self.schedule)
        return _read(found, self.comb_readout), found.per_pose

    def score(self, pose: Pose) -> Tensor:
        """The prediction of one pose, as the combination gets it."""
        kinds = type(self).__mro__  # that of a GroupedModel takes a list: what is behind it, a pose
        taking_lists: Any = next((k for k in kinds if k.__name__ == "GroupedModel"), Grouped)
        return _read(super(taking_lists, self).forward(pose))

    def extra_repr(self) -> str:
        """What printing shows beside the parts."""
        return f"schedule={self.schedule!r}"

    @cached_property
    def _engine(self) -> Engine:
        # Of the whole module, not of its parts: a part that is replaced is seen.
        return Engine(self, predict=Grouped.score, **self.engine_options)

    def __reduce_ex__(self, _: object) -> tuple[Any, ...]:
        state = {name: value for name, value in vars(self).items() if name != "_engine"}
        return _blank, (type(self).__bases__[1],), state


def grouped(
    model: nn.Module,
    combination: Any = None,
    pred_readout: Readout | None = None,
    comb_readout: Readout | None = None,
    *,
    schedule: str = "recompute",
    **engine_options: Any,
) -> Grouped:
    r"""Makes a model of one pose into a model of a group of poses, like mtenn's GroupedModel.

    .. math::
        \hat y_i = r_1(f_\theta(X_i)), \qquad \hat y = r_2(h(\hat y_1, \dots, \hat y_N))

    Args:
        model: A model of one pose, whose forward returns its prediction or, as mtenn's `Model`,
            a tuple that begins with it. Or a GroupedModel: its parts are used, its forward is not.
        combination: h: a rule, any function from predictions to one, or a combination object: one
            of these here, of mtenn's, or derived from mtenn's. Default: the GroupedModel's own.
        pred_readout: :math:`r_1`, applied to the prediction of each pose.
        comb_readout: :math:`r_2`, applied to the combined prediction.
        schedule: As for `Engine.combine`. The default serves losses of both outputs; `"stream"`
            serves losses of the combined prediction alone.
        engine_options: As for `Engine`: `chunk_size`, `collate`, ...

    Returns:
        A module that takes a list of poses and returns `(combined, per pose)`. A model of mtenn's
        keeps its class and the names of its parts and parameters; any other is the part `model`.
        `combination`, `readout` and `comb_readout` are as in a GroupedModel. What is given is left
        as it is, and parts are shared. Hooks on a model of mtenn's run once for the group.

    Raises:
        TypeError: if the model is no module, the forward of one of mtenn's was compiled or
            replaced on the object, or the combination is missing or no rule.
        ValueError: if the model has a readout of its own where another one is given.

    Warns:
        UserWarning: if the first readout turns predictions around, so that the worst pose counts.

    Example:
        >>> from posegrad.interop.mtenn import MaxCombination, grouped
        >>> network = grouped(nn.Linear(3, 1), MaxCombination())
        >>> combined, per_pose = network([torch.randn(3) for _ in range(5)])
        >>> combined.shape, per_pose.shape
        (torch.Size([]), torch.Size([5]))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"The model is a {type(model).__name__}, not an nn.Module. Pass the model itself."
        )
    is_of_mtenn = hasattr(model, "strategy") and hasattr(model, "readout")
    if is_of_mtenn and ("forward" in vars(model) or vars(model).get("_compiled_call_impl")):
        raise TypeError(
            f"The forward of this {type(model).__name__} was compiled or replaced on the object "
            f"itself; in a group it would be handed all poses at once, past the combination.\n"
            f"Group the model first, or compile its parts: model.representation.compile()."
        )
    network = _twin(model if is_of_mtenn else _Single(model))
    rule = getattr(network, "combination", None) if combination is None else combination
    if rule is None:
        raise TypeError(
            f"There is no combination, and {type(model).__name__} is no GroupedModel that has one. "
            f"Pass MeanCombination(), MaxCombination(), ..., or a rule."
        )
    network.combination = _rule_of(rule)
    for option, given in {"pred_readout": pred_readout, "comb_readout": comb_readout}.items():
        name = option.removeprefix("pred_")  # where a GroupedModel keeps it
        own = getattr(network, name, None)
        if own is not None and given is not None:
            raise ValueError(
                f"{option} is given, but model.{name} is a {type(own).__name__} already, and there "
                f"is one place for the two.\nLeave {option} out, or set model.{name} = None."
            )
        setattr(network, name, own if given is None else given)
    network.schedule, network.engine_options = schedule, engine_options
    _ = network._engine  # made now, so that options which are wrong are refused here
    _warn_of_the_worst(network.readout, network.combination)
    return network


@final
class _Single(nn.Module):
    """Any model in the shape of mtenn's: its forward ends with a readout."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.readout: Readout | None = None

    def forward(self, pose: Pose) -> Tensor:
        """The prediction of one pose."""
        return _read(self.model(pose), self.readout)


def _read(output: Any, readout: Readout | None = None) -> Tensor:
    """The prediction that an output is, or as a tuple begins with, through a readout."""
    prediction: Tensor = output[0] if isinstance(output, tuple) else output
    return prediction if readout is None else readout(prediction)


@cache
def _kind(base: Any) -> type[Grouped]:
    return type(f"{base.__name__}OfPoses", (Grouped, base), {"__module__": __name__})


def _blank(base: Any) -> Grouped:
    """An object without attributes yet, of the class of groups for a model's class."""
    return _kind(base).__new__(_kind(base))


def _twin(model: nn.Module) -> Grouped:
    """A module with the parameters, buffers and parts of another, to which parts can be added.

    A parameter or buffer of its own that is replaced in either is replaced in both.
    """
    twin = _blank(type(model))
    own = vars(nn.Module()).keys() - {"_parameters", "_buffers", "_non_persistent_buffers_set"}
    for name, value in vars(model).items():
        vars(twin)[name] = copy.copy(value) if name in own else value
    return twin


def _rule_of(combination: Any) -> Combination:
    """The rule in a combination object, of ours or of mtenn's kind; or a rule as it is."""
    if isinstance(combination, _WithRule):
        return combination.rule
    if isinstance(combination, type | Combination) or not hasattr(combination, "split_grad_dict"):
        return rule_of_predictions(combination)
    theirs = _ByHand(combination)
    if type(combination).__module__.partition(".")[0] != "mtenn":
        return theirs
    # mtenn's own are known by what they give: the weights of ours sum to one in float32 too.
    scale = getattr(combination, "pred_scale", None) or getattr(combination, "scale", None)
    known = [Mean(), Boltzmann(kT=1.0)] if scale is None else [Min(scale), Max(scale)]
    trial = torch.tensor([-2.0, 1.5, -2.001, 1.499], dtype=torch.float64)  # sharp and soft differ
    found = theirs(trial)
    return next((rule for rule in known if torch.allclose(rule(trial), found)), theirs)


@final
class _ByHand(Combination):
    r"""A combination whose gradient was written by hand, in mtenn's way, as a rule.

    Its backward makes :math:`\sum_i w_i g_i` of the gradients it is given. Those of the predictions
    by themselves are the unit vectors :math:`e_i`, and :math:`\sum_i w_i e_i = w`.
    """

    def __init__(self, combination: Callable[..., Any]) -> None:
        super().__init__()
        self.combination = combination

    def forward(self, predictions: Tensor) -> Tensor:
        """Combines predictions `[N]`."""
        unit = {"predictions": [*torch.eye(len(predictions)).to(predictions)]}
        return _read(self.combination([*predictions.detach()], unit, [*unit], predictions))


def _warn_of_the_worst(readout: Any, rule: Combination) -> None:
    """Warns if a readout turns energies around and a rule prefers low numbers, tried on some."""
    energies = torch.arange(-32.0, 33.0, device="cpu")  # symmetric: Mean and Sum give 0
    try:
        trial = copy.deepcopy(nn.ModuleList([as_combination(readout), rule]))  # buffers may change
        first, last = trial.cpu().float().eval()
        with torch.no_grad():
            steps, combined = first(energies[:, None]).flatten().diff(), last(energies)
        is_worst = bool(combined < 0 and steps.max() <= 0 and steps.min() < 0)
    except Exception:  # they do not take these numbers, so nothing is known
        return
    if is_worst:
        warn(
            f"{type(readout).__name__} acts on the prediction of each pose and turns their order "
            f"around, so that the combination, which prefers low numbers, picks the worst pose.\n"
            f"Apply it to the combined prediction, comb_readout= (and set model.readout = None if "
            f"it is the model's own), or combine with MaxCombination(negate_preds=False)."
        )
