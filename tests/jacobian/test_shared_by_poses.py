"""Tensors that all poses share and that no data went into: no pose depends on another by them."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from posegrad import Clip, Engine
from tests.reference import rows, trainable

T, D, M = 4, 6, 5


class Parts(nn.Module):
    """Parameters and buffers that the networks below are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(9, D), nn.Embedding(2 * T, D)
        self.learned = nn.Parameter(torch.randn(1, T, D))
        self.weight, self.last = nn.Parameter(torch.randn(D, D)), nn.Linear(D, 1)
        self.down, self.up = nn.Parameter(torch.randn(2, D)), nn.Parameter(torch.randn(D, 2))
        self.gain = nn.Parameter(torch.rand(D, 1) + 0.5)
        self.far = nn.Embedding(2 * T, 2)
        self.register_buffer("distances", torch.randint(2 * T, (T, T)))
        self.register_buffer("code", torch.randn(3, 2))
        self.maker = nn.Linear(2, D)

    def scores(self, x: Tensor) -> Tensor:
        """Of tokens `[m, T, d]`."""
        found: Tensor = self.last(x.tanh()).squeeze(2).sum(1)
        return found

    def biased(self, x: Tensor, distances: Tensor) -> Tensor:
        """Attention of two heads, twice with one bias by distance."""
        bias = self.far(distances).permute(2, 0, 1).unsqueeze(0)
        for _ in range(2):
            heads = x.unflatten(2, (2, -1)).transpose(1, 2)
            weights = (heads @ heads.mT + bias).softmax(-1)
            x = linear((weights @ heads).transpose(1, 2).flatten(2), self.weight)
        return self.scores(x)


def _reflected(p: Parts) -> Tensor:
    weight = torch.eye(D, dtype=torch.float64)
    for u in p.up.unbind(1):
        one = (u / u.norm()).unsqueeze(1)
        weight = weight @ (torch.eye(D, dtype=torch.float64) - 2 * one @ one.mT)
    return p.weight @ weight


NETWORKS: dict[str, Callable[[Parts, Tensor], Tensor]] = {
    "positions by number": lambda p, i: p.scores(p.words(i) + p.places(torch.arange(T))),
    "positions by number, with a pose's dimension": lambda p, i: p.scores(
        p.words(i) + p.places(torch.arange(T).unsqueeze(0))
    ),
    "learned positions": lambda p, i: p.scores(p.words(i) + p.learned),
    "a low-rank update": lambda p, i: p.scores(linear(p.words(i), p.weight + p.up @ p.down)),
    "products of low ranks": lambda p, i: p.scores(
        linear(p.words(i), (p.up @ p.down) * (p.weight @ p.up @ p.down))
    ),
    "a normalised weight": lambda p, i: p.scores(
        linear(p.words(i), p.gain * p.weight / p.weight.norm(dim=1, keepdim=True))
    ),
    "reflections": lambda p, i: p.scores(linear(p.words(i), _reflected(p))),
    "a bias made from a buffer": lambda p, i: p.scores(p.words(i) + p.maker(p.code).mean(0)),
    "biases by distance": lambda p, i: p.biased(p.words(i), p.distances),
    "biases by distance, computed": lambda p, i: p.biased(
        p.words(i), (torch.arange(T).unsqueeze(1) - torch.arange(T)).abs()
    ),
}


@pytest.mark.parametrize("network", NETWORKS.values(), ids=[*NETWORKS])
def test_rows_are_exact_and_nothing_warns(network: Callable[[Parts, Tensor], Tensor]) -> None:
    model = Parts().double()
    engine, own = Engine(model), trainable(model)
    for _ in range(3):
        output = network(model, torch.randint(9, (M, T)))
        expected = rows(output, own)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            J = engine.jacobian(output)
        torch.testing.assert_close(J.matrix(), expected, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(J.norms(), expected.norm(dim=1))
    assert all(path.startswith("closed form") for paths in J.paths.values() for path in paths)


@pytest.mark.parametrize("network", NETWORKS.values(), ids=[*NETWORKS])
def test_clipping(network: Callable[[Parts, Tensor], Tensor]) -> None:
    model = Parts().double()
    output = network(model, torch.randint(9, (M, T)))
    matrix = rows(output, trainable(model))
    weights = (0.1 / matrix.norm(dim=1)).clamp(max=1)
    Engine(model).backward(output, Clip(0.1))
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    torch.testing.assert_close(torch.cat([g.reshape(-1) for g in found]), weights @ matrix)


def test_a_mean_of_data_is_told_from_a_weight() -> None:
    """It is broadcast like a bias, and every pose is in it."""
    model = Parts().double()
    words = torch.randint(9, (M, T))
    output = model.scores(
        model.words(words) + linear(torch.randn(M, D).double(), model.weight).mean(0)
    )
    expected = rows(output, trainable(model))
    with pytest.warns(UserWarning, match="depend on each other through the activations of: weight"):
        J = Engine(model).jacobian(output)
    torch.testing.assert_close(J.matrix(), expected)
