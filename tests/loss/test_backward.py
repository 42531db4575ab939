"""The scalar is a loss like any other: scaled, added up, used twice, never used, used too late."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from posegrad import Clip, Engine, Mean, Median, Min, PoseJacobian, SignAgreement, Weighting
from posegrad.errors import (
    HigherOrderError,
    NonFiniteGradientError,
    NoPosesError,
    NotDifferentiableError,
    StaleParametersError,
)
from tests.loss.setting import Warm, drawn, head, losses, taken, trunk


class Failing(Weighting):
    """A rule that cannot."""

    def forward(self, gramian: Tensor, predictions: Tensor) -> Tensor:
        raise ArithmeticError("no weights today")


def _model() -> nn.Module:
    return nn.Sequential(trunk(), head())


def _losses(model: nn.Module, seed: int = 0) -> Tensor:
    return (model(drawn(6, 5, seed=seed)).squeeze(1) - 1.0).square()


def _expected(rule: Any, seed: int = 0) -> list[Tensor | None]:
    model = _model()
    Engine(model).backward(_losses(model, seed), rule)
    return taken(model.parameters())


def test_the_value_is_the_weighted_sum_or_the_mean() -> None:
    model = _model()
    engine, own = Engine(model), _losses(model).detach()
    weights = engine.backward(_losses(model), Clip(0.3))
    assert weights is not None
    torch.testing.assert_close(engine.loss(_losses(model), Clip(0.3)).detach(), weights @ own)
    for rule in (Median(), SignAgreement(0.5), Mean()):
        torch.testing.assert_close(engine.loss(_losses(model), rule).detach(), own.mean())


@pytest.mark.filterwarnings("ignore:The output is a single number")
def test_any_shape_of_losses_and_a_mask() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]).bool()

    def of_tokens() -> Tensor:  # [m, T]
        return model(drawn(3, 3, 5)).squeeze(2).square()

    engine = Engine(model)
    for make in (
        lambda: of_tokens() * mask,
        lambda: of_tokens()[mask],
        lambda: (of_tokens() * mask).sum(1) / mask.sum(1),
        lambda: of_tokens().sum(),
    ):
        engine.backward(make(), Clip(0.3))
        expected = taken(model.parameters())
        loss = engine.loss(make(), Clip(0.3))
        assert loss.shape == ()
        loss.backward()
        torch.testing.assert_close(taken(model.parameters()), expected, rtol=1e-12, atol=1e-12)


def test_accumulated_steps_add_up() -> None:
    model = _model()
    engine = Engine(model)
    for seed in range(4):
        (engine.loss(_losses(model, seed), Clip(0.3)) / 4).backward()
    each = [_expected(Clip(0.3), seed) for seed in range(4)]
    for found, *gradients in zip(taken(model.parameters()), *each, strict=True):
        torch.testing.assert_close(found, sum(gradients) / 4, rtol=1e-12, atol=1e-12)


def test_another_loss_of_the_same_forward_is_added() -> None:
    """As the auxiliary loss of a mixture of experts, or a penalty on activations."""
    body, end = trunk(), head()
    engine = Engine(body, end)

    def forward() -> tuple[Tensor, Tensor]:
        features = body(drawn(6, 5))
        return (end(features).squeeze(1) - 1.0).square(), features.square().mean()

    both = [*body.parameters(), *end.parameters()]
    engine.backward(forward()[0], Clip(0.3))
    of_rule = taken(both)
    forward()[1].backward()
    of_other = taken(both)
    for order in (0, 1):
        own, other = forward()
        loss = engine.loss(own, Clip(0.3))
        (loss + 0.5 * other if order else 0.5 * other + loss).backward()
        for found, a, b in zip(taken(both), of_rule, of_other, strict=True):
            b = torch.zeros_like(a) if b is None else b
            torch.testing.assert_close(found, a + 0.5 * b, rtol=1e-12, atol=1e-12)


def test_two_rules_of_the_same_losses_add_up() -> None:
    model = _model()
    engine, own = Engine(model), _losses(model)
    (engine.loss(own, Clip(0.3)) + engine.loss(own, Median())).backward()
    pairs = zip(_expected(Clip(0.3)), _expected(Median()), strict=True)
    for found, (a, b) in zip(taken(model.parameters()), pairs, strict=True):
        torch.testing.assert_close(found, a + b, rtol=1e-12, atol=1e-12)


def test_autograd_grad_gives_the_same() -> None:
    model = _model()
    loss = Engine(model).loss(_losses(model), Clip(0.3))
    found = torch.autograd.grad(loss, [*model.parameters()])
    assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close([*found], _expected(Clip(0.3)), rtol=1e-12, atol=1e-12)


def test_a_graph_that_is_retained_can_be_used_again() -> None:
    model = _model()
    loss = Engine(model).loss(_losses(model), Clip(0.3))
    (2 * loss).backward(retain_graph=True)
    loss.backward()
    for found, once in zip(taken(model.parameters()), _expected(Clip(0.3)), strict=True):
        torch.testing.assert_close(found, 3 * once, rtol=1e-12, atol=1e-12)


def test_a_second_use_fails_as_that_of_any_graph() -> None:
    model = _model()
    loss = Engine(model).loss(_losses(model), Clip(0.3))
    loss.backward()
    before = taken(model.parameters())
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(before, _expected(Clip(0.3)))


def test_the_graph_of_the_losses_lives_until_the_backward() -> None:
    model = _model()
    own = _losses(model)
    loss = Engine(model).loss(own, Clip(0.3))
    torch.autograd.grad(own.sum(), [*model.parameters()], retain_graph=True)
    loss.backward()
    with pytest.raises(RuntimeError, match=r"(?s)a second time.*engine\.loss\(\) has freed it"):
        own.sum().backward()
    taken(model.parameters())

    own = _losses(model)
    loss = Engine(model).loss(own, Clip(0.3))
    loss.backward(retain_graph=True)
    own.sum().backward()


class Kept(torch.autograd.Function):
    """Saves a tensor that somebody watches."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, watched: list[Any]) -> Tensor:
        extra = x.detach().clone()
        watched.append(weakref.ref(extra))
        ctx.save_for_backward(extra)
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        return cotangent * 1.0, None


