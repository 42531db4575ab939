"""Parameters that meet data, or each other, element by element."""

import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812, as everybody calls it
from torch.utils.checkpoint import checkpoint

from posegrad import Engine
from tests.reference import rows, trainable

F64 = torch.float64

# name: from a parameter, data, and positive data
MEETINGS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "addcmul, summand": torch.addcmul,
    "addcmul, factor": lambda p, x, z: torch.addcmul(x, p, z, value=2),
    "addcmul, second factor": lambda p, x, z: torch.addcmul(x, z, p, value=-1),
    "addcdiv, summand": torch.addcdiv,
    "addcdiv, above": lambda p, x, z: torch.addcdiv(x, p, z),
    "addcdiv, below": lambda p, x, z: torch.addcdiv(x, z, p),
    "lerp, start": lambda p, x, z: torch.lerp(p, x, 0.3),
    "lerp, end": lambda p, x, z: torch.lerp(x, p, z),
    "lerp, weight": lambda p, x, z: torch.lerp(x, z, p),
    "where": lambda p, x, z: torch.where(x > 0, p, x),
    "where not": lambda p, x, z: torch.where(x > 0, x, p),
    "maximum": lambda p, x, z: torch.maximum(x, p),
    "minimum": lambda p, x, z: torch.minimum(p, x),
    "maximum of equals": lambda p, x, z: torch.maximum(p.detach() + 0 * x, p),
    "clamp from below": lambda p, x, z: torch.clamp(x, min=p),
    "clamped": lambda p, x, z: (x * p).clamp(-0.5, 0.5),
    "base": lambda p, x, z: p**z,
    "exponent": lambda p, x, z: z**p,
    "atan2": lambda p, x, z: torch.atan2(x, p),
    "squared error": lambda p, x, z: F.mse_loss(p.expand_as(x), x, reduction="none"),
    "mean squared error": lambda p, x, z: x * F.mse_loss(p, p.detach() + 1),
    "filled in": lambda p, x, z: x.masked_fill(x > 0, p.sum()),
    "exp": lambda p, x, z: -p.exp() * x,
    "softplus and sigmoid": lambda p, x, z: F.softplus(p) * x + p.sigmoid(),
    "under a root that ends": lambda p, x, z: torch.where(x > 0, p, torch.zeros_like(x)).sqrt(),
}


class Meeting(nn.Module):
    """A parameter that meets data, behind a layer."""

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.parameter = nn.Parameter(torch.rand(shape) + 0.5)
        self.meet = MEETINGS[name]

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        return self.meet(self.parameter, h, h.square() + 0.5).sin().flatten(1).sum(1)


def _assert_exact(model: nn.Module, x: Tensor) -> None:
    engine = Engine(model, check="never")
    for _ in range(2):
        expected = rows(model(x), trainable(model))
        torch.testing.assert_close(engine.jacobian(model(x)).matrix(), expected, equal_nan=True)


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("name", MEETINGS)
def test_parameters_that_meet_data_are_exact(name: str) -> None:
    torch.manual_seed(0)
    for shape in ((4,), (1, 4), (), (1,), (5, 4), (5, 1), (1, 5, 1)):
        _assert_exact(Meeting(name, shape).double(), torch.randn(6, 5, 3, dtype=F64))


ALONE = [name for name in MEETINGS if name not in ("filled in", "mean squared error")]


@pytest.mark.parametrize("name", ALONE)
def test_they_have_a_closed_form(name: str) -> None:
    torch.manual_seed(0)
    model, x = Meeting(name, (4,)).double(), torch.randn(6, 3, dtype=F64)
    (*paths,) = Engine(model).jacobian(model(x)).paths["parameter"]
    assert paths
    assert all(path.startswith("closed form (Elementwise)") for path in paths)


def test_nothing_flows_to_what_was_not_picked_however_large_it_is() -> None:
    """Zero times infinity would be nan; `torch.where` does not multiply."""
    model = nn.ParameterDict({"p": nn.Parameter(torch.ones(4, dtype=F64))})
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, -1.0, 1.0, -1.0]], dtype=F64)
    output = torch.where(x > 0, model["p"] * x, 0.0).sqrt().sum(1)
    picked = torch.where(x > 0, model["p"], 0 * x).sqrt().sum(1)
    for one in (output, picked):
        expected = rows(one, trainable(model))
        assert expected.isfinite().all()
        found = Engine(model, check="never").jacobian(one).matrix()
        torch.testing.assert_close(found, expected, equal_nan=True)


