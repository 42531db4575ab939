"""Models that a reader of graphs could get wrong, each against rows of plain autograd."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from posegrad import Engine, UnsupportedModuleError
from tests.reference import rows, trainable


class WrittenToken(nn.Module):
    """A parameter written into a row of an activation, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(4))
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.new_zeros(len(x), 3, 4)
        tokens[:, 1:] = x
        tokens[:, 0] = self.token
        return self.head(torch.tanh(tokens).cumsum(1)).sum((1, 2))


class WrittenInto(nn.Module):
    """Parameters that change an input in place, some by an index."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(4))
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[:, torch.tensor([0, 2])] += self.shift[:2]
        x.mul_(self.shift)
        return self.head(x).squeeze(1)


class RelativePositions(nn.Module):
    """A bias of attention, looked up by the distance of two tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(9))
        self.query = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(x)
        distance = torch.arange(5)[:, None] - torch.arange(5) + 4
        weights = (query @ query.mT + self.bias[distance]).softmax(-1)
        return (weights @ query).sum((1, 2))


class OffsetPerPose(nn.Module):
    """A parameter with one entry for each pose."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.offset = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x).squeeze(1) + self.offset).square()


class Temperature(nn.Module):
    """A number that divides."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.temperature = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).squeeze(1) / nn.functional.softplus(self.temperature)


def _of(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    return model(torch.randn(shape, dtype=torch.float64))


def _powers(model: nn.Module) -> Tensor:
    weight = model.weight @ model.weight
    return (torch.randn(6, 4, dtype=torch.float64) @ weight @ model.weight.T).sum(1) + model.bias[0]


def _penalised(model: nn.Module) -> Tensor:
    return _of(model, (6, 4)).squeeze(1) + model.weight.square().sum()


def _no_pose_at_all(model: nn.Module) -> Tensor:
    return torch.stack([_of(model, (4,)).squeeze(), model.weight.square().sum()])


TRAPS: dict[str, tuple[nn.Module, Callable[[nn.Module], Tensor]]] = {
    "a token written in place": (WrittenToken(), lambda m: _of(m, (5, 2, 4))),
    "inputs written in place": (WrittenInto(), lambda m: _of(m, (5, 4))),
    "relative positions": (RelativePositions(), lambda m: _of(m, (3, 5, 4))),
    "an offset for each pose": (OffsetPerPose(), lambda m: _of(m, (6, 4))),
    "a temperature": (Temperature(), lambda m: _of(m, (6, 4))),
    "powers of a weight": (nn.Linear(4, 4), _powers),
    "a penalty in every loss": (nn.Linear(4, 1), _penalised),
    "a loss of no pose": (nn.Linear(4, 1), _no_pose_at_all),
    "an outer product": (
        nn.Linear(4, 4),
        lambda m: torch.outer(m.bias, torch.randn(6, dtype=torch.float64)).sum(0),
    ),
    "sorted predictions": (nn.Linear(4, 1), lambda m: _of(m, (6, 4)).squeeze(1).sort().values),
    "predictions of 1e-40": (nn.Linear(4, 1), lambda m: _of(m, (6, 4)).squeeze(1) * 1e-40),
    "predictions of 1e40": (nn.Linear(4, 1), lambda m: _of(m, (6, 4)).squeeze(1) * 1e40),
}


@pytest.mark.parametrize("name", TRAPS)
@pytest.mark.parametrize("check", ["first", "never"])
def test_rows_are_those_of_autograd(name: str, check: str) -> None:
    model, output_of = TRAPS[name]
    model.double()
    engine = Engine(model, check=check)
    for _ in range(3):
        output = output_of(model)
        expected = rows(output, trainable(model))
        found = engine.jacobian(output).matrix()
        torch.testing.assert_close(found / expected.abs().max(), expected / expected.abs().max())


def test_a_gate_that_opens_later_is_found() -> None:
    """At zero it hides that poses depend on each other; the graph looks the same."""
    model, gate = nn.Linear(4, 1).double(), torch.zeros((), dtype=torch.float64)
    engine = Engine(model, check="never")
    for step in range(3):
        gate.fill_(step / 2)
        scores = model(torch.randn(6, 4, dtype=torch.float64)).squeeze(1)
        output = scores + gate * (scores - scores.mean()).square()
        expected = rows(output, trainable(model))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that poses mix, once they do
            found = engine.jacobian(output).matrix()
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_small_cotangents_are_not_dropped(dtype: torch.dtype) -> None:
    """Rows of a ragged batch whose gradients are near the smallest numbers of the type."""
    model = nn.Linear(4, 1, dtype=dtype)
    owners = torch.tensor([1, 0, 2, 1, 0, 1])
    smallest = torch.finfo(dtype).tiny
    x = torch.ones(6, 4, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rounding at this size may look like mixing
        scores = model(x).squeeze(1)
        output = torch.zeros(3, dtype=dtype).index_add(0, owners, scores * (64 * smallest))
        norms = Engine(model).jacobian(output).matrix().double().norm(dim=1)
    atoms = torch.bincount(owners)
    torch.testing.assert_close(norms / norms[2], atoms.double(), rtol=0.02, atol=0)


def test_nested_tensors_take_rows() -> None:
    model = nn.Linear(4, 1).double()
    parts = [torch.randn(n, 4, dtype=torch.float64) for n in (2, 3)]
    scores = model(torch.nested.nested_tensor(parts, layout=torch.jagged))
    output = torch.stack([score.sum() for score in scores.unbind()])
    expected = rows(output, trainable(model))
    with pytest.warns(UserWarning, match="one backward through the graph"):
        found = Engine(model).jacobian(output).matrix()
    torch.testing.assert_close(found, expected)


def test_complex_parameters_are_refused_by_name() -> None:
    model = nn.Linear(3, 1)
    model.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(UnsupportedModuleError, match=r"Complex parameters: phase"):
        Engine(model).jacobian(model(torch.ones(2, 3)))
