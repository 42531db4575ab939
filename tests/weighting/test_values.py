"""Gradients that rules make of models, against formulas on the rows of plain autograd."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from posegrad import Aggregation, Clip, Engine, Median, Min, PoseJacobian, TrimmedMean, Weighting
from tests import reference
from tests.architectures import ARCHITECTURES
from tests.architectures.row import draw
from tests.device import DEVICE
from tests.models import FEATURES, MODELS
from tests.weighting.table import RULES

MODELS_OF_ALL_KINDS = [
    "MLP",
    "Linear over tokens",
    "CNN",
    "TransformerEncoder",
    "Tied, chained",
    "Unused and frozen",
    "Message passing",
    "BatchNorm, eval",
    "[m, k]",
    "[2, m, 3]",
    "bfloat16",
]
OF_ONE_ROW = ["One pose", "A number"]
CASES = [(rule, model) for rule in RULES for model in MODELS_OF_ALL_KINDS] + [
    (rule, model) for rule in RULES if RULES[rule].least == 1 for model in OF_ONE_ROW
]


@dataclass
class Case:
    """A model's Jacobian, and the same by plain autograd."""

    model: nn.Module
    jacobian: PoseJacobian
    rows: Tensor
    unused: list[str]
    tolerance: float


@cache
def _case(architecture: str) -> Case:
    row = ARCHITECTURES[architecture]
    model = row.build()
    output = row.output(model, 0)
    parameters = reference.trainable(model)
    rows = reference.rows(output, parameters).double()
    plain = reference.deposited(output, torch.ones_like(output), parameters)
    unused = [name for name, gradient in plain.items() if gradient is None]
    size = row.tolerance * len(rows) * float(rows.norm(dim=1).max())
    return Case(model, Engine(model).jacobian(output), rows, unused, size)


@pytest.mark.filterwarnings("ignore:The output is a single number")
@pytest.mark.parametrize(("name", "architecture"), CASES)
def test_gradients_are_the_formulas_on_plain_rows(name: str, architecture: str) -> None:
    rule, case = RULES[name], _case(architecture)
    J = case.jacobian.to(DEVICE)  # one of its own: blocks are kept in another form once used
    expected = rule.formula(case.rows, J.predictions.reshape(-1).double())

    weights = J.backward(rule.make())

    found = _taken(case.model)
    parameters = reference.trainable(case.model)
    dense = [torch.zeros_like(p) if found[n] is None else found[n] for n, p in parameters.items()]
    _close(torch.cat([g.reshape(-1) for g in dense]).double(), expected, case.tolerance)
    assert [n for n in parameters if found[n] is None] == case.unused
    assert (weights is not None) == rule.weights
    if weights is not None:
        assert weights.shape == J.output_shape
        _close(weights.double().reshape(-1) @ case.rows, expected, case.tolerance)


@pytest.mark.parametrize("model", ["mlp", "tied", "encoder, evaluation", "unused and frozen"])
def test_all_ways_to_call_a_rule_agree(model: str) -> None:
    scorer, poses = MODELS[model]().double(), draw(3, 7, FEATURES)
    engine, chunked = Engine(scorer), Engine(scorer, chunk_size=3)
    ways = {
        "a batch": engine.jacobian(scorer(poses).squeeze(1)),
        "one by one": engine.gather(poses),
        "chunks, factors": chunked.gather(poses, form="factors"),
        "chunks, dense": chunked.gather(poses, form="dense"),
    }
    for name, row in RULES.items():
        engine.backward(scorer(poses).squeeze(1), row.make())
        expected = _taken(scorer)
        size = 1e-10 * max(float(g.abs().max()) for g in expected.values() if g is not None)
        for way, J in ways.items():
            J.backward(row.make())
            _agree(_taken(scorer), expected, size, f"{name}, {way}")


@pytest.mark.parametrize("name", RULES)
def test_rules_take_the_rows_of_a_loss(name: str) -> None:
    model, poses, targets = MODELS["mlp"]().double(), draw(3, 6, FEATURES), draw(4, 6)
    losses = (model(poses).squeeze(1) - targets).square()
    rows = reference.rows(losses, reference.trainable(model))
    expected = RULES[name].formula(rows, losses.detach())

    Engine(model).gather(poses, loss=lambda y, i: (y - targets[i]).square()).backward(
        RULES[name].make()
    )

    found = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
    _close(found, expected, 1e-10 * len(rows) * float(rows.norm(dim=1).max()))


@pytest.mark.parametrize("name", RULES)
def test_gradients_are_added_and_hooks_run_once(name: str) -> None:
    model, poses = MODELS["mlp"]().double(), draw(3, 6, FEATURES)
    engine = Engine(model)
    engine.backward(model(poses), RULES[name].make())
    once = _taken(model)
    calls: list[Tensor] = []
    model[0].weight.register_hook(calls.append)

    J = engine.jacobian(model(poses))
    for _ in range(3):
        J.backward(RULES[name].make())

    assert len(calls) == 3
    _agree(_taken(model), {n: 3 * g for n, g in once.items() if g is not None}, 1e-12)


