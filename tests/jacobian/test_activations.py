"""J by tensors that the forward computed: activations, and inputs that require grad."""

import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from posegrad import (
    Engine,
    Mean,
    NotDifferentiableError,
    UnsupportedModuleError,
)

F64 = torch.float64
Made = tuple[Tensor, list[Tensor]]


def _rows(output: Tensor, tensors: list[Tensor]) -> Tensor:
    """By plain autograd, a backward for each number: `[M, n]`."""
    found = []
    for number in output.reshape(-1):
        grads = torch.autograd.grad(number, tensors, retain_graph=True, allow_unused=True)
        pairs = zip(grads, tensors, strict=True)
        found.append(
            torch.cat([(torch.zeros_like(t) if g is None else g).reshape(-1) for g, t in pairs])
        )
    return torch.stack(found)


class Network(nn.Module):
    """Two layers, and what lies between them."""

    def __init__(self, width: int = 1) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.first(x).tanh()
        return hidden, self.last(hidden).squeeze(-1)


def _mlp(model: Network, x: Tensor) -> Made:
    hidden, scores = model(x)
    return scores, [hidden]


def _input(model: Network, x: Tensor) -> Made:
    x = x.clone().requires_grad_()
    hidden, scores = model(x)
    return scores.square(), [x, hidden]


def _tokens(model: Network, x: Tensor) -> Made:
    x = x.expand(3, *x.shape) * torch.arange(1, 4).reshape(3, 1, 1)  # [T, m, 5]
    hidden, scores = model(x)
    return scores.sum(0), [hidden]


def _ragged(model: Network, x: Tensor) -> Made:
    hidden, scores = model(x)
    owner = torch.tensor([1, 0, 2, 1, 0, 1])[: len(x)]
    return scores.new_zeros(3).index_add(0, owner, scores), [hidden, scores]


def _mixing(model: Network, x: Tensor) -> Made:
    hidden, scores = model(x - x.mean(0))
    return scores.softmax(0), [hidden]


def _tasks(model: Network, x: Tensor) -> Made:
    hidden, scores = model(x)
    return torch.stack([scores.square().mean(), scores.abs().mean(), hidden.sum()]), [hidden]


def _unused(model: Network, x: Tensor) -> Made:
    hidden, scores = model(x)
    return scores * 0 + hidden.detach().sum(1) + scores, [hidden, scores]


def _cut(model: Network, x: Tensor) -> Made:
    hidden, _ = model(x)
    left, right = hidden.chunk(2, dim=1)
    return (left * right).sum(1), [right, hidden]


def _recomputed(model: Network, x: Tensor) -> Made:
    hidden = model.first(x).tanh()
    return checkpoint(lambda h: model.last(h).squeeze(-1), hidden, use_reentrant=False), [hidden]


def _itself(model: Network, x: Tensor) -> Made:
    _, scores = model(x)
    return scores, [scores]


def _of_several(model: Network, x: Tensor) -> Made:
    hidden = model.first(x).tanh()
    return hidden[:, :2] * hidden[:, 2:4], [hidden]


MADE: dict[str, Callable[[Network, Tensor], Made]] = {
    "MLP": _mlp,
    "inputs": _input,
    "tokens": _tokens,
    "ragged": _ragged,
    "poses mix": _mixing,
    "losses of tasks": _tasks,
    "partly unused": _unused,
    "views": _cut,
    "checkpoint": _recomputed,
    "the output itself": _itself,
    "several numbers for each pose": _of_several,
}


def _made(name: str, dtype: torch.dtype = F64) -> tuple[Network, Tensor, list[Tensor]]:
    torch.manual_seed(0)
    model = Network().to(dtype)
    output, tensors = MADE[name](model, torch.randn(6, 5, dtype=dtype))
    return model, output, tensors


@pytest.mark.parametrize("check", ["first", "never"])
@pytest.mark.parametrize("name", MADE)
def test_rows_are_those_of_autograd(name: str, check: str) -> None:
    model, output, tensors = _made(name)
    expected = _rows(output, tensors)
    J = Engine(model, check=check).jacobian(output, params=tensors)
    assert [*J.shapes] == [f"params[{i}]" for i in range(len(tensors))]
    assert [*J.shapes.values()] == [t.shape for t in tensors]
    torch.testing.assert_close(J.matrix(), expected)
    torch.testing.assert_close(J.norms().reshape(-1), expected.norm(dim=1))
    gram = J.gramian().reshape(len(expected), -1)
    G = expected @ expected.mT
    shape = output.shape
    order = torch.arange(output.numel()).reshape(shape).permute(*range(output.ndim)[::-1])
    torch.testing.assert_close(gram, G[:, order.reshape(-1)])
    v = torch.randn(expected.shape[1], 2, dtype=F64)
    torch.testing.assert_close(J @ v, (expected @ v).reshape(*shape, 2))
    w = torch.randn(shape, dtype=F64)
    back = torch.cat([g.reshape(-1) for g in (w @ J).values()])
    torch.testing.assert_close(back, w.reshape(-1) @ expected)
    part = torch.tensor([2, 0])
    grid = expected.reshape(len(output), -1, expected.shape[1])
    torch.testing.assert_close(J[part].matrix(), grid[part].flatten(0, 1))
    torch.testing.assert_close((J @ J[part].T).reshape(len(expected), -1).norm(), (
        expected @ grid[part].flatten(0, 1).mT
    ).norm())  # fmt: skip
    sketch = J.in_form("dense").project(4)
    torch.testing.assert_close(J.project(4), sketch)


