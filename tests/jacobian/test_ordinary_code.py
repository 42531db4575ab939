"""Code that people write: exact by one backward, exact by a slow way, or refused by name."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from posegrad import Clip, Engine, Mean, Plan, UnsupportedModuleError
from tests.reference import rows, trainable
from tests.schedules import SCHEDULES


class Attention(nn.Module):
    """Self-attention, a number a token, and a sum over tokens."""

    def __init__(self, narrow: torch.dtype | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.last, self.narrow = nn.Linear(8, 1), narrow

    def forward(self, x: Tensor) -> Tensor:
        heads = [layer(x).unflatten(-1, [2, 4]).transpose(1, 2) for layer in self.layers]
        if self.narrow is not None:
            heads = [head.to(self.narrow) for head in heads]
        made = (
            nn.functional.scaled_dot_product_attention(*heads)
            .to(x.dtype)
            .transpose(1, 2)
            .flatten(-2)
        )
        tokens = self.last(made)
        if x.is_nested:
            return torch.stack([one.sum() for one in tokens.unbind()])
        return tokens.sum((1, 2))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_jagged_attention_takes_rows() -> None:
    torch.manual_seed(0)
    model = Attention().double()
    parts = [torch.randn(n, 8, dtype=torch.float64) for n in (3, 5, 2)]
    jagged = torch.nested.nested_tensor(parts, layout=torch.jagged)
    engine = Engine(model)
    expected = rows(model(jagged), trainable(model))
    with pytest.warns(UserWarning, match="Nested tensors are in the graph"):
        torch.testing.assert_close(engine.jacobian(model(jagged)).matrix(), expected)
    torch.testing.assert_close(engine.jacobian(model(jagged)).matrix(), expected)
    assert "3 backwards for rows of the whole graph" in str(engine.plan(model(jagged), Mean()))


def test_a_selective_checkpoint_is_refused_by_name_and_served_by_combine() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    x = torch.randn(5, 3, dtype=torch.float64)

    def policy(_: Any, operator: Any, *args: Any, **options: Any) -> CheckpointPolicy:
        del args, options
        is_product = operator == torch.ops.aten.addmm.default
        return CheckpointPolicy.MUST_SAVE if is_product else CheckpointPolicy.PREFER_RECOMPUTE

    def score(model: nn.Module, x: Tensor) -> Tensor:
        contexts = partial(create_selective_checkpoint_contexts, policy)
        made = checkpoint(model, x, use_reentrant=False, context_fn=contexts)
        assert isinstance(made, Tensor)
        return made.squeeze(-1)

    engine = Engine(model, predict=score)
    with pytest.raises(UnsupportedModuleError, match=r"selective activation.*\n.*context_fn=.*co"):
        engine.jacobian(score(model, x))
    assert all(p.grad is None for p in model.parameters())
    expected = torch.autograd.grad(model(x).mean(), list(model.parameters()))
    for schedule in SCHEDULES:
        model.zero_grad()
        engine.combine(list(x), Mean(), schedule=schedule).prediction.backward()
        torch.testing.assert_close([p.grad for p in model.parameters()], list(expected))


class Narrow(nn.Module):
    """A part in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float().tanh().double()


NARROW: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "float32 inside": lambda: (
        nn.Sequential(nn.Linear(8, 16), Narrow(), nn.Linear(16, 1), nn.Flatten(0)).double(),
        torch.randn(6, 8, dtype=torch.float64),
    ),
    "bfloat16 attention": lambda: (Attention(torch.bfloat16), torch.randn(6, 5, 8)),
    "float16 attention": lambda: (Attention(torch.float16), torch.randn(6, 5, 8)),
}


@pytest.mark.parametrize("name", NARROW)
def test_a_narrow_part_takes_one_backward_and_no_warning(name: str) -> None:
    torch.manual_seed(0)
    model, x = NARROW[name]()
    engine = Engine(model)
    for _ in range(3):
        output = model(x)
        expected = rows(output, trainable(model))
        J = engine.jacobian(output)
        torch.testing.assert_close(J.matrix(), expected, rtol=0.02, atol=0.02)
        assert all(path.startswith("closed form") for own in J.paths.values() for path in own)
    assert J.report().splitlines()[1] == "1 backward to the activations"


