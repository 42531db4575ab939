"""Law 7: bad input raises its named error, says what to do, and leaves `.grad` alone."""

from collections.abc import Callable, Sequence
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
from tests.reference import untouched

STACKED = torch.randn(4, FEATURES, generator=seeded(1))
NOT_FINITE = STACKED.clone()
NOT_FINITE[1], NOT_FINITE[3] = float("nan"), float("inf")
LINEAR = nn.Linear(FEATURES, 1)
OUTSIDE = nn.Parameter(torch.ones(FEATURES))
OWN_GRADIENT = ("store", "stream", "recompute")  # the schedules that write their own backward


@dataclass
class Bad:
    """One kind of bad input to `combine`: what must be said, and of which call."""

    error: type[Exception]
    match: str
    poses: Any = field(default_factory=lambda: list(STACKED))
    predict: Callable[[nn.Module, Tensor], Any] | None = None
    chunk_size: Any = "auto"
    model: Callable[[], nn.Module] = MODELS["mlp"]
    rules: Sequence[Any] = (Mean(),)
    schedules: Sequence[str] = ("auto",)
    options: dict[str, Any] = field(default_factory=dict)


# An engine streams the mean, and scores poses again for a minimum.
BOTH = (Mean(), Min())

IN_COMBINE = {
    "no poses": Bad(NoPosesError, r"no poses: a combination of none", []),
    "empty tensor": Bad(NoPosesError, r"no poses", torch.zeros(0, FEATURES)),
    "empty generator": Bad(NoPosesError, r"no poses", iter(())),
    "a ragged mapping": Bad(
        PosesError,
        r"poses is a dict.*not the same for all: x \[2\], y\.0 \[3, 1\].*\n.*\[pose\]",
        {"x": torch.ones(2), "y": [torch.ones(3, 1)]},
    ),
    "a mapping of numbers": Bad(PosesError, r"holds no tensor", {"x": 1.0}),
    "a mapping with an array": Bad(
        PosesError,
        r"but names, z cannot be sliced",
        {"x": torch.ones(2, 3), "names": ["a", "b"], "z": np.ones(2)},
    ),
    "a graph of PyG": Bad(
        PosesError, r"poses is a Data, one graph.*\n.*\[pose\]", Data(x=torch.ones(2, 3))
    ),
    "a pose without dimensions": Bad(ShapeMismatchError, r"without dimensions", torch.ones(())),
    "list without collate": Bad(
        ValueError, r"one by one, each a Tensor.*collate=torch.stack", chunk_size=2
    ),
    "a single-pose model": Bad(
        ShapeMismatchError,
        r"shape \[\] for poses 0 to 3.*\n.*list\(poses\), which is walked",
        STACKED,
        lambda model, x: model(x).sum(),
    ),
    "scalar for a chunk": Bad(
        ShapeMismatchError,
        r"shape \[\] for poses 0 to 1",
        STACKED,
        lambda model, x: model(x).sum(),
        chunk_size=2,
    ),
    "wrong rows": Bad(
        ShapeMismatchError,
        r"shape \[1, 1\] for poses 0 to 1.*each of the 2 poses",
        STACKED,
        lambda model, x: model(x[:1]),
        chunk_size=2,
    ),
    "poses disagree": Bad(
        ShapeMismatchError,
        r"prediction of pose 2 is torch.float32 \[2\], that of pose 0",
        predict=lambda model, x: model(x).expand(2 if torch.equal(x, STACKED[2]) else 1).clone(),
        schedules=["retain"],
    ),
    "poses that mix": Bad(
        PosesMixError,
        r"activations of: 0 \(at Sub\)\..*\n.*\n.*list\(poses\).*chunk_size",
        STACKED,
        lambda model, x: model[2](model[0](x) - model[0](x).mean(0)),
    ),
    "nan": Bad(
        NonFinitePredictionError,
        r"2 of 4 poses .*: poses 1, 3, predictions nan, (nan|-?inf)",
        list(NOT_FINITE),
        lambda model, x: model[0](x).sum(),
        rules=BOTH,
        schedules=["auto", "stream"],
    ),
    "integer prediction": Bad(
        NotDifferentiableError,
        r"prediction of pose 0 is torch.int64",
        predict=lambda model, x: model(x).argmax(),
    ),
    "complex prediction": Bad(
        NotDifferentiableError,
        r"prediction of pose 0 is torch.complex64.*\n.*\.real.*view_as_real",
        predict=lambda model, x: torch.complex(model(x), model(x)),
    ),
    "tuple prediction": Bad(
        NotDifferentiableError,
        r"returned a tuple of 2 for pose 0.*\n?.*predict=",
        predict=lambda model, x: (model(x), x),
    ),
    "detached prediction": Bad(
        NotDifferentiableError,
        r"No prediction depends on a parameter",
        predict=lambda model, x: model(x).detach(),
        schedules=["auto", "store"],
    ),
    "a tensor in a closure": Bad(
        UntrackedTensorError,
        r"shape \[6\] that requires grad .* neither a parameter",
        predict=lambda model, x: model(x * OUTSIDE),
        rules=BOTH,
    ),
    "reentrant checkpoint": Bad(
        ReentrantCheckpointError,
        r"use_reentrant=True.*use_reentrant=False, or schedule='retain'",
        model=lambda: Checkpointed(reentrant=True),
        rules=BOTH,
    ),
    "lazy parameters": Bad(
        UnsupportedModuleError, r"Not initialised yet: weight, bias", model=lambda: nn.LazyLinear(1)
    ),
    "a rule that returns no tensor": Bad(
        TypeError,
        r"rule made a dict of the.*\n.*a tuple of tensors",
        rules=[lambda y: {"low": y.min()}],
    ),
    "a rule that returns more than tensors": Bad(
        TypeError, r"rule made a tuple of 2 with a float in it", rules=[lambda y: (y.min(), 1.0)]
    ),
    "a rule that returns nothing": Bad(TypeError, r"rule made a tuple of 0", rules=[lambda y: ()]),
    "a rule that returns a number": Bad(
        TypeError, r"rule made", rules=[lambda y: float(y.detach().min())]
    ),
    "a rule with weights for poses of groups of several sizes": Bad(
        ShapeMismatchError,
        r"shapes \[\[1\]\] for group 0, and \[\[3\]\] for group 1.*\n.*\n.*from per_pose",
        rules=[lambda y: (y.mean(0), y.softmax(0))],
        options={"groups": [1, 3]},
    ),
    "the class of a rule": Bad(TypeError, r"class Mean, not an instance", rules=[Mean]),
    "no rule": Bad(TypeError, r"rule is 3; it must be", rules=[3]),
    "attention on scalars": Bad(
        ShapeMismatchError, r"\[4\], but AttentionPooling\(3\)", rules=[AttentionPooling(3)]
    ),
    "a rule that cannot stream": Bad(
        ValueError, r"TopK cannot stream", rules=[TopK(2)], schedules=["stream"]
    ),
    "a rule that is trained cannot stream": Bad(
        ValueError,
        r"Min cannot stream.*parameters to train",
        rules=[Min(nn.Parameter(torch.ones(())))],
        schedules=["stream"],
    ),
    "unknown schedule": Bad(ValueError, r"'fast' is unknown; .* recompute", schedules=["fast"]),
    "skip_below out of range": Bad(
        ValueError, r"must lie in \[0, 1\)", options={"skip_below": 1.5}
    ),
    "skip_below in stream": Bad(
        ValueError,
        r"needs all weights before",
        schedules=["stream"],
        options={"skip_below": 0.1},
    ),
}


