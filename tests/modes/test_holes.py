"""Where a mode could make a gradient silently wrong."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint
from torchjd.aggregation import UPGrad

from posegrad import (
    Boltzmann,
    Clip,
    Engine,
    Mean,
    Median,
    Min,
    NonFiniteGradientError,
    UnsupportedModuleError,
    Weighting,
)
from tests.device import DEVICE
from tests.modes.run import FEATURES, mlp
from tests.schedules import SCHEDULES

EPS = torch.finfo(torch.float16).eps


class CastsItself(nn.Module):
    """Autocast is the model's own affair; some poses may be left out of it."""

    def __init__(self, *, always: bool = True) -> None:
        super().__init__()
        self.layers, self.always = mlp(), always

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, torch.float16, enabled=self.always or bool(x[0] > 0)):
            return self.layers(x).float() * 1e-6


def _gradient(model: nn.Module) -> Tensor:
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def _poses(count: int = 6) -> Tensor:
    return torch.randn(count, FEATURES)


def _rows(output: Tensor, model: nn.Module) -> Tensor:
    rows = [torch.autograd.grad(y, list(model.parameters()), retain_graph=True) for y in output]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


WAYS_TO_CAST: dict[str, Callable[[], nn.Module]] = {
    "inside the model": CastsItself,
    "inside a compiled model": lambda: torch.compile(CastsItself(), backend="aot_eager"),
}


@pytest.mark.parametrize("name", WAYS_TO_CAST)
def test_a_model_that_casts_to_float16_by_itself(name: str) -> None:
    model, poses = WAYS_TO_CAST[name](), _poses()
    (1e6 * model(poses).mean()).backward()
    expected = _gradient(model)
    engine = Engine(model)
    (1e6 * engine.combine(list(poses), Mean()).prediction).backward()  # auto would stream
    assert _error(_gradient(model), expected) < 4 * EPS
    for schedule in ("stream", "store"):
        with pytest.raises(ValueError, match=f"'{schedule}'.* float16 gradients would underflow"):
            engine.combine(list(poses), Mean(), schedule=schedule)
    assert all(p.grad is None for p in model.parameters())


def test_float16_that_only_a_later_pose_goes_through() -> None:
    model, poses = CastsItself(always=False), _poses()
    poses[:, 0] = torch.tensor([-1.0, -1.0, 1.0, -1.0, -1.0, -1.0])
    with pytest.raises(ValueError, match=r"The schedule .* float16 gradients would underflow"):
        Engine(model).combine(list(poses), Mean())
    Engine(model).combine(list(poses), Mean(), schedule="recompute").prediction.backward()
    assert _gradient(model).isfinite().all()


def _tokens() -> nn.Module:
    return nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 1))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "mlp": (mlp, _poses),
    "weight norm": (
        lambda: nn.Sequential(
            weight_norm(nn.Linear(FEATURES, 4)), nn.LayerNorm(4), nn.Linear(4, 1)
        ),
        _poses,
    ),
    "embedding": (_tokens, lambda m: torch.randint(5, (m, 2))),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("keep", [False, True])
def test_a_jacobian_does_not_underflow_in_float16(name: str, keep: bool) -> None:
    """Losses of one engine may be of any size, one after another."""
    make, draw = MODELS[name]
    model = make()
    engine = Engine(model)
    for size in (1e-6, 1.0, 1e-7, 1e4, 1e-3):
        poses = draw(5)
        expected = _rows(model.double()(_as(poses, torch.float64)).squeeze(1) * size, model)
        model.float()
        with torch.autocast(DEVICE.type, torch.float16):
            output = model(poses).squeeze(1).float() * size
        J = engine.jacobian(output, retain_graph=keep)
        assert _error(J.matrix(), expected) < 4 * EPS
        assert _error(J.gramian(), expected @ expected.T) < 4 * EPS
        assert J.gramian().dtype == torch.float32
        if keep:
            output.sum().backward()
        else:
            with pytest.raises(RuntimeError, match="second time"):
                output.sum().backward()


