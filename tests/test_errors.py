"""Law 7: bad input raises its named error, says what to do, and leaves `.grad` alone."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch_geometric.data import Data

import posegrad
from posegrad import (
    AttentionPooling,
    Combined,
    Engine,
    HigherOrderError,
    Mean,
    Min,
    NonFinitePredictionError,
    NoPosesError,
    NotDifferentiableError,
    PerPoseLossError,
    PosegradError,
    PosesError,
    PosesMixError,
    ReentrantCheckpointError,
    ShapeMismatchError,
    StaleParametersError,
    TopK,
    UnsupportedModuleError,
    UntrackedTensorError,
)
from tests.device import DEVICE, seeded
from tests.models import FEATURES, MODELS, Checkpointed


def _poses(count: int = 4) -> Tensor:
    return torch.randn(count, FEATURES, generator=seeded(1))


def _predicting(function: Callable[[nn.Module, Tensor], Any]) -> dict[str, Any]:
    return {"predict": function}


def _nan_at_two_poses() -> list[Tensor]:
    poses = _poses()
    poses[1], poses[3] = float("nan"), float("inf")
    return list(poses)


LINEAR = nn.Linear(FEATURES, 1)
OUTSIDE = nn.Parameter(torch.ones(FEATURES))
CHANGING_SHAPE = iter([1, 1, 2, 2] * 10)


@dataclass
class Bad:
    """One kind of bad input to `combine`: what is wrong, and what must be said."""

    error: type[Exception]
    match: str
    poses: Any = field(default_factory=lambda: list(_poses()))
    rule: Any = field(default_factory=Mean)
    model: Callable[[], nn.Module] = MODELS["mlp"]
    engine: dict[str, Any] = field(default_factory=dict)
    combine: dict[str, Any] = field(default_factory=dict)


IN_COMBINE = {
    "no poses": Bad(NoPosesError, r"no poses: a combination of none", poses=[]),
    "empty tensor": Bad(NoPosesError, r"no poses", poses=torch.zeros(0, FEATURES)),
    "empty generator": Bad(NoPosesError, r"no poses", poses=iter(())),
    "a ragged mapping": Bad(
        PosesError,
        r"poses is a dict.*not the same for all: x \[2\], y\.0 \[3, 1\].*\n.*\[pose\]",
        poses={"x": torch.ones(2), "y": [torch.ones(3, 1)]},
    ),
    "a mapping of numbers": Bad(PosesError, r"holds no tensor", poses={"x": 1.0}),
    "a mapping with an array": Bad(
        PosesError,
        r"but names, z cannot be sliced",
        poses={"x": torch.ones(2, 3), "names": ["a", "b"], "z": np.ones(2)},
    ),
    "a single-pose model": Bad(
        ShapeMismatchError,
        r"shape \[\] for poses 0 to 3.*\n.*list\(poses\), which is walked",
        poses=_poses(),
        engine=_predicting(lambda model, x: model(x).sum()),
    ),
    "poses that mix": Bad(
        PosesMixError,
        r"activations of: 0 \(at Sub\)\..*\n.*\n.*list\(poses\).*chunk_size",
        poses=_poses(),
        engine=_predicting(lambda model, x: model[2](model[0](x) - model[0](x).mean(0))),
    ),
    "a graph of PyG": Bad(
        PosesError, r"poses is a Data, one graph.*\n.*\[pose\]", poses=Data(x=torch.ones(2, 3))
    ),
    "a rule that returns no tensor": Bad(
        TypeError,
        r"rule made a dict of the.*\n.*a tuple of tensors",
        rule=lambda y: {"low": y.min()},
    ),
    "a rule that returns more than tensors": Bad(
        TypeError, r"rule made a tuple of 2 with a float in it", rule=lambda y: (y.min(), 1.0)
    ),
    "a rule that returns nothing": Bad(TypeError, r"rule made a tuple of 0", rule=lambda y: ()),
    "a rule with weights for poses of groups of several sizes": Bad(
        ShapeMismatchError,
        r"shapes \[\[1\]\] for group 0, and \[\[3\]\] for group 1.*\n.*\n.*from per_pose",
        rule=lambda y: (y.mean(0), y.softmax(0)),
        combine={"groups": [1, 3]},
    ),
    "a rule that returns a number": Bad(
        TypeError, r"rule made", rule=lambda y: float(y.detach().min())
    ),
    "a pose without dimensions": Bad(
        ShapeMismatchError, r"without dimensions", poses=torch.ones(())
    ),
    "nan, all named": Bad(
        NonFinitePredictionError,
        r"2 of 4 poses .*: poses 1, 3, predictions nan, (nan|-?inf)",
        poses=_nan_at_two_poses(),
        engine=_predicting(lambda model, x: model[0](x).sum()),
    ),
    "nan, streamed": Bad(
        NonFinitePredictionError,
        r"poses 1, 3",
        poses=_nan_at_two_poses(),
        engine=_predicting(lambda model, x: model[0](x).sum()),
        combine={"schedule": "stream"},
    ),
    "nan, recomputed": Bad(
        NonFinitePredictionError,
        r"poses 1, 3",
        poses=_nan_at_two_poses(),
        rule=Min(),
        engine=_predicting(lambda model, x: model[0](x).sum()),
    ),
    "integer prediction": Bad(
        NotDifferentiableError,
        r"prediction of pose 0 is torch.int64",
        engine=_predicting(lambda model, x: model(x).argmax()),
    ),
    "complex prediction": Bad(
        NotDifferentiableError,
        r"prediction of pose 0 is torch.complex64.*\n.*\.real.*view_as_real",
        engine=_predicting(lambda model, x: torch.complex(model(x), model(x))),
    ),
    "tuple prediction": Bad(
        NotDifferentiableError,
        r"returned a tuple of 2 for pose 0.*\n?.*predict=",
        engine=_predicting(lambda model, x: (model(x), x)),
    ),
    "detached prediction": Bad(
        NotDifferentiableError,
        r"No prediction depends on a parameter",
        engine=_predicting(lambda model, x: model(x).detach()),
    ),
    "detached prediction, stored": Bad(
        NotDifferentiableError,
        r"No prediction depends on a parameter",
        engine=_predicting(lambda model, x: model(x).detach()),
        combine={"schedule": "store"},
    ),
    "wrong rows": Bad(
        ShapeMismatchError,
        r"shape \[1, 1\] for poses 0 to 1.*each of the 2 poses",
        poses=_poses(),
        engine={"chunk_size": 2} | _predicting(lambda model, x: model(x[:1])),
    ),
    "scalar for a chunk": Bad(
        ShapeMismatchError,
        r"shape \[\] for poses 0 to 1",
        poses=_poses(),
        engine={"chunk_size": 2} | _predicting(lambda model, x: model(x).sum()),
    ),
    "poses disagree": Bad(
        ShapeMismatchError,
        r"prediction of pose 2 is torch.float32 \[2\], that of pose 0",
        engine=_predicting(lambda model, x: model(x).expand(next(CHANGING_SHAPE)).clone()),
        combine={"schedule": "retain"},
    ),
    "list without collate": Bad(
        ValueError,
        r"one by one, each a Tensor.*collate=torch.stack",
        poses=list(_poses()),
        engine={"chunk_size": 2},
    ),
    "unknown schedule": Bad(
        ValueError, r"'fast' is unknown; .* recompute", combine={"schedule": "fast"}
    ),
    "skip_below out of range": Bad(
        ValueError, r"must lie in \[0, 1\)", combine={"skip_below": 1.5}
    ),
    "skip_below in stream": Bad(
        ValueError, r"needs all weights before", combine={"skip_below": 0.1, "schedule": "stream"}
    ),
    "a rule that cannot stream": Bad(
        ValueError, r"TopK cannot stream", rule=TopK(2), combine={"schedule": "stream"}
    ),
    "a rule that is trained cannot stream": Bad(
        ValueError,
        r"Min cannot stream.*parameters to train",
        rule=Min(nn.Parameter(torch.ones(()))),
        combine={"schedule": "stream"},
    ),
    "the class of a rule": Bad(TypeError, r"class Mean, not an instance", rule=Mean),
    "no rule": Bad(TypeError, r"rule is 3; it must be", rule=3),
    "attention on scalars": Bad(
        ShapeMismatchError, r"\[4\], but AttentionPooling\(3\)", rule=AttentionPooling(3)
    ),
    "a tensor in a closure": Bad(
        UntrackedTensorError,
        r"shape \[6\] that requires grad .* neither a parameter",
        engine=_predicting(lambda model, x: model(x * OUTSIDE)),
    ),
    "a tensor in a closure, recomputed": Bad(
        UntrackedTensorError,
        r"shape \[6\]",
        rule=Min(),
        engine=_predicting(lambda model, x: model(x * OUTSIDE)),
    ),
    "reentrant checkpoint": Bad(
        ReentrantCheckpointError,
        r"use_reentrant=False, or schedule='retain'",
        model=lambda: Checkpointed(reentrant=True),
    ),
    "reentrant checkpoint, recomputed": Bad(
        ReentrantCheckpointError,
        r"use_reentrant=True",
        rule=Min(),
        model=lambda: Checkpointed(reentrant=True),
    ),
    "lazy parameters": Bad(
        UnsupportedModuleError, r"Not initialised yet: weight, bias", model=lambda: nn.LazyLinear(1)
    ),
}


@pytest.mark.parametrize("name", IN_COMBINE)
def test_combine_refuses(name: str) -> None:
    bad = IN_COMBINE[name]
    model = bad.model()
    initialised = name != "lazy parameters"
    if initialised:
        _set_gradients(model)
    with pytest.raises(bad.error, match=rf"(?s){bad.match}"):
        Engine(model, **bad.engine).combine(bad.poses, bad.rule, **bad.combine)
    if initialised:
        _check_gradients(model)


def _step_the_optimizer(model: nn.Module, result: Combined) -> None:
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    result.prediction.backward()


def _load_parameters(model: nn.Module, result: Combined) -> None:
    model.load_state_dict({key: value + 1 for key, value in model.state_dict().items()})
    result.prediction.backward()


def _freeze(model: nn.Module, result: Combined) -> None:
    model[0].weight.requires_grad_(False)
    result.prediction.backward()


def _replace_data(model: nn.Module, result: Combined) -> None:
    model[0].weight.data = model[0].weight.data.clone()
    result.prediction.backward()


def _lose_per_pose(model: nn.Module, result: Combined) -> None:
    (result.prediction + result.per_pose.square().sum()).backward()


def _differentiate_twice(model: nn.Module, result: Combined) -> None:
    parameters = list(model.parameters())
    first = torch.autograd.grad(result.prediction.square(), parameters, create_graph=True)
    torch.autograd.grad(sum(g.square().sum() for g in first), parameters)


Act = Callable[[nn.Module, Combined], None]
IN_BACKWARD: dict[str, tuple[type[Exception], str, list[str], Act]] = {
    "optimizer step": (
        StaleParametersError,
        r"Changed between combine\(\) or embed\(\) and backward\(\): 0.weight, 0.bias",
        ["store", "stream", "recompute"],
        _step_the_optimizer,
    ),
    "loaded": (
        StaleParametersError,
        r"0.weight",
        ["store", "stream", "recompute"],
        _load_parameters,
    ),
    "frozen": (StaleParametersError, r": 0.weight.\n", ["store", "stream", "recompute"], _freeze),
    "data replaced": (
        StaleParametersError,
        r": 0.weight.\n",
        ["store", "stream", "recompute"],
        _replace_data,
    ),
    "per-pose loss": (
        PerPoseLossError,
        r"schedule='recompute'.* or 'store'",
        ["stream"],
        _lose_per_pose,
    ),
    "second derivative": (
        HigherOrderError,
        r"schedule='retain'",
        ["store", "stream", "recompute"],
        _differentiate_twice,
    ),
}


@pytest.mark.parametrize(
    ("name", "schedule"), [(name, s) for name, row in IN_BACKWARD.items() for s in row[2]]
)
def test_backward_refuses(name: str, schedule: str) -> None:
    error, match, _, act = IN_BACKWARD[name]
    model = MODELS["mlp"]()
    _set_gradients(model)
    result = Engine(model).combine(_poses(), Mean(), schedule=schedule)
    with pytest.raises(error, match=rf"(?s){match}"):
        act(model, result)
    _check_gradients(model)


def _set_gradients(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)


def _check_gradients(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert bool((p.grad == 7).all()), name


@pytest.mark.parametrize("rule", [Mean(), Min()])
def test_recompute_refuses_detached_predictions_in_backward(rule: Any) -> None:
    model = MODELS["mlp"]()
    engine = Engine(model, predict=lambda model, x: model(x).detach())
    prediction, _ = engine.combine(_poses(), rule, schedule="recompute")
    with pytest.raises(NotDifferentiableError, match="No prediction depends on a parameter"):
        prediction.backward()


def test_a_closure_recomputed_result_is_refused_by_age() -> None:
    model = MODELS["mlp"]()
    shared = model[0](torch.ones(FEATURES)).mean()  # depends on a parameter the engine knows
    engine = Engine(model, predict=lambda model, pose: model(pose) * shared)
    for schedule in ("store", "stream", "recompute"):
        with pytest.raises(UntrackedTensorError, match=r"MeanBackward0|computed before"):
            engine.combine(_poses(), Mean(), schedule=schedule)
    engine.combine(_poses(), Mean(), schedule="retain").prediction.backward()


def test_first_derivatives_with_create_graph_are_right() -> None:
    model = MODELS["mlp"]().double()
    poses = _poses().double()
    parameters = list(model.parameters())
    expected = torch.autograd.grad(Mean()(model(poses)[:, 0]).square(), parameters)
    for schedule in ("retain", "store", "stream", "recompute"):
        prediction, _ = Engine(model).combine(poses, Mean(), schedule=schedule)
        found = torch.autograd.grad(prediction.square(), parameters, create_graph=True)
        torch.testing.assert_close(found, expected)


def test_second_derivatives_with_retain() -> None:
    model = MODELS["mlp"]().double()
    poses = _poses().double()

    def curvature(prediction: Tensor) -> Tensor:
        weight = model[0].weight
        (first,) = torch.autograd.grad(prediction.square(), weight, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), weight)
        return second

    expected = curvature(Mean()(model(poses)[:, 0]))
    found = curvature(Engine(model).combine(poses, Mean(), schedule="retain").prediction)
    torch.testing.assert_close(found, expected)


def test_a_loss_that_multiplies_per_pose_by_zero_streams() -> None:
    model = MODELS["mlp"]()
    prediction, per_pose = Engine(model).combine(_poses(), Mean(), schedule="stream")
    (prediction + 0 * per_pose.sum()).backward()
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("schedule", ["store", "stream"])
def test_float16_is_refused_where_the_loss_is_not_scaled_yet(schedule: str) -> None:
    model = MODELS["mlp"]()
    with (
        torch.autocast(DEVICE.type, dtype=torch.float16),
        pytest.raises(ValueError, match=r"float16 gradients would underflow"),
    ):
        Engine(model).combine(_poses(), Mean(), schedule=schedule)


def test_float16_models_are_refused_there_too() -> None:
    model = MODELS["mlp"]().half()
    for schedule in ("store", "stream"):
        with pytest.raises(ValueError, match=r"float16 gradients would underflow"):
            Engine(model).combine(_poses().half(), Mean(), schedule=schedule)
    assert Engine(model).plan(list(_poses()), Mean()).schedule == "recompute"


class _Wrapped(nn.Module):
    """Stands in for torch's own wrapper, which needs a process group to exist."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


