"""GroupedModel's forward with an engine inside."""

import copy
from abc import ABC
from collections.abc import Callable, Hashable, Iterable
from functools import cache
from typing import Any, cast, final

from torch import Tensor, nn

from posegrad._warn import warn
from posegrad.engine import Engine
from posegrad.interop.mtenn._rules import picks_the_worst, rule_of
from posegrad.schedule._poses import Pose

__all__ = ["Grouped", "grouped"]

Readout = Callable[[Tensor], Tensor]


def grouped(
    model: nn.Module,
    combination: Any = None,
    pred_readout: Readout | None = None,
    comb_readout: Readout | None = None,
    *,
    schedule: str = "recompute",
    **engine_options: Any,
) -> "Grouped":
    r"""Makes a model of one pose into a model of a group of poses, like mtenn's GroupedModel.

    .. math::
        \hat y_i = r_1(f_\theta(X_i)), \qquad \hat y = r_2(h(\hat y_1, \dots, \hat y_N))

    with a rule h and readouts :math:`r_1`, :math:`r_2`.

    Args:
        model: A model of one pose, whose forward returns its prediction or, as mtenn's `Model`,
            a tuple that begins with it. Or a GroupedModel: its parts are used, its forward is not.
        combination: One of this package; a rule or any function from predictions to one; an object
            of mtenn's or a class of your own derived from mtenn's. Default: the GroupedModel's own.
        pred_readout: Applied to the prediction of each pose.
        comb_readout: Applied to the combined prediction.
        schedule: As for `Engine.combine`. The default serves losses of both outputs; `"stream"`
            serves losses of the combined prediction alone.
        engine_options: As for `Engine`: `chunk_size`, `collate`, ...

    Returns:
        A module whose forward takes a list of poses and returns `(combined, per pose)`. The rule
        and the readouts are `combination`, `readout` and `comb_readout`, as in a GroupedModel. A
        model of mtenn's keeps its class, its parts and their names: `representation`, `strategy`;
        any other model is the part `model`. What is given is left as it is; parts are shared.
        Hooks on a model of mtenn's run once for the group, as a GroupedModel's do.

    Raises:
        TypeError: if the model is no module, the forward of one of mtenn's was compiled or
            replaced on the object, or the combination is missing or no rule.
        ValueError: if the model has a readout of its own where another one is given.

    Warns:
        UserWarning: if the readout before the combination turns the order of predictions around,
            so that the combination picks the worst pose.

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
    own = getattr(network, "combination", None)
    if combination is None and own is None:
        raise TypeError(
            f"There is no combination, and {type(model).__name__} is no GroupedModel that has one. "
            f"Pass MeanCombination(), MaxCombination(), ..., or a rule."
        )
    _check_free(network, "pred_readout", "readout", pred_readout)
    _check_free(network, "comb_readout", "comb_readout", comb_readout)
    rule = rule_of(own if combination is None else combination)
    network.combination = rule
    network.readout = network.readout if pred_readout is None else pred_readout
    network.comb_readout = getattr(network, "comb_readout", None) or comb_readout
    network.schedule, network.engine_options = schedule, engine_options
    network._engine = network._new_engine()
    first = network.readout
    if first is not None and picks_the_worst(first, rule):
        warn(
            f"{type(first).__name__} acts on the prediction of each pose and turns their order "
            f"around, and the combination prefers low numbers: it picks the pose that the model "
            f"finds worst.\n"
            f"Apply it to the combined prediction, comb_readout= (and set model.readout = None if "
            f"it is the model's own), or combine with MaxCombination(negate_preds=False)."
        )
    return network


class Grouped(nn.Module, ABC):
    """What `grouped` makes, with the model's own class behind this one.

    So each parameter, part and key of `state_dict` has the name that it has there.
    """

    combination: Any
    readout: Readout | None
    comb_readout: Readout | None
    schedule: str
    engine_options: dict[str, Any]
    _engine: Engine

    def forward(self, input_list: Iterable[Pose] | Tensor) -> tuple[Tensor, Tensor]:
        """The combined prediction of a list of poses, and their predictions `[N, ...]`.

        Raises and accumulates as `Engine.combine`; `comb_readout` has acted on the first.
        """
        prediction, per_pose = self._engine.combine(
            input_list, self.combination, schedule=self.schedule
        )
        last = self.comb_readout
        return (prediction if last is None else last(prediction)), per_pose

    def score(self, pose: Pose) -> Tensor:
        """The prediction of one pose, as the combination gets it."""
        behind: Any = super(self._list_owner() or Grouped, self)
        output = behind.forward(pose)
        prediction: Tensor = output[0] if isinstance(output, tuple) else output
        return prediction

    def extra_repr(self) -> str:
        """What printing shows beside the parts."""
        return f"schedule={self.schedule!r}"

    def _list_owner(self) -> Any:
        """GroupedModel, if the model is one: its forward takes a list, its base's a pose."""
        behind = type(self).__mro__[2:]
        return next((kind for kind in behind if kind.__name__ == "GroupedModel"), None)

    def _new_engine(self) -> Engine:
        # An engine of the whole module, not of its parts, notices a part that was replaced.
        return Engine(self, predict=Grouped.score, **self.engine_options)

    def __reduce_ex__(self, _: object) -> tuple[Any, ...]:
        state = {name: value for name, value in vars(self).items() if name != "_engine"}
        return (
            _blank,
            (type(self).__mro__[2],),
            state,
        )  # the model's own class: after _kind's, Grouped

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._engine = self._new_engine()


@final
class _Single(nn.Module):
    """Any model in the shape of mtenn's: its forward ends with a readout."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.readout: Readout | None = None

    def forward(self, pose: Pose) -> Tensor:
        """The prediction of one pose."""
        output = self.model(pose)
        prediction: Tensor = output[0] if isinstance(output, tuple) else output
        return prediction if self.readout is None else self.readout(prediction)


@cache
def _kind(base: Any) -> type[Grouped]:
    return type(f"{base.__name__}OfPoses", (Grouped, base), {"__module__": __name__})


def _blank(base: type[nn.Module]) -> Grouped:
    """An instance, without attributes yet, of the class made by `_kind` for a model's class."""
    kind = _kind(cast("Hashable", base))
    return kind.__new__(kind)


def _twin(model: nn.Module) -> Grouped:
    """A module with the parameters, buffers and parts of another one, to which parts can be added.

    The two modules share the tables of the model's own parameters and buffers, so that one replaced
    in either is replaced in both.
    """
    twin = _blank(type(model))
    vars(twin).update(vars(model))
    shared = {"_parameters", "_buffers", "_non_persistent_buffers_set"}
    for name in vars(nn.Module()).keys() - shared:
        vars(twin)[name] = copy.copy(vars(twin)[name])  # each has hooks and parts of its own
    return twin


def _check_free(network: nn.Module, option: str, name: str, given: object) -> None:
    own = getattr(network, name, None)
    if given is not None and own is not None:
        raise ValueError(
            f"{option} is given, but model.{name} is a {type(own).__name__} already, and only one "
            f"can be applied.\nLeave {option} out, or set model.{name} = None."
        )