def _as(poses: Tensor, dtype: torch.dtype) -> Tensor:
    return poses.to(dtype) if poses.is_floating_point() else poses


def test_rows_of_nan_are_nan_in_float16_too() -> None:
    model, poses = mlp(), _poses()
    engine = Engine(model)
    poses[2] = torch.nan
    with torch.autocast(DEVICE.type, torch.float16):
        losses = model(poses).squeeze(1).float()
    J = engine.jacobian(losses)
    assert J.norms().isnan().tolist() == [False, False, True, False, False, False]
    with pytest.raises(NonFiniteGradientError, match=r"rows 2\.\n.*\n.*scaler=scaler"):
        J.backward(Clip(1.0))
    assert all(p.grad is None for p in model.parameters())
    weights = J.backward(Clip(1.0), scaler=torch.amp.GradScaler(DEVICE.type))
    assert weights.isnan().all()
    assert _gradient(model).isnan().all()


RULES: dict[str, Callable[[], Any]] = {
    "Clip": lambda: Clip(1e-6),
    "UPGrad": UPGrad,
    "Median": Median,
    "Min": lambda: Min(2.0),
}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_under_a_scaler_sees_true_gradients(name: str) -> None:
    """So a threshold is in the unit of the losses, whatever the scale is at the moment."""
    model, poses = mlp(), _poses()
    engine = Engine(model)
    engine.backward(model(poses).squeeze(1) * 1e-6, RULES[name]())
    expected = _gradient(model)
    for scale in (2.0**4, 2.0**16, 2.0**30):
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=scale)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with torch.autocast(DEVICE.type, torch.float16):
            losses = model(poses).squeeze(1).float() * 1e-6
        engine.backward(losses, RULES[name](), scaler=scaler)
        scaler.unscale_(optimizer)
        assert _error(_gradient(model), expected) < 8 * EPS


def test_a_trained_rule_is_scaled_like_the_model() -> None:
    model, poses, scale = mlp(), _poses(), nn.Parameter(torch.tensor(2.0))
    Engine(model).backward(model(poses).squeeze(1), Min(scale))
    expected, scale.grad = scale.grad, None
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**10)
    Engine(model).backward(model(poses).squeeze(1), Min(scale), scaler=scaler)
    scaler.unscale_(torch.optim.SGD([scale, *model.parameters()], lr=0.0))
    torch.testing.assert_close(scale.grad, expected)


def test_a_scaler_that_is_switched_off_skips_nothing() -> None:
    model, poses = mlp(), _poses()
    poses[2] = torch.nan
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=False)
    with pytest.raises(NonFiniteGradientError, match="rows 2"):
        Engine(model).backward(model(poses).squeeze(1), Clip(1.0), scaler=scaler)
    assert all(p.grad is None for p in model.parameters())


def test_losses_scaled_by_hand_do_not_overflow() -> None:
    """The scale cancels in the weights of rules like UPGrad, and the scaler divides by it."""
    model, poses = mlp(), _poses()
    engine = Engine(model)
    weights = engine.backward(model(poses).squeeze(1), UPGrad())
    expected = _gradient(model)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**24)  # plain autograd would overflow
    with torch.autocast(DEVICE.type, torch.float16):
        losses = model(poses).squeeze(1).float()
    found = engine.backward(scaler.scale(losses), UPGrad())
    torch.testing.assert_close(found, weights, rtol=8 * EPS, atol=8 * EPS)
    assert _error(_gradient(model) / 2.0**24, expected) < 8 * EPS