_Wrapped.__name__ = "DistributedDataParallel"
_Wrapped.__module__ = "torch.nn.parallel.distributed"


BAD_ENGINES: dict[str, tuple[type[Exception], str, Callable[[], Engine]]] = {
    "no module": (ValueError, r"no module", lambda: Engine()),
    "not a module": (TypeError, r"Module 0 is a function", lambda: Engine(_poses)),
    "chunk_size": (ValueError, r"chunk_size is 0", lambda: Engine(nn.Linear(1, 1), chunk_size=0)),
    "batch_dim": (
        ValueError,
        r"batch_dim=1.5 is unknown",
        lambda: Engine(nn.Linear(1, 1), batch_dim=1.5),  # type: ignore[arg-type]
    ),
    "infinite k": (ValueError, r"k is inf", lambda: TopK(float("inf"))),  # type: ignore[arg-type]
    "a schedule for an output": (
        ValueError,
        r"shape \[4, 1\] was computed from the engine's parameters.*\n.*list\(poses",
        lambda: Engine(LINEAR).plan(LINEAR(_poses()), Mean(), schedule="store"),
    ),
    "no rule for an output": (
        TypeError,
        r"rule",
        lambda: Engine(LINEAR).plan(LINEAR(_poses()), 5),  # type: ignore[arg-type]
    ),
    "no chunk_size": (
        ValueError,
        r"chunk_size is None.*Budget",
        lambda: Engine(nn.Linear(1, 1), chunk_size=None),  # type: ignore[arg-type]
    ),
    "a loss that takes numbers for targets": (
        TypeError,
        r"loss is a MSELoss.*targets\.\n.*targets\[i\]",
        lambda: Engine(nn.Linear(FEATURES, 1)).gather(_poses(), loss=nn.MSELoss(reduction="none")),
    ),
    "one inside another": (
        UnsupportedModuleError,
        r"Module 1 is inside module 0 \(as 0\)",
        lambda: Engine(*(lambda m: (m, m[0]))(nn.Sequential(nn.Linear(1, 1)))),
    ),
    "the same twice": (
        UnsupportedModuleError,
        r"the same object",
        lambda: Engine(*[nn.Linear(1, 1)] * 2),
    ),
    "wrapped": (
        UnsupportedModuleError,
        r"1 is wrapped by DistributedDataParallel.*silently stay local",
        lambda: Engine(nn.Sequential(nn.Tanh(), _Wrapped(nn.Linear(1, 1)))),
    ),
}


