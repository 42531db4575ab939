"""Warnings point at the line that called the library, by whatever way it came to them."""

import inspect
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from posegrad import Engine, Mean
from posegrad.interop.mtenn import MaxCombination, grouped


class _Centred(nn.Module):
    """Poses that depend on each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        return self.last(hidden - hidden.mean(0)).squeeze(-1)


class _Flipped(nn.Module):
    """Rows that a hook takes from autograd's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        hidden.register_hook(lambda cotangent: cotangent.flip(0))
        return self.last(hidden).squeeze(-1)


class PIC50Readout(nn.Module):
    """Turns the order of poses around, as mtenn's of this name does."""

    def forward(self, x: Tensor) -> Tensor:
        return -x


X = torch.randn(4, 3)
DOORS: dict[str, Callable[[Engine, nn.Module], object]] = {
    "jacobian": lambda engine, model: engine.jacobian(model(X)),
    "backward": lambda engine, model: engine.backward(model(X), Mean()),
    "compute_gramian": lambda engine, model: engine.compute_gramian(model(X)),
    "gather": lambda engine, _: engine.gather(X),
    "inside a door": lambda engine, model: _scored_by(lambda: engine.jacobian(model(X))),
}


def _scored_by(look: Callable[[], object]) -> None:
    """Calls a function where an engine calls a model."""

    def predict(network: nn.Module, pose: Tensor) -> Tensor:
        look()
        return network(pose)

    Engine(nn.Linear(3, 1), predict=predict).combine([torch.ones(3)], Mean())


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", [_Centred, _Flipped])
def test_a_warning_points_at_the_caller(kind: Callable[[], nn.Module], door: str) -> None:
    model = kind()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        DOORS[door](Engine(model, chunk_size=4), model)
    [warning] = caught
    assert (warning.filename, warning.lineno) == (__file__, inspect.getsourcelines(DOORS[door])[1])


def test_a_warning_of_interop_does_too() -> None:
    with pytest.warns(UserWarning, match="PIC50Readout acts on") as caught:
        grouped(nn.Linear(3, 1), MaxCombination(), PIC50Readout())
    assert caught[0].filename == __file__
