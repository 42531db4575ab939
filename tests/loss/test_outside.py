"""What lies beside the engine gets the plain gradient of the sum, or is refused."""

import pytest
import torch
from torch import Tensor, nn

from posegrad import Clip, Engine, Mean
from posegrad.errors import UntrackedTensorError
from tests.loss.setting import drawn, head, losses, taken, trunk


def _noisy() -> Clip:
    return Clip(0.3, noise_multiplier=1.0, generator=torch.Generator("cpu").manual_seed(0))


def test_heads_and_inputs_get_the_gradient_of_the_sum() -> None:
    body, end, poses = trunk(), head(), drawn(6, 5).requires_grad_()
    beside = [*end.parameters(), poses]
    engine = Engine(body)
    engine.backward(losses(body, end, poses), Clip(0.3))
    assert all(t.grad is None for t in beside)  # engine.backward leaves them alone
    of_rule = taken(body.parameters())
    (3 * losses(body, end, poses).sum()).backward()
    of_sum = taken(beside)
    taken(body.parameters())

    (3 * engine.loss(losses(body, end, poses), Clip(0.3))).backward()

    torch.testing.assert_close(taken(beside), of_sum)
    for found, expected in zip(taken(body.parameters()), of_rule, strict=True):
        torch.testing.assert_close(found, 3 * expected, rtol=1e-12, atol=1e-12)


def test_what_computed_the_input_is_outside_too() -> None:
    first, body, end, poses = nn.Linear(5, 5).double(), trunk(), head(), drawn(6, 5)
    losses(body, end, first(poses)).sum().backward()
    expected = taken([*first.parameters(), *end.parameters()])
    taken(body.parameters())
    Engine(body).loss(losses(body, end, first(poses)), Mean()).backward()
    found = taken([*first.parameters(), *end.parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_of_a_parameter_that_both_use_the_engine_has_its_own() -> None:
    body = trunk()
    tied = nn.Linear(4, 8, bias=False).double()
    tied.weight = nn.Parameter(body[2].weight.detach().T.clone())
    body[2].weight = nn.Parameter(tied.weight.detach().T.clone())
    tied.weight = body[0].weight  # [8, 5]: one tensor in the engine and outside

    def both(poses: Tensor) -> Tensor:
        return body(poses).sum(1).square() + nn.functional.linear(poses, tied.weight).sum(1)

    engine, poses = Engine(body), drawn(6, 5)
    engine.backward(both(poses), Clip(0.3))
    expected = taken(body.parameters())
    engine.loss(both(poses), Clip(0.3)).backward()
    torch.testing.assert_close(taken(body.parameters()), expected, rtol=1e-12, atol=1e-12)


def test_leaves_that_have_one_gradient_in_common() -> None:
    body = trunk()
    one, other = (drawn(6, 4, seed=i).requires_grad_() for i in (1, 2))
    Engine(body).loss((body(drawn(6, 5)) + one + other).sum(1), Mean()).mul(3).backward()
    torch.testing.assert_close(one.grad, torch.full_like(one, 3.0))
    torch.testing.assert_close(other.grad, one.grad)
    one.grad.zero_()
    torch.testing.assert_close(other.grad, torch.full_like(one, 3.0))


def test_frozen_heads_cost_no_second_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    body, end = trunk(), head().requires_grad_(False)
    engine, poses = Engine(body), drawn(6, 5)
    engine.loss(losses(body, end, poses), Clip(0.3)).backward()
    taken(body.parameters())

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a second backward")

    monkeypatch.setattr(torch.autograd, "grad", never)
    engine.loss(losses(body, end, poses), Clip(0.3)).backward()
    assert all(p.grad is not None for p in body.parameters())


def test_hooks_of_what_is_outside_run_once() -> None:
    body, end, seen = trunk(), head(), []
    end.weight.register_hook(lambda gradient: seen.append(1) or 2 * gradient)
    plain = head()
    losses(trunk(), plain, drawn(6, 5)).sum().backward()
    Engine(body).loss(losses(body, end, drawn(6, 5)), Clip(0.3)).backward()
    torch.testing.assert_close(end.weight.grad, 2 * plain.weight.grad)
    assert len(seen) == 1


def test_error_refuses_them_by_shape() -> None:
    body, end = trunk(), head()
    with pytest.raises(UntrackedTensorError, match=r"(?s)'error'.*2 tensors.*Parameter \[1, 4\]"):
        Engine(body).loss(losses(body, end, drawn(6, 5)), Clip(0.3), outside="error")
    assert all(p.grad is None for p in [*body.parameters(), *end.parameters()])
    both = Engine(body, end).loss(losses(body, end, drawn(6, 5)), Clip(0.3), outside="error")
    both.backward()
    assert end.weight.grad is not None


def test_noise_refuses_them() -> None:
    body, end = trunk(), head()
    with pytest.raises(UntrackedTensorError, match=r"neither clipped nor hidden by the noise"):
        Engine(body).loss(losses(body, end, drawn(6, 5)), _noisy())
    Engine(body, end).loss(losses(body, end, drawn(6, 5)), _noisy()).backward()
    Engine(body).loss(losses(body, end.requires_grad_(False), drawn(6, 5)), _noisy()).backward()


def test_another_word_is_unknown() -> None:
    body, end = trunk(), head()
    with pytest.raises(ValueError, match="outside='mean' is unknown"):
        Engine(body).loss(losses(body, end, drawn(6, 5)), Mean(), outside="mean")
