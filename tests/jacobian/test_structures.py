"""What was learnt of one graph is used for another only where it holds there too."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import conv2d

from posegrad import Engine
from tests.drawing import times
from tests.reference import rows, trainable


def _assert_exact(engine: Engine, model: nn.Module, output: Tensor) -> None:
    expected = rows(output, trainable(model))
    J = engine.jacobian(output)
    torch.testing.assert_close(J.norms().reshape(-1), expected.norm(dim=1))
    torch.testing.assert_close(J.matrix(), expected)


class Expanded(nn.Module):
    """A parameter that is repeated as often as an input asks for, perhaps once only."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.randn(1, 4))
        self.kernel = nn.Parameter(torch.randn(1, 1, 2, 2))
        self.matrix = nn.Parameter(torch.randn(4, 3))
        self.linear = nn.Linear(4, 3)


def _rows_added(m: Expanded, size: int) -> Tensor:
    x = torch.randn(size, 4).double()
    return (m.linear(m.row.expand(size, 4)) + m.linear(x)).tanh().mean(0)


def _grey_or_coloured(m: Expanded, size: int) -> Tensor:
    images = torch.randn(4, size, 5, 5).double()
    return conv2d(images, m.kernel.expand(size, 1, 2, 2), groups=size).tanh().sum((1, 2, 3))


def _kernel_over_channels(m: Expanded, size: int) -> Tensor:
    images = torch.randn(4, size, 5, 5).double()
    return conv2d(images, m.kernel.expand(2, size, 2, 2)).tanh().sum((1, 2, 3))


def _scale_over_channels(m: Expanded, size: int) -> Tensor:
    x = torch.randn(5, size, 3, 4).double()
    return (m.linear(x) * m.row[:, :1, None].expand(size, 1, 1)).tanh().sum((1, 2, 3))


def _batch_of_products(m: Expanded, size: int) -> Tensor:
    x = torch.randn(size, 2, 4).double()
    return torch.bmm(x, m.matrix.expand(size, 4, 3)).tanh().sum((0, 1))


def _viewed_then_expanded(m: Expanded, size: int) -> Tensor:
    x = torch.randn(size, 4).double()
    return (m.linear(m.row.view(1, 1, 4).expand(1, size, 4)[0]) * m.linear(x)).sum(1).tanh()


def _repeated(m: Expanded, size: int) -> Tensor:
    x = torch.randn(size, 4).double()
    return (m.linear(m.row.repeat(size, 1)).tanh() * m.linear(x)).mean(0)


SIZED: list[Callable[[Expanded, int], Tensor]] = [
    _rows_added,
    _grey_or_coloured,
    _kernel_over_channels,
    _scale_over_channels,
    _batch_of_products,
    _viewed_then_expanded,
    _repeated,
]


@pytest.mark.parametrize("output", SIZED)
@times(0.5)
@given(sizes=st.lists(st.sampled_from([1, 1, 2, 3]), min_size=2, max_size=4))
def test_a_size_that_a_decision_looked_at_is_part_of_the_structure(
    output: Callable[[Expanded, int], Tensor], sizes: list[int]
) -> None:
    torch.manual_seed(0)
    model = Expanded().double()
    engine = Engine(model)
    for size in sizes:
        _assert_exact(engine, model, output(model, size))


@pytest.mark.filterwarnings("ignore:The predictions of different poses depend")
def test_two_facts_of_one_hash_are_two_structures() -> None:
    linear = nn.Linear(2, 2).double()
    engine = Engine(linear, check="never")
    assert hash(2**64 - 4) == hash(4)  # as which the dimension -4 is saved
    for dim in (4, -4, 4):
        x = linear(torch.randn(2, 3, 2, 2, 2).double()).tanh()  # 3 poses, in dimension 1
        _assert_exact(engine, linear, x.cumsum(dim).square().sum((0, 2, 3, 4)))


class Hooked(nn.Module):
    """An activation, and a view of a weight, on whose gradients hooks may be put."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor, hooks: dict[str, Callable[[Tensor], Tensor]]) -> Tensor:
        hidden, weight = self.first(x), self.second.weight.t()
        for name, tensor in (("activation", hidden), ("weight", weight)):
            if name in hooks:
                tensor.register_hook(hooks[name])
        return (hidden @ weight).tanh().sum(1)


def _clipped(gradient: Tensor) -> Tensor:
    return gradient * min(1.0, 1.0 / float(gradient.norm()))


@pytest.mark.filterwarnings("ignore:The per-pose gradients read off the graph do not add up")
@pytest.mark.parametrize("hook", [_clipped, lambda gradient: 2 * gradient])
@pytest.mark.parametrize("place", ["activation", "weight"])
def test_a_hook_that_begins_to_matter_is_seen(place: str, hook: Callable[[Tensor], Tensor]) -> None:
    model = Hooked().double()
    engine = Engine(model)
    for scale, hooks in ((1e-3, {place: hook}), (1.0, {}), (1.0, {}), (10.0, {place: hook})):
        output = model(torch.randn(6, 4).double(), hooks) * scale
        _assert_exact(engine, model, output)


class WritesToItsCotangent(torch.autograd.Function):
    """Three times x."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return 3 * x

    @staticmethod
    def backward(ctx: object, *cotangents: Tensor) -> Tensor:
        return cotangents[0].mul_(3)


@pytest.mark.parametrize("check", ["first", "never"])
@pytest.mark.parametrize("viewed", [False, True])
def test_a_backward_may_write_to_its_cotangent(check: str, viewed: bool) -> None:
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]).double()
    hidden = model[0](torch.randn(5, 4).double())
    hidden = WritesToItsCotangent.apply(hidden.view(5, 2, 2) if viewed else hidden)
    output = model[1](hidden.reshape(5, 4).tanh()).sum(1)
    _assert_exact(Engine(model, check=check), model, output)


def test_what_is_remembered_is_bounded() -> None:
    linear = nn.Linear(3, 1)
    engine = Engine(linear)
    for count in range(1, 300):
        engine.jacobian(linear(torch.randn(count, 3)).squeeze(1))
    assert len(engine._gatherer._structures._known) <= 256
