"""Cases in which a careless engine is silently wrong, or refuses what plain autograd serves."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from posegrad import (
    Engine,
    Mean,
    Min,
    ReentrantCheckpointError,
    ShapeMismatchError,
    TopK,
    UntrackedTensorError,
)
from posegrad.testing import assert_matches_autograd
from tests.device import DEVICE
from tests.models import FEATURES, MODELS, Gated

DEFERRED = ["store", "stream", "recompute"]


def _poses(count: int = 5) -> list[Tensor]:
    return list(torch.randn(count, FEATURES))


def test_a_weight_tied_across_two_modules_is_counted_once() -> None:
    a, b = nn.Linear(FEATURES, 1), nn.Linear(FEATURES, 1)
    b.weight = a.weight
    batch = torch.stack(_poses())
    (expected,) = torch.autograd.grad(Mean()((a(batch) + b(batch))[:, 0]), a.weight)
    for schedule in DEFERRED:
        a.zero_grad()
        engine = Engine(a, b, predict=lambda a, b, x: a(x) + b(x))
        engine.combine(list(batch), Mean(), schedule=schedule).prediction.backward()
        torch.testing.assert_close(a.weight.grad, expected)


@pytest.mark.parametrize("schedule", DEFERRED)
def test_a_pose_reached_through_a_closure_is_refused(schedule: str) -> None:
    poses = [x.clone().requires_grad_() for x in _poses()]
    engine = Engine(MODELS["mlp"](), predict=lambda model, x: model(x) * poses[0].sum())
    with pytest.raises(UntrackedTensorError, match="neither a parameter"):
        engine.combine(poses, Mean(), schedule=schedule)


class Prototypes(nn.Module):
    """Its poses are its own parameters, which it also uses directly."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, 1)
        self.points = nn.ParameterList([nn.Parameter(x) for x in _poses(4)])

    def forward(self, pose: Tensor) -> Tensor:
        return torch.tanh(self.linear(pose)) + sum(p.square().sum() for p in self.points)


@pytest.mark.parametrize("schedule", DEFERRED)
def test_a_parameter_that_is_also_a_pose(schedule: str) -> None:
    model = Prototypes().double()
    parameters = list(model.parameters())
    rows = torch.cat([model(p) for p in model.points])
    expected = torch.autograd.grad(Min(2.0)(rows), parameters)
    Engine(model).combine(list(model.points), Min(2.0), schedule=schedule).prediction.backward()
    torch.testing.assert_close([p.grad for p in parameters], list(expected))


class Annotating(nn.Module):
    """Writes its hidden state into the pose, as graph networks do."""

    def __init__(self, *, reuse: bool) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(FEATURES, 4), nn.Linear(4, 1)
        self.reuse = reuse

    def forward(self, pose: dict[str, Tensor]) -> Tensor:
        if not self.reuse or "h" not in pose:
            pose["h"] = torch.tanh(self.encoder(pose["x"]))
        return self.head(pose["h"])


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("schedule", DEFERRED)
def test_a_model_that_writes_into_its_poses(reuse: bool, schedule: str) -> None:
    model, engine_poses = Annotating(reuse=reuse).double(), [x.double() for x in _poses()]
    expected = torch.autograd.grad(
        Min(2.0)(torch.cat([model({"x": x}) for x in engine_poses])), list(model.parameters())
    )
    engine, poses = Engine(model), [{"x": x} for x in engine_poses]
    for _ in range(3):
        model.zero_grad()
        engine.combine(poses, Min(2.0), schedule=schedule).prediction.backward()
        torch.testing.assert_close([p.grad for p in model.parameters()], list(expected))
    assert all(pose.keys() == {"x"} for pose in poses)


@pytest.mark.parametrize("schedule", DEFERRED)
def test_poses_rebound_before_backward(schedule: str) -> None:
    leaves = [x.clone().requires_grad_() for x in _poses()]
    poses = [{"x": x} for x in leaves]
    engine = Engine(MODELS["mlp"](), predict=lambda model, pose: model(pose["x"]))
    prediction, _ = engine.combine(poses, Mean(), schedule=schedule)
    for pose in poses:
        pose["x"] = pose["x"].detach()
    prediction.backward()
    assert all(x.grad is not None for x in leaves)


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_coupled_poses_whose_predictions_hide_it(chunk_size: int) -> None:
    poses = torch.stack(_poses(12))
    assert_matches_autograd(Gated(), poses, TopK(3), chunk_size=chunk_size)