@pytest.mark.parametrize("name", BAD_ENGINES)
def test_engine_refuses(name: str) -> None:
    error, match, make = BAD_ENGINES[name]
    with pytest.raises(error, match=rf"(?s){match}"):
        make()


WITHOUT_PREDICT: dict[str, Callable[[Engine], object]] = {
    "combine": lambda engine: engine.combine(torch.ones(3, 1), Mean()),
    "gather": lambda engine: engine.gather(torch.ones(3, 1)),
    "plan": lambda engine: engine.plan(torch.ones(3, 1), Mean()),
}


@pytest.mark.parametrize("name", WITHOUT_PREDICT)
def test_several_modules_need_predict_to_score_poses(name: str) -> None:
    engine = Engine(nn.Linear(1, 1), nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"2 modules and cannot know.*\n.*predict=.*jacobian\(\)"):
        WITHOUT_PREDICT[name](engine)


# what reads an output, and what makes it complex
COMPLEX: dict[str, Callable[[Engine, nn.Module], object]] = {
    "jacobian": lambda engine, model: engine.jacobian(_complex(model(_poses()))),
    "backward": lambda engine, model: engine.backward(_complex(model(_poses())), Mean()),
    "compute_gramian": lambda engine, model: engine.compute_gramian(_complex(model(_poses()))),
    "gather": lambda engine, _: engine.gather(_poses(), loss=lambda y, _: _complex(y)),
}


