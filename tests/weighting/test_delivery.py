"""What becomes of a rule's gradients: `.grad`, without a copy, and nobody else's."""

import pytest
import torch
from torch import Tensor, nn

from posegrad import Engine, Mean
from posegrad.jacobian import Jacobian
from posegrad.testing import peak_live_bytes
from posegrad.weighting import GradientRule, Step


class Keeping(GradientRule):
    """Keeps what it returns, as a rule with a running mean does; `twice` names one result twice."""

    def __init__(self, twice: tuple[str, str] | None = None) -> None:
        super().__init__()
        self.kept: dict[str, Tensor] = {}
        self.twice = twice

    def step(self, jacobian: Jacobian) -> Step:
        gradients = jacobian.combine(torch.ones_like(jacobian.predictions))
        if self.twice:
            gradients[self.twice[1]] = gradients[self.twice[0]]
        else:
            self.kept = dict(gradients)
        return Step(gradients, None)


def _square() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), torch.randn(5, 4)


def test_what_a_rule_keeps_is_not_the_grad() -> None:
    model, X = _square()
    rule = Keeping()
    Engine(model).backward(model(X).sum(1), rule)
    kept = {name: value.clone() for name, value in rule.kept.items()}
    for p in model.parameters():
        p.grad.zero_()
    assert all(torch.equal(rule.kept[name], kept[name]) for name in kept)


def test_one_gradient_for_two_parameters_is_two_grads() -> None:
    model, X = _square()
    Engine(model).backward(model(X).sum(1), Keeping(("0.weight", "2.weight")))
    first, second = model[0].weight.grad, model[2].weight.grad
    assert torch.equal(first, second)
    first.zero_()
    assert second.any()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_become_grad_without_another_block_of_their_size(
    layout: torch.memory_format,
) -> None:
    """Two gradients of one size: a copy of both at once would be seen."""
    torch.manual_seed(0)
    kernels = (nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3))
    model = nn.Sequential(*kernels, nn.Flatten()).to(memory_format=layout)
    J = Engine(model).jacobian(model(torch.randn(1, 64, 5, 5)).sum(1))
    J.backward(Mean())  # lays rows out as it will
    size = model[0].weight.numel() * 4
    model.zero_grad()
    with peak_live_bytes() as combined:
        J.combine(torch.ones(1))
    with peak_live_bytes() as delivered:
        J.backward(Mean())
    assert delivered.bytes < combined.bytes + 1.2 * size


def test_a_grad_has_the_layout_of_its_parameter() -> None:
    model = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    Engine(model).backward(model(torch.randn(2, 4, 5, 5)).sum((1, 2, 3)), Mean())
    assert model.weight.grad.stride() == model.weight.stride()
