"""Distances to points that are parameters: by every norm, from either side, however computed."""

import pytest
import torch
from torch import Tensor, nn

from posegrad import Clip, Engine
from tests.reference import gramian, rows, trainable

BY_PRODUCTS = "use_mm_for_euclid_dist"
BY_DIFFERENCES = "donot_use_mm_for_euclid_dist"


class Radial(nn.Module):
    """Radial functions of a layer's output.

    Args:
        p: The order of the norm.
        mode: How torch computes it.
        turned: Whether the centres come first.
    """

    def __init__(self, p: float, mode: str, *, turned: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(5, 1)
        self.centres = nn.Parameter(torch.randn(5, 4))
        self.p, self.mode, self.turned = p, mode, turned
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        sides = self.first(x).tanh(), self.centres
        if self.turned:
            far = torch.cdist(*reversed(sides), p=self.p, compute_mode=self.mode).mT
        else:
            far = torch.cdist(*sides, p=self.p, compute_mode=self.mode)
        scores: Tensor = self.last((-far).exp()).flatten(1).sum(1)
        return scores


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", [(6, 3), (6, 2, 3), (6, 2, 2, 3)], ids=str)
@pytest.mark.parametrize(
    ("p", "mode"),
    [(2.0, BY_PRODUCTS), *((p, BY_DIFFERENCES) for p in (2.0, 1.0, 1.5, torch.inf))],
)
def test_rows_of_centres(p: float, mode: str, shape: tuple[int, ...], *, turned: bool) -> None:
    model = Radial(p, mode, turned=turned)
    engine = Engine(model, check="never")
    for _ in range(3):
        output = model(torch.randn(shape, dtype=torch.float64))
        expected = rows(output, trainable(model))
        J = engine.jacobian(output)
        v = torch.randn(expected.shape[1], dtype=torch.float64)
        torch.testing.assert_close(J.matrix(), expected)
        torch.testing.assert_close(J.norms(), expected.norm(dim=1))
        torch.testing.assert_close(J.gramian(), gramian(expected, output.shape))
        torch.testing.assert_close(J @ v, expected @ v)
    path = "Elementwise" if mode == BY_PRODUCTS and len(shape) > 2 else "Distances"
    assert J.paths["centres"] == (f"closed form ({path})",)


def test_ragged_poses() -> None:
    model, owners = Radial(2.0, BY_DIFFERENCES, turned=False), torch.tensor([0, 1, 1, 2, 1, 0])
    points = model(torch.randn(6, 1, 3, dtype=torch.float64))
    output = torch.zeros(3, dtype=torch.float64).index_add(0, owners, points)
    expected = rows(output, trainable(model))
    J = Engine(model, check="never").jacobian(output)
    torch.testing.assert_close(J.matrix(), expected)
    torch.testing.assert_close(J.norms(), expected.norm(dim=1))


@pytest.mark.parametrize("mode", [BY_PRODUCTS, BY_DIFFERENCES])
def test_a_pose_at_a_centre_has_no_gradient_there(mode: str) -> None:
    model, x = Radial(2.0, mode, turned=False), torch.randn(6, 3, dtype=torch.float64)
    with torch.no_grad():
        model.first.weight.zero_()
        model.first.bias.zero_()
        model.centres[1:3].zero_()
    expected = rows(model(x), trainable(model))
    weights = (0.1 / expected.norm(dim=1)).clamp(max=1)
    Engine(model).backward(model(x), Clip(0.1))
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(found, weights @ expected)


def test_a_jacobian_outlives_a_step() -> None:
    model, x = Radial(2.0, BY_DIFFERENCES, turned=False), torch.randn(6, 3, dtype=torch.float64)
    expected = rows(model(x), trainable(model))
    J = Engine(model).jacobian(model(x))
    with torch.no_grad():
        model.centres.add_(1)
    torch.testing.assert_close(J.matrix(), expected)