@pytest.mark.filterwarnings("ignore:The poses influence:UserWarning")
def test_what_the_graph_saved_is_freed_by_the_backward_or_with_the_scalar() -> None:
    model, watched = _model(), []
    engine = Engine(model)

    def own() -> Tensor:
        return Kept.apply(model[0](drawn(6, 5)), watched).sum(1).square()

    held = own()
    engine.loss(held, Clip(0.3)).backward()
    gc.collect()
    assert watched[-1]() is None  # though somebody still holds the losses

    loss = engine.loss(own(), Clip(0.3))
    del loss
    gc.collect()
    assert watched[-1]() is None  # never differentiated


def test_a_loss_that_is_never_differentiated_leaves_nothing() -> None:
    model = _model()
    engine = Engine(model)
    for seed in range(3):
        engine.loss(_losses(model, seed), Clip(0.3))
    assert all(p.grad is None for p in model.parameters())
    assert not any(p._backward_hooks for p in model.parameters())
    engine.loss(_losses(model), Clip(0.3)).backward()
    torch.testing.assert_close(taken(model.parameters()), _expected(Clip(0.3)))


def test_a_rule_that_raises_leaves_nothing() -> None:
    model = _model()
    own = _losses(model)
    engine = Engine(model)
    with pytest.raises(ArithmeticError, match="no weights today"):
        engine.loss(own, Failing())
    assert all(p.grad is None for p in model.parameters())
    engine.loss(own, Clip(0.3)).backward()  # the graph is as it was
    torch.testing.assert_close(taken(model.parameters()), _expected(Clip(0.3)))


def test_rows_that_are_not_finite_are_refused_at_the_call() -> None:
    model = _model()
    own = _losses(model) / torch.tensor([1, 1, 0, 1, 1, 1])
    with pytest.raises(NonFiniteGradientError, match="rows 2"):
        Engine(model).loss(own, Clip(0.3))
    assert all(p.grad is None for p in model.parameters())


def test_hooks_of_parameters_run_once_on_what_is_delivered() -> None:
    model, seen = _model(), []
    first = next(model.parameters())
    first.register_hook(lambda gradient: seen.append("before") or 2 * gradient)
    first.register_post_accumulate_grad_hook(lambda _: seen.append("after"))
    Engine(model).loss(_losses(model), Clip(0.3)).backward()
    assert seen == ["before", "after"]
    torch.testing.assert_close(first.grad, 2 * _expected(Clip(0.3))[0])