def _complex(y: Tensor) -> Tensor:
    return torch.complex(y, y.square())


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_outputs_are_refused_by_name(name: str) -> None:
    model = MODELS["mlp"]()
    _set_gradients(model)
    match = r"output is torch.complex64 \[.*\n.*\.real.*\.abs\(\).*view_as_real"
    with pytest.raises(NotDifferentiableError, match=match):
        COMPLEX[name](Engine(model), model)
    _check_gradients(model)


@pytest.mark.parametrize("name", ["combine", "backward"])
def test_complex_weights_are_refused_by_name(name: str) -> None:
    model = MODELS["mlp"]()
    _set_gradients(model)
    J = Engine(model).jacobian(model(_poses()).squeeze(1))
    with pytest.raises(TypeError, match=r"weights are torch.complex64.*\n.*weights.imag"):
        getattr(J, name)(torch.ones(4, dtype=torch.complex64))
    _check_gradients(model)


READING_CHECKPOINTED: dict[str, Callable[[Engine, nn.Module], object]] = {
    "jacobian": lambda engine, model: engine.jacobian(model(_poses())),
    "gather": lambda engine, _: engine.gather(_poses()),
    "backward": lambda engine, model: engine.backward(model(_poses()), Mean()),
    "plan": lambda engine, model: engine.plan(model(_poses()), Mean()),
}


@pytest.mark.parametrize("name", READING_CHECKPOINTED)
def test_a_reentrant_checkpoint_names_no_schedule_where_there_is_none(name: str) -> None:
    model = Checkpointed(reentrant=True)
    with pytest.raises(ReentrantCheckpointError, match=r"no row can be read") as caught:
        READING_CHECKPOINTED[name](Engine(model), model)
    assert str(caught.value).endswith("\nUse use_reentrant=False.")


def test_the_real_wrapper_is_refused(tmp_path: Any) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(nn.Linear(2, 1))
        with pytest.raises(UnsupportedModuleError, match="wrapped by DistributedDataParallel"):
            Engine(nn.Sequential(wrapped))
    finally:
        torch.distributed.destroy_process_group()


def test_every_error_has_a_base_and_a_fitting_builtin() -> None:
    errors = [
        v for v in vars(posegrad).values() if isinstance(v, type) and issubclass(v, Exception)
    ]
    assert len(errors) > 10
    for error in errors:
        assert issubclass(error, PosegradError)
        assert error is PosegradError or len(error.__bases__) == 2, error