@pytest.mark.parametrize("schedule", ["retain", "recompute"])
def test_an_overflow_in_float16_is_the_scalers(schedule: str) -> None:
    model, poses = mlp(), _poses()
    before = [p.clone() for p in model.parameters()]
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**24)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with torch.autocast(DEVICE.type, torch.float16):
        prediction = Engine(model).combine(poses, Min(1.0), schedule=schedule).prediction
    scaler.scale(prediction.float()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**23
    torch.testing.assert_close(list(model.parameters()), before, rtol=0, atol=0)


class Products(Weighting):
    """Weights that come of a matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.dtype] = []

    def forward(self, gramian: Tensor, predictions: Tensor) -> Tensor:
        weights = gramian @ predictions
        self.seen += [gramian.dtype, weights.dtype]
        return weights


def test_autocast_does_not_reach_into_a_rule() -> None:
    model, poses, rule = mlp(), _poses(), Products()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        losses = model(poses).squeeze(1).float()
        Engine(model).backward(losses, rule)
        assert torch.get_autocast_dtype(DEVICE.type) == torch.bfloat16
        assert torch.is_autocast_enabled(DEVICE.type)
    assert rule.seen == [torch.float32, torch.float32]


def test_a_forward_without_graph_in_the_same_autocast_block() -> None:
    model, poses = mlp(), _poses()
    for schedule in SCHEDULES:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            with torch.no_grad():
                model(poses)
            prediction = Engine(model).combine(poses, Mean(), schedule=schedule).prediction
            (gradient,) = torch.autograd.grad(prediction, model[0].weight)
        assert bool(gradient.any())


class Everything(nn.Module):
    """Dropout inside a checkpoint, to be replayed outside of the user's autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(FEATURES, 16), nn.Dropout(0.5), nn.Tanh())
        self.head = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, x, use_reentrant=False))


def test_dropout_in_a_checkpoint_in_a_replay_outside_of_autocast() -> None:
    model, poses, found = Everything(), _poses(), {}
    for schedule in ("retain", "recompute"):
        torch.manual_seed(3)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            prediction = Engine(model).combine(poses, Min(1.0), schedule=schedule).prediction
        torch.manual_seed(4)  # whatever the user draws in between
        prediction.float().backward()
        found[schedule] = _gradient(model)
    assert _error(found["recompute"], found["retain"]) < torch.finfo(torch.bfloat16).eps


@torch._functorch.config.patch(donated_buffer=True, enable_autograd_cache=False)
def test_a_compiled_graph_that_can_be_used_once_is_named_by_combine() -> None:
    torch._dynamo.reset()
    layers = nn.Sequential(nn.Linear(FEATURES, 9), nn.Tanh(), nn.Linear(9, 1))
    model, poses = torch.compile(layers, backend="aot_eager"), _poses(4)
    model(poses[:2]).sum().backward()  # compiles a backward that frees as it goes
    engine = Engine(model, chunk_size=2)
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(UnsupportedModuleError, match="donated_buffer = False"):
        engine.combine(poses, Boltzmann(1.0), schedule="stream")  # two sums of each chunk
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=0)
    engine.combine(poses, Boltzmann(1.0), schedule="recompute").prediction.backward()


def _compiled(rule: nn.Module) -> Any:
    return torch.compile(rule, backend="eager")


def test_a_compiled_rule_is_what_it_was() -> None:
    model, poses = mlp(), _poses()
    engine = Engine(model)
    assert engine.plan(list(poses), _compiled(Mean())).schedule == "stream"
    with pytest.raises(TypeError, match="Clip looks at gradients"):
        engine.combine(poses, _compiled(Clip(1.0)))
    for make in (lambda: Clip(0.5), Median, UPGrad, lambda: Min(1.0)):
        engine.backward(model(poses).squeeze(1), make())
        expected = _gradient(model)
        engine.backward(model(poses).squeeze(1), _compiled(make()))
        torch.testing.assert_close(_gradient(model), expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo
def test_a_compiled_rule_runs_compiled_and_is_trained() -> None:
    graphs: list[Any] = []

    def backend(module: Any, inputs: Any) -> Any:
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    model, poses = mlp(), _poses()
    scale = nn.Parameter(torch.tensor(2.0))
    rule = torch.compile(Min(scale), backend=backend)
    with torch.no_grad():
        predictions = model(poses).squeeze(1)
    (expected,) = torch.autograd.grad(Min(scale)(predictions), scale)
    Engine(model).combine(poses, rule, schedule="store").prediction.backward()
    torch.testing.assert_close(scale.grad, expected)
    assert graphs
