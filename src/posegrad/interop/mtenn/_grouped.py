"""GroupedModel's forward with an engine inside."""

from collections.abc import Callable, Iterable, MutableMapping
from typing import Any, NamedTuple, final

from torch import Tensor, nn

from posegrad._warn import warn
from posegrad.combination import Combination
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
    r"""A model of one pose as a model of a group of poses, as mtenn's GroupedModel is one.

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
        A module whose forward takes a list of poses and returns `(combined, per pose)`.

    Raises:
        TypeError: if the model is no module, or the combination is missing or no rule.
        ValueError: if the model has a readout of its own where another one is given, or its state
            and that of the other parts have a name in common.

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
    own = _parts_of(model)
    _check_only_one("pred_readout", pred_readout, "readout", own.readout)
    _check_only_one("comb_readout", comb_readout, "comb_readout", own.comb_readout)
    if combination is None and own.combination is None:
        raise TypeError(
            f"There is no combination, and {type(model).__name__} is no GroupedModel that has one. "
            f"Pass MeanCombination(), MaxCombination(), ..., or a rule."
        )
    rule = rule_of(own.combination if combination is None else combination)
    first = own.readout if pred_readout is None else pred_readout
    if first is not None and picks_the_worst(first, rule):
        warn(
            f"{type(first).__name__} acts on the prediction of each pose and turns their order "
            f"around, and the combination prefers low numbers: it picks the pose that the model "
            f"finds worst.\n"
            f"Apply it to the combined prediction, comb_readout= (and set model.readout = None if "
            f"it is the model's own), or combine with MaxCombination(negate_preds=False)."
        )
    return Grouped(model, rule, pred_readout, comb_readout, schedule, engine_options)


@final
class Grouped(nn.Module):
    """What `grouped` makes.

    Its `state_dict` has the keys of mtenn's GroupedModel: those of the model without a prefix, then
    those of `combination`, `readout` and `comb_readout`, where these have any.
    """

    def __init__(
        self,
        model: nn.Module,
        combination: Combination,
        readout: Readout | None,
        comb_readout: Readout | None,
        schedule: str,
        engine_options: dict[str, Any],
    ) -> None:
        super().__init__()
        self.model = model
        self.combination = combination
        self.readout = readout
        self.comb_readout = comb_readout
        self.schedule = schedule
        self.engine_options = engine_options
        self._engine = self._new_engine()
        _check_keys(_keys_beside_the_model(self), model)
        self.register_state_dict_post_hook(_drop_prefix)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_add_prefix)  # type: ignore[no-untyped-call]

    def forward(self, input_list: Iterable[Pose] | Tensor) -> tuple[Tensor, Tensor]:
        """The combined prediction of a list of poses, and their predictions `[N, ...]`.

        Raises and accumulates as `Engine.combine`; `comb_readout` has acted on the first.
        """
        prediction, per_pose = self._engine.combine(
            input_list, self.combination, schedule=self.schedule
        )
        own = _parts_of(self.model).comb_readout
        last = own if self.comb_readout is None else self.comb_readout
        return (prediction if last is None else last(prediction)), per_pose

    def score(self, pose: Pose) -> Tensor:
        """The prediction of one pose, as the combination gets it."""
        model: Any = self.model
        owner = _parts_of(model).owner
        output = model(pose) if owner is None else super(owner, model).forward(pose)
        prediction: Tensor = output[0] if isinstance(output, tuple) else output
        return prediction if self.readout is None else self.readout(prediction)

    def extra_repr(self) -> str:
        """What printing shows beside the parts."""
        return f"schedule={self.schedule!r}"

    def _new_engine(self) -> Engine:
        # Of the whole module, not of its parts: a part that is replaced is seen.
        return Engine(self, predict=Grouped.score, **self.engine_options)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        del state["_engine"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._engine = self._new_engine()


class _Parts(NamedTuple):
    """What a model of mtenn's brings along.

    Args:
        owner: The class whose forward takes a list; the one behind it in the order of inheritance
            has the forward of one pose. None for a model of one pose.
        combination: The combination of a GroupedModel.
        readout: What the forward of one pose ends with.
        comb_readout: What a GroupedModel's forward ends with.
    """

    owner: Any = None
    combination: Any = None
    readout: Readout | None = None
    comb_readout: Readout | None = None


def _parts_of(model: Any) -> _Parts:
    owner = next((c for c in type(model).__mro__ if c.__name__ == "GroupedModel"), None)
    if owner is not None:
        return _Parts(owner, model.combination, model.readout, model.comb_readout)
    is_of_mtenn = hasattr(model, "strategy") and hasattr(model, "readout")
    return _Parts(readout=model.readout) if is_of_mtenn else _Parts()


def _check_only_one(option: str, given: object, name: str, own: object) -> None:
    if given is not None and own is not None:
        raise ValueError(
            f"{option} is given, but model.{name} is a {type(own).__name__} already, and there is "
            f"one place for the two.\nLeave {option} out, or set model.{name} = None."
        )


def _check_keys(keys: set[str], model: nn.Module) -> None:
    shared = sorted(keys & model.state_dict().keys())
    if shared:
        raise ValueError(
            f"state_dict would hold two tensors under one name: {', '.join(shared)}, of the model "
            f"and of the combination or a readout.\n"
            f"Rename that part of the model, or set it to None there if it is the same one."
        )


def _keys_beside_the_model(module: nn.Module) -> set[str]:
    parts = {name: part for name, part in module.named_children() if name != "model"}
    return {f"{name}.{key}" for name, part in parts.items() for key in part.state_dict()}


def _drop_prefix(
    module: nn.Module, state: MutableMapping[str, Any], prefix: str, metadata: object
) -> None:
    """Saves the model's entries under GroupedModel's names, `representation...`."""
    inner = f"{prefix}model."
    for key in [key for key in state if key.startswith(inner)]:
        state[prefix + key.removeprefix(inner)] = state.pop(key)


def _add_prefix(
    module: nn.Module, state: MutableMapping[str, Any], prefix: str, *_: object
) -> None:
    """Loads what `_drop_prefix`, or a GroupedModel, saved."""
    others = {prefix + key for key in _keys_beside_the_model(module)}
    for key in [key for key in state if key.startswith(prefix) and key not in others]:
        state[f"{prefix}model.{key.removeprefix(prefix)}"] = state.pop(key)