@pytest.mark.parametrize(
    ("name", "rule", "schedule"),
    [
        (n, rule, how)
        for n, bad in IN_COMBINE.items()
        for rule in bad.rules
        for how in bad.schedules
    ],
)
def test_combine_refuses(name: str, rule: Any, schedule: str) -> None:
    bad = IN_COMBINE[name]
    model = bad.model()
    with untouched(model), pytest.raises(bad.error, match=rf"(?s){bad.match}"):
        Engine(model, predict=bad.predict, chunk_size=bad.chunk_size).combine(
            bad.poses, rule, schedule=schedule, **bad.options
        )


def _load(model: nn.Module) -> None:
    model.load_state_dict({key: value + 1 for key, value in model.state_dict().items()})


def _replace_data(model: nn.Module) -> None:
    model[0].weight.data = model[0].weight.data.clone()


# what is done between combine and backward, and which parameters are then named
CHANGES: dict[str, tuple[str, Callable[[nn.Module], object]]] = {
    "optimizer step": (
        r"Changed between combine\(\) or embed\(\) and backward\(\): 0.weight, 0.bias",
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1).step(),
    ),
    "loaded": (r"0.weight", _load),
    "frozen": (r": 0.weight.\n", lambda model: model[0].weight.requires_grad_(False)),
    "data replaced": (r": 0.weight.\n", _replace_data),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("schedule", OWN_GRADIENT)