@given(m=st.integers(1, 4), d=st.integers(1, 3), seed=st.integers(0, 99))
def test_any_number_of_poses_and_of_their_numbers(m: int, d: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = Network(d).double()
    hidden, scores = model(torch.randn(m, 5, dtype=F64))
    expected = _rows(scores, [hidden])
    J = Engine(model).jacobian(scores, params=[hidden])
    torch.testing.assert_close(J.matrix(), expected)
    torch.testing.assert_close(J.norms().reshape(-1), expected.norm(dim=1))


def test_activations_stand_beside_parameters() -> None:
    model, output, (hidden,) = _made("MLP")
    weight, bias = model.last.weight, model.first.bias
    expected = _rows(output, [bias, weight, hidden])
    J = Engine(model).jacobian(output, params=["last.weight", hidden, bias])
    assert [*J.shapes] == ["first.bias", "last.weight", "params[1]"]
    torch.testing.assert_close(J.matrix(), expected)
    torch.testing.assert_close(J.gramian(), expected @ expected.mT)
    with pytest.raises(RuntimeError, match="second time"):
        output.sum().backward()


@pytest.mark.parametrize("retain", [True, False])
def test_the_graph_is_kept_or_freed(retain: bool) -> None:
    model, output, (hidden,) = _made("MLP")
    hidden.retain_grad()
    Engine(model).jacobian(output, params=[hidden], retain_graph=retain)
    assert hidden.grad is None
    if retain:
        output.sum().backward()
        assert hidden.grad is not None
    else:
        with pytest.raises(RuntimeError, match="second time"):
            output.sum().backward()


def test_poses_that_stay_apart_take_one_backward() -> None:
    model, output, tensors = _made("MLP")
    J = Engine(model, check="never").jacobian(output, params=tensors)
    assert J.report().splitlines()[1] == "1 backward to the activations"
    assert "its cotangent" in J.report()
    model, output, tensors = _made("losses of tasks")
    assert "poses mix" in Engine(model).jacobian(output, params=tensors).report()


def test_a_hook_that_mixes_poses_is_noticed() -> None:
    model, output, (hidden,) = _made("MLP")
    x = torch.randn(6, 5, dtype=F64)
    first = model.first(x)
    hidden = first.tanh()
    hidden.register_hook(lambda b: b + b.flip(0))
    output = model.last(hidden).squeeze(1)
    expected = _rows(output, [first])
    found = Engine(model).jacobian(output, params=[first])
    torch.testing.assert_close(found.matrix(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_types(dtype: torch.dtype) -> None:
    model, output, (hidden,) = _made("MLP", dtype)
    output = output * 1e-4  # whose gradients are at the end of float16
    exact = Network().double()
    exact.load_state_dict({n: p.double() for n, p in model.state_dict().items()})
    expected = exact.last.weight.double()[0] * 1e-4
    J = Engine(model).jacobian(output, params=[hidden])
    found = torch.stack([J[i]["params[0]"][i] for i in range(6)]).double()
    torch.testing.assert_close(found, expected.expand(6, -1), rtol=2e-2, atol=0)


def test_rules_of_the_gramian_weigh_tasks_by_what_they_share() -> None:
    """As in multi-task learning: the Gramian of the losses in the features."""
    model, losses, (features,) = _made("losses of tasks")
    rows = _rows(losses, [features])
    G = Engine(model).jacobian(losses, params=[features], retain_graph=True).gramian()
    torch.testing.assert_close(G, rows @ rows.mT)


def test_what_cannot_be_served_is_refused() -> None:
    model, output, (hidden,) = _made("MLP")
    engine = Engine(model)
    with pytest.raises(NotDifferentiableError, match=r"depend on params\[0\].*\n?.*very tensor"):
        engine.jacobian(output, params=[hidden.clone()], retain_graph=True)
    J = engine.jacobian(output, params=[hidden], retain_graph=True)
    for rule in (torch.ones(6, dtype=F64), Mean()):
        with pytest.raises(TypeError, match=r"activations, params\[0\].*\n.*w @ J"):
            J.backward(rule)
    wave = hidden * 1j
    with pytest.raises(UnsupportedModuleError, match="view_as_real"):
        engine.jacobian(wave.abs().sum(1), params=[wave])
    with pytest.raises(NotDifferentiableError, match="carries no graph"):
        engine.jacobian(output.detach(), params=[hidden])
    with pytest.raises(ValueError, match=r"params names \?"):
        engine.jacobian(output, params=[hidden.detach()])
    assert all(p.grad is None for p in model.parameters())


def test_batch_statistics_mix_poses() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1)).double()
    before = model[0](torch.randn(6, 4, dtype=F64))
    output = model[3](model[2](model[1](before))).squeeze(1)
    expected = _rows(output, [before])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        J = Engine(model).jacobian(output, params=[before])
    torch.testing.assert_close(J.matrix(), expected)