@pytest.mark.parametrize("share", [1.0, 1e-2, 1e-3, 1e-4])
def test_wrong_rows_that_are_small_beside_others_are_no_rounding(share: float) -> None:
    """Even where gradients pass bfloat16, whose rounding is as large as they are."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"large": nn.Linear(8, 1), "small": nn.Linear(8, 1)})
    x = torch.randn(6, 8)
    small = model["small"](x)
    small.register_hook(lambda cotangent: cotangent * (cotangent > 0))  # of signs, so not linear
    output = (model["large"](x) + share * small).bfloat16().float().squeeze(1)
    with pytest.warns(UserWarning, match="do not add up to autograd's for: small"):
        Engine(model).jacobian(output)


class Complex(nn.Module):
    """A complex parameter behind a real layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.phase = nn.Parameter(torch.randn(3, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) * self.phase).abs().sum(-1)


DOORS: dict[str, Callable[[Engine, nn.Module, Tensor], object]] = {
    "jacobian": lambda engine, model, x: engine.jacobian(model(x)),
    "gather": lambda engine, _, x: engine.gather(x),
    "compute_gramian": lambda engine, model, x: engine.compute_gramian(model(x)),
    "backward": lambda engine, model, x: engine.backward(model(x), Mean()),
    "plan": lambda engine, model, x: engine.plan(model(x), Mean()),
}


@pytest.mark.parametrize("door", DOORS)
def test_complex_parameters_are_refused_at_every_door(door: str) -> None:
    model = Complex()
    engine, x = Engine(model), torch.randn(4, 3)
    with pytest.raises(UnsupportedModuleError, match=r"Complex parameters: phase.*\n.*freeze"):
        DOORS[door](engine, model, x)
    assert isinstance(engine.plan(x, Mean()), Plan)  # which combine serves
    model.phase.requires_grad_(False)
    DOORS[door](engine, model, x)


class Parts(nn.Module):
    """What makes poses, and what scores them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(3, 4), nn.Linear(4, 1)


def test_poses_that_a_part_of_the_model_made_are_planned_as_poses() -> None:
    model = Parts()
    engine = Engine(model, predict=lambda model, pose: model.head(pose).squeeze(-1))
    poses = model.encoder(torch.randn(5, 3))
    for given in (poses, list(poses), poses.detach()):
        assert "poses      5 in" in str(engine.plan(given, Mean()))
    assert "poses      5 in" in str(engine.plan(poses, Mean(), groups=[2, 3]))
    prediction, _ = engine.combine(poses, Mean())
    expected = torch.autograd.grad(
        model.head(poses).mean(), list(model.parameters()), retain_graph=True
    )
    prediction.backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], list(expected))


def test_outputs_are_planned_as_outputs() -> None:
    model = Parts()
    engine = Engine(model, predict=lambda model, pose: model.head(pose).squeeze(-1))
    hidden = model.encoder(torch.randn(5, 3))
    scores = model.head(hidden)
    for output, rule in (
        (scores, Mean()),
        (scores.squeeze(1), lambda p: p.mean(0)),
        (scores.sum(), Mean()),
        (hidden, Clip(1.0)),
        (hidden, torch.ones_like(hidden)),
    ):
        assert str(engine.plan(output, rule)).startswith(f"{output.numel()} rows")
    with pytest.raises(ValueError, match=r"no groups, schedule or skip_below.*\n.*list\(poses\)"):
        engine.plan(scores, Mean(), groups=[2, 3])


@pytest.mark.parametrize("order", [[0, None, 1], [None, 0, 1], [2, 0, None], [0, None, None, 1]])
def test_a_stacked_loss_may_be_a_constant(order: list[int | None]) -> None:
    """As a regulariser that is switched off: its row is zero, wherever it stands."""
    trunk, heads = nn.Linear(3, 4), nn.ModuleList(nn.Linear(4, 1) for _ in range(3))
    model = nn.ModuleList([trunk, heads]).double()
    engine = Engine(model, check="never")
    for _ in range(3):
        h = torch.tanh(trunk(torch.randn(5, 3, dtype=torch.float64)))
        off = torch.tensor(3.0, dtype=torch.float64)
        output = torch.stack([off if k is None else heads[k](h).square().mean() for k in order])
        expected = rows(output, trainable(model))
        torch.testing.assert_close(engine.jacobian(output).matrix(), expected)