def test_parameters_changed_before_backward_are_named(name: str, schedule: str) -> None:
    model = MODELS["mlp"]()
    match, change = CHANGES[name]
    with untouched(model):
        prediction, _ = Engine(model).combine(STACKED, Mean(), schedule=schedule)
        change(model)
        with pytest.raises(StaleParametersError, match=match):
            prediction.backward()


def test_a_loss_of_each_pose_cannot_stream() -> None:
    model = MODELS["mlp"]()
    with untouched(model):
        prediction, per_pose = Engine(model).combine(STACKED, Mean(), schedule="stream")
        loss = prediction + per_pose.square().sum()
        with pytest.raises(PerPoseLossError, match=r"(?s)schedule='recompute'.* or 'store'"):
            loss.backward()


def test_a_loss_that_multiplies_per_pose_by_zero_streams() -> None:
    model = MODELS["mlp"]()
    prediction, per_pose = Engine(model).combine(STACKED, Mean(), schedule="stream")
    (prediction + 0 * per_pose.sum()).backward()
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("schedule", OWN_GRADIENT)
def test_second_derivatives_are_refused(schedule: str) -> None:
    model = MODELS["mlp"]()
    with untouched(model):
        prediction = Engine(model).combine(STACKED, Mean(), schedule=schedule).prediction
        with pytest.raises(HigherOrderError, match=r"schedule='retain'"):
            _second_derivatives(prediction, model)


def test_second_derivatives_with_retain() -> None:
    model, poses = MODELS["mlp"]().double(), STACKED.double()
    expected = _second_derivatives(Mean()(model(poses)[:, 0]), model)
    prediction = Engine(model).combine(poses, Mean(), schedule="retain").prediction
    torch.testing.assert_close(_second_derivatives(prediction, model), expected)


def _second_derivatives(prediction: Tensor, model: nn.Module) -> tuple[Tensor, ...]:
    first = _first_derivatives(prediction, model)
    norm = torch.stack([gradient.square().sum() for gradient in first]).sum()
    return torch.autograd.grad(norm, list(model.parameters()))


def _first_derivatives(prediction: Tensor, model: nn.Module) -> tuple[Tensor, ...]:
    return torch.autograd.grad(prediction.square(), list(model.parameters()), create_graph=True)


@pytest.mark.parametrize("schedule", ["retain", *OWN_GRADIENT])
def test_first_derivatives_with_create_graph_are_right(schedule: str) -> None:
    model, poses = MODELS["mlp"]().double(), STACKED.double()
    expected = _first_derivatives(Mean()(model(poses)[:, 0]), model)
    prediction = Engine(model).combine(poses, Mean(), schedule=schedule).prediction
    torch.testing.assert_close(_first_derivatives(prediction, model), expected)


@pytest.mark.parametrize("rule", [Mean(), Min()])
def test_recompute_refuses_detached_predictions_in_backward(rule: Any) -> None:
    model = MODELS["mlp"]()
    engine = Engine(model, predict=lambda model, x: model(x).detach())
    prediction, _ = engine.combine(STACKED, rule, schedule="recompute")
    with pytest.raises(NotDifferentiableError, match="No prediction depends on a parameter"):
        prediction.backward()