def test_a_rule_s_own_parameters_get_theirs_in_the_backward() -> None:
    model, rule, seen = _model(), Warm(), []
    rule.beta.register_hook(lambda gradient: seen.append(1) or gradient)
    Engine(model).backward(_losses(model), rule)
    (expected,) = taken(rule.parameters())
    loss = Engine(model).loss(_losses(model), rule)
    assert rule.beta.grad is None
    assert len(seen) == 1
    (3 * loss).backward()
    torch.testing.assert_close(rule.beta.grad, 3 * expected)
    assert len(seen) == 2


def test_without_gradients_it_is_the_mean() -> None:
    model = _model()
    engine = Engine(model)
    with torch.no_grad():
        loss = engine.loss(_losses(model), Failing())  # the rule is not asked
    torch.testing.assert_close(loss, _losses(model).mean().detach())
    assert not loss.requires_grad
    with torch.inference_mode():
        assert float(engine.loss(_losses(model), Min(scale=9.0))) == float(loss)
    own = _losses(model)
    with torch.no_grad():
        assert not engine.loss(own, Clip(0.3)).requires_grad


class Keeping(Weighting):
    """A rule that holds on to the gradient that it returned."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, Tensor] = {}

    def forward(self, gramian: Tensor, predictions: Tensor) -> Tensor:
        return torch.ones_like(predictions)

    def step(self, jacobian: Any) -> Any:
        made = super().step(jacobian)
        self.kept = dict(made.gradients)
        return made


def test_what_a_rule_keeps_is_not_written_to() -> None:
    model, rule = _model(), Keeping()
    loss = Engine(model).loss(_losses(model), rule)
    before = {name: gradient.clone() for name, gradient in rule.kept.items()}
    (3 * loss).backward()
    for name, p in model.named_parameters():
        assert torch.equal(rule.kept[name], before[name])
        torch.testing.assert_close(p.grad, 3 * before[name])


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_the_gradient_is_handed_on_without_a_copy(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, held = _model(), []
    combine = PoseJacobian.combine

    def watched(self: PoseJacobian, weights: Tensor) -> dict[str, Tensor]:
        found = combine(self, weights)
        held.extend(gradient.data_ptr() for gradient in found.values())
        return found

    monkeypatch.setattr(PoseJacobian, "combine", watched)
    (factor * Engine(model).loss(_losses(model), Clip(0.3))).backward()
    assert [p.grad.data_ptr() for p in model.parameters()] == held


def test_a_second_derivative_is_refused() -> None:
    model = _model()
    loss = Engine(model).loss(_losses(model), Clip(0.3))
    with pytest.raises(HigherOrderError, match=r"(?s)engine\.loss\(\).*create_graph=True"):
        loss.backward(create_graph=True)
    assert all(p.grad is None for p in model.parameters())


def test_parameters_that_changed_since_are_refused() -> None:
    model = _model()
    loss = Engine(model).loss(_losses(model), Clip(0.3))
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    with pytest.raises(StaleParametersError, match=r"between engine\.loss\(\) and .*: 0\.0\.w"):
        loss.backward()
    assert all(p.grad is None for p in model.parameters())


def test_heads_that_changed_since_are_refused() -> None:
    body, end = trunk(), head()
    loss = Engine(body).loss(losses(body, end, drawn(6, 5)), Clip(0.3))
    with torch.no_grad():
        end.weight.zero_()
    with pytest.raises(StaleParametersError, match=r"leaf \d Parameter \[1, 4\]"):
        loss.backward()


def test_what_has_no_rows_is_refused() -> None:
    model = _model()
    engine = Engine(model)
    with pytest.raises(NoPosesError, match=r"shape \[0\]"):
        engine.loss(_losses(model)[:0], Mean())
    with torch.no_grad(), pytest.raises(NoPosesError, match=r"shape \[0\]"):
        engine.loss(_losses(model)[:0], Mean())
    with pytest.raises(NotDifferentiableError, match="carries no graph"):
        engine.loss(_losses(model).detach(), Mean())
    with pytest.raises(TypeError, match="The output is a float"):
        engine.loss(0.5, Mean())  # type: ignore[arg-type]


def test_many_steps_do_not_grow() -> None:
    model = _model()
    engine = Engine(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    counts = []
    for step in range(8):
        optimizer.zero_grad()
        engine.loss(_losses(model, step), Clip(0.3)).backward()
        optimizer.step()
        gc.collect()
        counts.append(sum(issubclass(type(o), Tensor) for o in gc.get_objects()))
    assert counts[2] == counts[-1]