class Island(nn.Module):
    """Computes in float32 inside the user's autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, 8)
        self.out = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, enabled=False):
            return self.out(torch.tanh(self.linear(x.float())))


@pytest.mark.parametrize("schedule", DEFERRED)
def test_a_float32_island_is_differentiated_in_float32(schedule: str) -> None:
    model, batch = Island(), torch.stack(_poses())
    expected = torch.autograd.grad(Min(1.0)(model(batch)[:, 0]), list(model.parameters()))
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        prediction, _ = Engine(model).combine(list(batch), Min(1.0), schedule=schedule)
    prediction.backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], list(expected))


def _enabled(model: nn.Module, x: Tensor) -> Tensor:
    with torch.enable_grad():
        return model(x)


def _own_leaf(model: nn.Module, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        energy = model(x).sum()
        (force,) = torch.autograd.grad(energy, x, create_graph=True)
    return energy - force.square().sum()


PREDICTS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "a model that enables gradients": _enabled,
    "a leaf made inside forward": _own_leaf,
    "an expanded prediction": lambda model, x: model(x).expand(2)[:1],
}


@pytest.mark.parametrize("name", PREDICTS)
def test_unusual_models_match_autograd(name: str) -> None:
    assert_matches_autograd(MODELS["mlp"](), _poses(), Min(2.0), predict=PREDICTS[name])


def test_a_leaf_that_somebody_holds_is_still_refused() -> None:
    held: list[Tensor] = []

    def predict(model: nn.Module, x: Tensor) -> Tensor:
        held.append(x.clone().requires_grad_())
        return model(held[-1])

    with pytest.raises(UntrackedTensorError, match="neither a parameter"):
        Engine(MODELS["mlp"](), predict=predict).combine(_poses(), Mean())


def test_editing_the_results_does_not_disturb_the_replay() -> None:
    model = MODELS["mlp"]()
    prediction, per_pose = Engine(model).combine(_poses(), Min(1.0), schedule="recompute")
    per_pose.detach().neg_()
    prediction.backward()
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("schedule", DEFERRED)
def test_unfreezing_between_combine_and_backward(schedule: str) -> None:
    model = MODELS["mlp"]()
    model[0].requires_grad_(False)
    prediction, _ = Engine(model).combine(_poses(), Mean(), schedule=schedule)
    model[0].requires_grad_(True)
    prediction.backward()
    assert model[0].weight.grad is None
    assert model[-1].weight.grad is not None


@pytest.mark.parametrize("schedule", DEFERRED)
def test_in_place_operations_on_poses_from_upstream(schedule: str) -> None:
    encoder = nn.Linear(3, FEATURES)
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(FEATURES, 1))
    atoms = torch.randn(4, 3)
    expected = torch.autograd.grad(Mean()(model(encoder(atoms))[:, 0]), encoder.weight)
    poses = [encoder(x) for x in atoms]
    prediction, _ = Engine(model).combine(poses, Mean(), schedule=schedule)
    torch.testing.assert_close(torch.autograd.grad(prediction, encoder.weight), expected)


@pytest.mark.parametrize("schedule", DEFERRED)
def test_predictions_that_disagree_are_named_by_every_schedule(schedule: str) -> None:
    widths = iter([2, 3, 2])
    engine = Engine(MODELS["mlp"](), predict=lambda model, x: model(x).expand(next(widths)))
    with pytest.raises(ShapeMismatchError, match=r"pose 1 is torch.float32 \[3\]"):
        engine.combine(_poses(3), Mean(), schedule=schedule)


@pytest.mark.parametrize("schedule", DEFERRED)
def test_inference_tensors_can_be_poses(schedule: str) -> None:
    with torch.inference_mode():
        batch: Any = _poses()
    model = MODELS["mlp"]()
    Engine(model).combine([x.clone() for x in batch], Mean(), schedule=schedule)[0].backward()
    assert model[0].weight.grad is not None


class Depositing(torch.autograd.Function):
    """A home-made checkpoint: its backward runs a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(x)
        return module(x)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, None]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.module(x), cotangent)
        return x.grad, None


@pytest.mark.parametrize("schedule", ["store", "stream"])
def test_a_function_that_deposits_gradients_itself_is_refused(schedule: str) -> None:
    model = nn.Sequential(nn.Linear(FEATURES, 4), nn.Linear(4, 1))
    model[1].weight.grad = torch.ones(1, 4)
    engine = Engine(model, predict=lambda model, x: Depositing.apply(model[0](x), model[1]))
    with pytest.raises(ReentrantCheckpointError, match="calls backward"):
        engine.combine(_poses(), Mean(), schedule=schedule)
    assert torch.equal(model[1].weight.grad, torch.ones(1, 4))
    assert model[0].weight.grad is None
