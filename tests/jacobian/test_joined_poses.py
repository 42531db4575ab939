"""Poses that are put together, or cut out of a batch: one backward, rows that are autograd's."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from posegrad import Clip, Engine
from tests.drawing import double
from tests.jacobian.exact import assert_exact
from tests.reference import gramian, rows, trainable

Score = Callable[[nn.Module, Tensor], Tensor]

_OWNERS = torch.tensor([0, 0, 1, 2, 2, 2])


def _of_both_halves(z: Tensor) -> Tensor:
    first, second = z.chunk(2)
    return (first * second).squeeze(1)


WAYS: dict[str, Score] = {
    "a stack of losses": lambda f, x: torch.stack([f(x + i).square().mean() for i in range(4)]),
    "a loop over poses": lambda f, x: torch.stack([f(x[i]) for i in range(6)]).squeeze(1),
    "two halves": lambda f, x: torch.cat([f(x), f(-x)]).squeeze(1),
    "two unequal parts": lambda f, x: torch.cat([f(x[:2]).exp(), f(x[2:])]).squeeze(1),
    "constants in front": lambda f, x: torch.cat([torch.zeros(2, 1).double(), f(x)]).squeeze(1),
    "constants behind": lambda f, x: torch.cat([f(x), torch.ones(3, 1).double()]).squeeze(1),
    "siamese": lambda f, x: (f(x) - f(-x)).squeeze(1),
    "siamese in one batch": lambda f, x: _of_both_halves(f(torch.cat([x, -x]))),
    "some of a batch": lambda f, x: torch.stack([f(x)[0].sin(), f(x)[-1].exp()]).squeeze(1),
    "unbound": lambda f, x: torch.stack([z.sin().sum() for z in f(x).unbind(0)]),
    "slices": lambda f, x: (lambda z: torch.cat([z[::2].sin(), z[-1:], z[1:4:2] * 2]))(f(x))[:, 0],
    "split": lambda f, x: torch.cat([z.sin() for z in f(x).split([1, 3, 2])]).squeeze(1),
    "masks": lambda f, x: (lambda z: torch.stack([z[i == _OWNERS].mean().sin() for i in range(3)]))(
        f(x)
    ),
}


def _network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


@pytest.mark.parametrize("score", WAYS.values(), ids=[*WAYS])
def test_rows_are_exact_and_take_one_backward(score: Score) -> None:
    model, x = _network(), double(6, 3)
    engine = Engine(model)
    for _ in range(3):
        output = score(model, x)
        expected = rows(output, trainable(model))
        J = engine.jacobian(output)
        torch.testing.assert_close(J.matrix(), expected, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(J.gramian(), gramian(expected, output.shape))
        torch.testing.assert_close(J.norms(), expected.norm(dim=1))
    rungs = [path for own in J.paths.values() for path in own]
    assert all(path.startswith("closed form") for path in rungs)


@pytest.mark.parametrize("score", WAYS.values(), ids=[*WAYS])
def test_other_numbers_of_the_same_structure(score: Score) -> None:
    """What holds for one graph holds for the next, or is looked at again."""
    model = _network()
    engine = Engine(model, check="never")
    for _ in range(3):
        assert_exact(engine, model, score(model, double(6, 3)))


def test_an_entry_may_be_another_one_in_the_next_graph() -> None:
    """Selected by number: the structure is the same, the owners are not."""
    model, x = _network(), double(6, 3)
    engine = Engine(model, check="never")
    for i, j in [(0, 1), (1, 0), (5, 2), (-1, -2), (3, 3)]:
        z = model(x)
        assert_exact(engine, model, torch.stack([z[i].sin(), z[j] * 3]).squeeze(1))


def test_losses_of_a_shared_trunk_take_one_backward_each_and_no_warning() -> None:
    trunk, heads = nn.Linear(3, 4), nn.ModuleList([nn.Linear(4, 1) for _ in range(3)])
    model = nn.ModuleList([trunk, heads]).double()
    x = double(6, 3)
    engine = Engine(model)
    for _ in range(3):
        z = trunk(x).tanh()
        losses = torch.stack([head(z).square().mean() for head in heads])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_exact(engine, model, losses)


def test_a_mean_over_the_batch_still_warns() -> None:
    model, x = _network(), double(6, 3)
    z = model(x).squeeze(1)
    with pytest.warns(UserWarning, match="depend on each other"):
        assert_exact(Engine(model), model, z - z.mean())


def test_clipping_a_stack_of_losses() -> None:
    model, x = _network(), double(6, 3)
    output = WAYS["a stack of losses"](model, x)
    matrix = rows(output, trainable(model))
    weights = (0.1 / matrix.norm(dim=1)).clamp(max=1)
    Engine(model).backward(output, Clip(0.1))
    found = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(found, weights @ matrix)


def _two_of_three_parts(model: nn.Module, x: Tensor, last: float) -> Tensor:
    """The root of all scores, moved to 3, and of those that are left out, to another number."""
    z = model(x)
    shift = torch.tensor([3.0] * 4 + [last] * 2, dtype=torch.float64).unsqueeze(1)
    first, second, _ = (z - z.detach() + shift).sqrt().split(2)
    return torch.cat([first.exp(), second]).squeeze(1)


@pytest.mark.parametrize("check", ["first", "never"])
def test_what_no_pose_takes_may_still_make_them_all_nan(check: str) -> None:
    """Zero times infinity: autograd has nan for it, and so have we, in this graph alone."""
    model, x = _network(), double(6, 3)
    engine = Engine(model, check=check)
    for last in [2.0, 2.0, 2.0, 0.0, 2.0]:
        output = _two_of_three_parts(model, x, last)
        expected = rows(output, trainable(model))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of nan
            found = engine.jacobian(output).matrix()
        assert bool(expected.isnan().any()) == (last == 0)
        torch.testing.assert_close(found, expected, equal_nan=True)


def test_an_empty_tensor_may_stand_beside_any_other() -> None:
    """torch lets `[0]` be concatenated with matrices, along any dimension."""
    model, x = _network(), double(6, 3)
    engine = Engine(model)
    for _ in range(3):
        z = model(x)
        output = torch.cat([z.sum() * torch.zeros(0, dtype=torch.float64), z.T], dim=1)[0]
        assert_exact(engine, model, output)
