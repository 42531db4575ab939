"""Models of forces: energies differentiated by places inside the model."""

import pytest
import torch
from torch import Tensor, nn

from posegrad import Engine
from tests.reference import rows, trainable

F64 = torch.float64

ACTIVATIONS = [nn.Tanh(), nn.SiLU(), nn.Sigmoid(), nn.Softplus(), nn.GELU(), nn.ELU()]


class Forces(nn.Module):
    """An energy of each place and the square of its force, behind layer norms."""

    def __init__(self, activation: nn.Module, *, affine: bool = True) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in (3, 6):
            norm = nn.LayerNorm(6, elementwise_affine=affine)
            layers += [nn.Linear(width, 6), norm, activation]
        self.energy = nn.Sequential(*layers, nn.Linear(6, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        energy = self.energy(x)
        (force,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return (energy + force.square().sum(-1, keepdim=True)).flatten(1).sum(1)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(5, 3), (4, 2, 3)])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: type(a).__name__)
def test_forces_are_exact_by_one_backward(
    activation: nn.Module, shape: tuple[int, ...], *, affine: bool
) -> None:
    torch.manual_seed(0)
    model = Forces(activation, affine=affine).double()
    engine = Engine(model)
    for _ in range(2):
        x = torch.randn(shape, dtype=F64)
        expected = rows(model(x), trainable(model))
        J = engine.jacobian(model(x))
        torch.testing.assert_close(J.matrix(), expected)
    assert "1 backward to the activations" in J.report()
    assert all(path.startswith("closed form") for own in J.paths.values() for path in own)


@pytest.mark.parametrize("check", ["first", "never"])
@pytest.mark.parametrize("by", ["weight", "input", "both"])
def test_penalties_on_gradients_of_a_layer_norm(by: str, check: str) -> None:
    """Its backward has three outputs; the gradient of the scale does not depend on the scale."""
    model = nn.Sequential(nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1)).double()
    samples = [torch.randn(5, 4, dtype=torch.float64) for _ in range(3)]

    def penalty(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_(by != "weight")
        scale = model[0].weight
        sources = {"weight": [scale], "input": [x], "both": [scale, x]}[by]
        found = torch.autograd.grad(model(x).square().mean(), sources, create_graph=True)
        return torch.stack([g.square().sum() for g in found]).sum()

    engine = Engine(model, check=check)
    for _ in range(3):
        output = torch.stack([penalty(x) for x in samples])
        expected = rows(output, trainable(model))
        torch.testing.assert_close(engine.jacobian(output).matrix(), expected)