def test_a_closure_recomputed_result_is_refused_by_age() -> None:
    model = MODELS["mlp"]()
    shared = model[0](torch.ones(FEATURES)).mean()  # depends on a parameter the engine knows
    engine = Engine(model, predict=lambda model, pose: model(pose) * shared)
    for schedule in OWN_GRADIENT:
        with pytest.raises(UntrackedTensorError, match=r"MeanBackward0|computed before"):
            engine.combine(STACKED, Mean(), schedule=schedule)
    engine.combine(STACKED, Mean(), schedule="retain").prediction.backward()


@pytest.mark.parametrize("schedule", ["store", "stream"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_float16_is_refused_where_the_loss_is_not_scaled_yet(
    schedule: str, dtype: torch.dtype
) -> None:
    """As the model's own type, or as that of autocast."""
    engine, poses = Engine(MODELS["mlp"]().to(dtype)), STACKED.to(dtype)
    autocast = torch.autocast(DEVICE.type, torch.float16, enabled=dtype != torch.float16)
    with autocast, pytest.raises(ValueError, match=r"float16 gradients would underflow"):
        engine.combine(poses, Mean(), schedule=schedule)


def test_float16_models_are_planned_to_recompute() -> None:
    assert Engine(MODELS["mlp"]().half()).plan(list(STACKED), Mean()).schedule == "recompute"


class _Wrapped(nn.Module):
    """Stands in for torch's own wrapper, which needs a process group to exist."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


_Wrapped.__name__ = "DistributedDataParallel"
_Wrapped.__module__ = "torch.nn.parallel.distributed"


BAD_ENGINES: dict[str, tuple[type[Exception], str, Callable[[], Engine]]] = {
    "no module": (ValueError, r"no module", lambda: Engine()),
    "not a module": (TypeError, r"Module 0 is a function", lambda: Engine(_complex)),
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
        lambda: Engine(LINEAR).plan(LINEAR(STACKED), Mean(), schedule="store"),
    ),
    "no rule for an output": (
        TypeError,
        r"rule",
        lambda: Engine(LINEAR).plan(LINEAR(STACKED), 5),  # type: ignore[arg-type]
    ),
    "no chunk_size": (
        ValueError,
        r"chunk_size is None.*Budget",
        lambda: Engine(nn.Linear(1, 1), chunk_size=None),  # type: ignore[arg-type]
    ),
    "a loss that takes numbers for targets": (
        TypeError,
        r"loss is a MSELoss.*targets\.\n.*targets\[i\]",
        lambda: Engine(nn.Linear(FEATURES, 1)).gather(STACKED, loss=nn.MSELoss(reduction="none")),
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
    "jacobian": lambda engine, model: engine.jacobian(_complex(model(STACKED))),
    "backward": lambda engine, model: engine.backward(_complex(model(STACKED)), Mean()),
    "compute_gramian": lambda engine, model: engine.compute_gramian(_complex(model(STACKED))),
    "gather": lambda engine, _: engine.gather(STACKED, loss=lambda y, _: _complex(y)),
}


def _complex(y: Tensor) -> Tensor:
    return torch.complex(y, y.square())


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_outputs_are_refused_by_name(name: str) -> None:
    model = MODELS["mlp"]()
    match = r"output is torch.complex64 \[.*\n.*\.real.*\.abs\(\).*view_as_real"
    with untouched(model), pytest.raises(NotDifferentiableError, match=match):
        COMPLEX[name](Engine(model), model)


@pytest.mark.parametrize("name", ["combine", "backward"])
def test_complex_weights_are_refused_by_name(name: str) -> None:
    model = MODELS["mlp"]()
    J = Engine(model).jacobian(model(STACKED).squeeze(1))
    match = r"weights are torch.complex64.*\n.*weights.imag"
    with untouched(model), pytest.raises(TypeError, match=match):
        getattr(J, name)(torch.ones(4, dtype=torch.complex64))


READING_CHECKPOINTED: dict[str, Callable[[Engine, nn.Module], object]] = {
    "jacobian": lambda engine, model: engine.jacobian(model(STACKED)),
    "gather": lambda engine, _: engine.gather(STACKED),
    "backward": lambda engine, model: engine.backward(model(STACKED), Mean()),
    "plan": lambda engine, model: engine.plan(model(STACKED), Mean()),
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