def test_behind_a_checkpoint() -> None:
    torch.manual_seed(0)
    model, x = Meeting("where", (4,)).double(), torch.randn(6, 3, dtype=F64)
    engine = Engine(model)
    for _ in range(3):
        expected = rows(model(x), trainable(model))
        output = checkpoint(model, x, use_reentrant=False)
        assert isinstance(output, Tensor)
        torch.testing.assert_close(engine.jacobian(output).matrix(), expected)


class Shared(nn.Module):
    """Weights computed from several parameters, some of them also used as they are."""

    def __init__(self, kinds: list[int]) -> None:
        super().__init__()
        self.kinds = kinds
        self.first, self.second = (nn.Parameter(torch.rand(4, 4)) for _ in range(2))
        self.scale = nn.Parameter(torch.rand(4) + 0.5)
        self.table = nn.Embedding(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        looked_up = self.table(torch.tensor([0, 5, 2, 2]))
        ways = (
            lambda: self.first.exp(),
            lambda: self.first * self.scale,
            lambda: (self.first @ self.second).tanh(),
            lambda: looked_up * self.scale,
            lambda: torch.where(looked_up > 0, looked_up, 0.1),
            lambda: self.second,
            lambda: (self.scale / self.scale.norm()).diag(),
        )
        for kind in self.kinds:
            x = (x @ ways[kind % len(ways)]()).tanh() + x * self.scale
        return x.flatten(1).sum(1)


@given(kinds=st.lists(st.integers(0, 6), min_size=1, max_size=4), seed=st.integers(0, 2**16))
def test_rows_behind_computed_tensors_are_exact_together(kinds: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    model, x = Shared(kinds).double(), torch.randn(5, 2, 4, dtype=F64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing disagrees, and none is called data
        for check in ("always", "never"):
            engine = Engine(model, check=check)
            for _ in range(2):
                expected = rows(model(x), trainable(model))
                torch.testing.assert_close(engine.jacobian(model(x)).matrix(), expected)


def test_rows_behind_computed_tensors_take_one_backward_together() -> None:
    torch.manual_seed(0)
    model, x = Shared([0, 1, 3]).double(), torch.randn(5, 2, 4, dtype=F64)
    engine = Engine(model)
    for _ in range(2):
        J = engine.jacobian(model(x))
    assert "5 for rows behind computed tensors" in J.report()


class Biased(nn.Module):
    """Attention with a bias looked up by distance, under a mask, as T5 has it."""

    def __init__(self, ways: int) -> None:
        super().__init__()
        self.words = nn.Embedding(30, 8)
        self.bias = nn.Embedding(9, 2)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(ways))

    def forward(self, words: Tensor) -> Tensor:
        x, length = self.words(words), words.shape[1]
        far = torch.arange(length) - torch.arange(length)[:, None]
        bias = self.bias(far.clamp(-4, 4) + 4).permute(2, 0, 1).unsqueeze(0)
        for layer in self.layers:
            bias = torch.where(far <= 0, bias, -1e4)
            q = layer(x).unflatten(-1, (2, 4)).transpose(1, 2)
            x = x + ((q @ q.mT + bias).softmax(-1) @ q).transpose(1, 2).flatten(2)
        return x.square().sum((1, 2))


@pytest.mark.parametrize("ways", [1, 2])
def test_a_bias_under_a_mask_is_no_data(ways: int) -> None:
    """However much larger than its table it is; and nothing is warned of."""
    torch.manual_seed(0)
    model, words = Biased(ways).double(), torch.randint(30, (4, 40))
    engine = Engine(model)
    for _ in range(2):
        output = model(words)
        expected = rows(output, trainable(model))
        J = engine.jacobian(output)
        torch.testing.assert_close(J.matrix(), expected)
    assert "whole graph" not in J.report()
