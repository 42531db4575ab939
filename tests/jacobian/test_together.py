"""Small networks, whose rows are taken all together once their structure is known."""

import contextlib
import warnings

import pytest
import torch
from torch import Tensor, nn

from posegrad import Clip, Engine, Mean, PosesMixError
from posegrad.graph import _together
from tests import reference
from tests.architectures import ARCHITECTURES
from tests.jacobian.test_architectures import EXACT, assert_three_steps

pytestmark = pytest.mark.usefixtures("_together_where_it_pays")


@pytest.fixture
def _together_where_it_pays(_use_by_use: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_together, "_USE", 2**17)


def _network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 1))


@pytest.mark.parametrize("name", EXACT)
def test_three_steps_on_one_engine_are_exact(name: str) -> None:
    assert_three_steps(ARCHITECTURES[name])


def test_a_small_network_is_read_together_from_the_second_call_on() -> None:
    model, x = _network(), torch.randn(6, 4)
    engine = Engine(model)
    first = engine.jacobian(model(x).squeeze(1))
    output = model(x).squeeze(1)
    assert "1 backward for all rows of the whole graph together" in str(engine.plan(output, Mean()))
    second = engine.jacobian(output)
    assert "1 backward for all rows of the whole graph together" in second.report()
    assert {"closed form (Linear)"} == set(first.paths["0.weight"])
    torch.testing.assert_close(second.matrix(), first.matrix())
    torch.testing.assert_close(second.gramian(), first.gramian())
    torch.testing.assert_close(second.norms(), first.norms())


@pytest.mark.parametrize(
    ("model", "m"), [(_network(), 4096), (nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 1)), 8)]
)
def test_others_keep_their_closed_forms(model: nn.Module, m: int) -> None:
    engine, width = Engine(model), model[0].in_features
    for _ in range(3):
        J = engine.jacobian(model(torch.randn(m, width)).squeeze(1))
    assert J.paths["0.weight"] == ("closed form (Linear)",)


def test_the_graph_is_freed_unless_it_is_kept() -> None:
    model, x = _network(), torch.randn(6, 4)
    engine = Engine(model)
    engine.jacobian(model(x).squeeze(1))
    output = model(x).squeeze(1)
    J = engine.jacobian(output, retain_graph=True)
    torch.testing.assert_close(engine.jacobian(output).matrix(), J.matrix())
    with pytest.raises(RuntimeError, match="a second time"):
        output.sum().backward()


def test_hooks_of_parameters_run_once_and_grad_is_left_alone() -> None:
    model, x = _network().double(), torch.randn(6, 4, dtype=torch.float64)
    engine = Engine(model)
    engine.jacobian(model(x).squeeze(1))
    calls: list[Tensor] = []
    model[0].weight.register_hook(lambda g: calls.append(g) or 2 * g)
    J = engine.jacobian(model(x).squeeze(1))
    assert not calls
    assert all(p.grad is None for p in model.parameters())
    J.backward(torch.ones(6, dtype=torch.float64))
    assert len(calls) == 1
    torch.testing.assert_close(model[0].weight.grad, 2 * calls[0])


def test_poses_that_mix_are_still_said_to_mix() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)).double()
    engine = Engine(model)
    for step in range(3):
        output = model(torch.randn(6, 4, dtype=torch.float64)).squeeze(1)
        rows = reference.rows(output, dict(model.named_parameters()))
        if step == 0:
            with pytest.warns(UserWarning, match="depend on each other"):
                J = engine.jacobian(output)
        else:
            J = engine.jacobian(output)
        torch.testing.assert_close(J.matrix(), rows)
        assert all("poses mix" in path for path in J.paths["0.weight"])
    assert J.paths["0.weight"] == ("rows of the whole graph: poses mix",)


def test_an_operator_whose_batches_torch_gets_wrong_is_read_use_by_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = _network().double(), torch.randn(6, 4, dtype=torch.float64)
    engine = Engine(model)
    engine.jacobian(model(x).squeeze(1))
    output = model(x).squeeze(1)
    rows = reference.rows(output, dict(model.named_parameters()))
    own = torch.autograd.grad

    def wrong(*args: object, is_grads_batched: bool = False, **more: object) -> tuple[Tensor, ...]:
        found = own(*args, is_grads_batched=is_grads_batched, **more)
        return tuple([2 * g for g in found]) if is_grads_batched else found

    monkeypatch.setattr(torch.autograd, "grad", wrong)
    J = engine.jacobian(output)
    monkeypatch.undo()
    assert J.paths["0.weight"] == ("closed form (Linear)",)
    torch.testing.assert_close(J.matrix(), rows)


def test_a_clipped_step_is_that_of_plain_autograd() -> None:
    model = _network().double()
    engine = Engine(model)
    for step in range(3):
        output = model(torch.randn(6, 4, dtype=torch.float64)).squeeze(1)
        parameters = dict(model.named_parameters())
        rows = reference.rows(output, parameters)
        weights = (0.1 / rows.norm(dim=1)).clamp(max=1)
        model.zero_grad()
        engine.backward(output, Clip(0.1))
        expected = reference.product(weights, rows, parameters)
        for name, p in parameters.items():
            torch.testing.assert_close(p.grad, expected[name], msg=f"{name}, step {step}")


@pytest.mark.parametrize("mix", ["index", "gather", "where", "one hot", "mask times mean"])
def test_noise_notices_poses_that_mix_by_their_numbers(mix: str) -> None:
    first, last = nn.Linear(3, 4).double(), nn.Linear(4, 1).double()
    own, others = torch.arange(5), torch.tensor([1, 0, 0, 2, 4])
    ways = {
        "index": lambda h, i: h + h[i],
        "gather": lambda h, i: h + h.gather(0, i[:, None].expand_as(h)),
        "where": lambda h, i: h + torch.where((i == own)[:, None], h, h.roll(1, 0)),
        "one hot": lambda h, i: h + nn.functional.one_hot(i, 5).double() @ h,
        "mask times mean": lambda h, i: h + (i != own).any() * h.mean(0),
    }

    def losses(neighbour: Tensor) -> Tensor:
        h = torch.tanh(first(torch.randn(5, 3, dtype=torch.float64)))
        return last(torch.tanh(ways[mix](h, neighbour))).squeeze(1)

    engine = Engine(nn.Sequential(first, last))
    rule = Clip(1.0, noise_multiplier=1.0, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for neighbour in (own, own, own, others, others):
            with contextlib.suppress(PosesMixError):  # some are taken for mixing from the start
                engine.backward(losses(neighbour), rule)
        with pytest.raises(PosesMixError, match="would not be private"):
            engine.backward(losses(others), rule)