@pytest.mark.parametrize("name", RULES)
def test_gradients_are_the_parameters_own(name: str) -> None:
    model, poses = MODELS["mlp"](), torch.randn(6, FEATURES)
    J = Engine(model).jacobian(model(poses).squeeze(1))
    matrix = J.matrix().clone()
    J.backward(RULES[name].make())
    for p in model.parameters():
        assert p.grad is not None
        assert p.grad.untyped_storage().nbytes() == p.grad.nbytes  # no view of all rows
        p.grad.zero_()
    assert torch.equal(J.matrix(), matrix)


class _First(Weighting):
    """The first row of G: depends on how rows are numbered, and on rows before columns."""

    def forward(self, gramian: Tensor, predictions: Tensor) -> Tensor:
        assert gramian.shape == (*predictions.shape, *predictions.shape)
        return gramian[0] + predictions


class _Held(Aggregation):
    """A result that shares memory with the rows, and one that is the rule's own."""

    def __init__(self, *, own: bool) -> None:
        super().__init__()
        self.own, self.kept = own, torch.ones(())

    def forward(self, block: Tensor) -> Tensor:
        return self.kept if self.own and block.ndim == 1 else block[0]


def test_rows_are_numbered_as_the_flattened_output() -> None:
    model, poses = MODELS["vector"]().double(), draw(0, 4, FEATURES)
    output = model(poses)[:, :2]  # [m, 2]
    rows = reference.rows(output, reference.trainable(model))
    flat = output.detach().reshape(-1)

    weights = Engine(model).backward(output, _First())

    assert weights is not None
    torch.testing.assert_close(weights, (rows @ rows[0] + flat).reshape(4, 2))


@pytest.mark.parametrize("own", [False, True])
def test_a_gradient_shares_no_memory_with_the_rule_or_the_rows(own: bool) -> None:
    layer = nn.Module()
    layer.register_parameter("scale", nn.Parameter(torch.ones(())))
    rule = _Held(own=own)
    J = Engine(layer, predict=lambda m, x: m.scale * x).jacobian(layer.scale * torch.arange(1, 4.0))
    J.backward(rule)
    assert layer.scale.grad.untyped_storage().nbytes() == 4  # not all rows
    J.backward(rule)
    assert rule.kept == 1
    assert layer.scale.grad == 2
    assert J.matrix().flatten().tolist() == [1, 2, 3]


def test_weights_that_are_handed_out_are_the_callers() -> None:
    class Constant(Weighting):
        def __init__(self) -> None:
            super().__init__()
            self.kept = torch.ones(4)

        def forward(self, gramian: Tensor, predictions: Tensor) -> Tensor:
            return self.kept

    rule, model = Constant(), MODELS["mlp"]()
    weights = Engine(model).backward(model(torch.randn(4, FEATURES)).squeeze(1), rule)
    assert weights is not None
    weights.zero_()
    assert rule.kept.tolist() == [1, 1, 1, 1]


def test_a_rules_own_parameters_get_their_gradient() -> None:
    model, poses = MODELS["mlp"]().double(), draw(0, 5, FEATURES)
    rule = Min(nn.Parameter(torch.tensor(2.0).double()))
    rule(model(poses).squeeze(1)).backward()
    expected, own = _taken(model), rule.scale.grad
    rule.scale.grad = None

    Engine(model).backward(model(poses).squeeze(1), rule)

    _agree(_taken(model), expected, 1e-12)
    torch.testing.assert_close(rule.scale.grad, own)


def test_parameters_frozen_since_are_left_alone() -> None:
    model = MODELS["mlp"]()
    J = Engine(model).jacobian(model(torch.randn(5, FEATURES)).squeeze(1))
    model[0].requires_grad_(False)
    for rule in (Clip(1.0), Median()):
        J.backward(rule)
    assert model[0].weight.grad is None
    assert model[2].weight.grad is not None


def test_some_parameters_only() -> None:
    model, poses = MODELS["mlp"]().double(), draw(0, 5, FEATURES)
    output = model(poses).squeeze(1)
    rows = reference.rows(output, {"bias": model[0].bias})
    Engine(model).jacobian(output, params=["0.bias"]).backward(TrimmedMean(1))
    torch.testing.assert_close(model[0].bias.grad, RULES["TrimmedMean(1)"].formula(rows, output))
    assert model[0].weight.grad is None


def _taken(model: nn.Module) -> dict[str, Tensor | None]:
    """What is in `.grad`, which is None afterwards."""
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def _agree(found: dict[str, Any], expected: dict[str, Any], size: float, what: str = "") -> None:
    for name, gradient in expected.items():
        if gradient is None:
            assert found[name] is None, f"{what}, {name}"
        else:
            _close(found[name], gradient, size, f"{what}, {name}")


def _close(found: Tensor, expected: Tensor, size: float, what: str = "") -> None:
    torch.testing.assert_close(
        found, expected, rtol=0, atol=size, msg=lambda text: f"{what}: {text}"
    )
