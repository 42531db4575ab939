"""Every architecture of the table: exact, as fast as it says, and nothing left behind."""

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn

from posegrad import Engine, PoseJacobian
from tests import reference
from tests.architectures import ARCHITECTURES, Architecture
from tests.architectures.page import PAGE, page
from tests.architectures.row import draw

EXACT = [name for name, row in ARCHITECTURES.items() if row.exact]
REFUSED = [name for name, row in ARCHITECTURES.items() if not row.exact]
DENSE = [name for name, row in ARCHITECTURES.items() if row.dense]
FREED = [name for name in EXACT if ARCHITECTURES[name].released]


def assert_three_steps(row: Architecture) -> PoseJacobian:
    """Three gathers by one engine against plain autograd, each with a training step; the last."""
    model = row.build()
    engine = Engine(model)
    for step in range(3):
        with _warning(row, first=step == 0):
            jacobian = _check_step(row, model, engine, seed=step)
    return jacobian


@pytest.mark.parametrize("name", EXACT)
def test_three_steps_on_one_engine_are_exact(name: str) -> None:
    row = ARCHITECTURES[name]
    assert _outcome(assert_three_steps(row)) == row.outcome


@pytest.mark.parametrize("name", DENSE)
def test_dense_models_are_exact_without_a_check(name: str) -> None:
    row = ARCHITECTURES[name]
    model = row.build()
    engine = Engine(model, check="never")
    for step in range(2):
        with _warning(row, first=step == 0):
            _check_step(row, model, engine, seed=step)


@pytest.mark.parametrize("name", EXACT)
def test_backward_deposits_what_autograd_deposits(name: str) -> None:
    row = ARCHITECTURES[name]
    model = row.build()
    engine = Engine(model)
    output = row.output(model, 0)
    weights = draw(1, *output.shape).to(output)
    parameters = reference.trainable(model)
    expected = reference.deposited(output, weights, parameters)
    matrix = reference.rows(output, parameters)

    with _warning(row, first=True):
        jacobian = engine.jacobian(output)
    assert all(p.grad is None for p in model.parameters())

    jacobian.backward(weights)
    once = {name: p.grad for name, p in parameters.items()}
    assert [g is None for g in once.values()] == [g is None for g in expected.values()]
    if not row.linear:
        expected = reference.product(weights, matrix, parameters)
    scale = max(float(g.abs().max()) for g in expected.values() if g is not None)
    for name, gradient in expected.items():
        _close(once[name], gradient, row, scale)

    once = {name: g.clone() for name, g in once.items() if g is not None}
    jacobian.backward(weights)
    for name, gradient in once.items():
        _close(parameters[name].grad, 2 * gradient, row, scale)


@pytest.mark.parametrize("name", FREED)
def test_the_graph_is_freed_as_by_a_backward(name: str) -> None:
    row = ARCHITECTURES[name]
    model = row.build()
    plain = row.output(model, 0)
    plain.backward(torch.ones_like(plain))
    assert _is_freed(plain) == _is_freed_by_jacobian(row, model)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("check", ["first", "never"])
def test_what_cannot_be_served_is_refused_by_name(name: str, check: str) -> None:
    row = ARCHITECTURES[name]
    model = row.build()
    output = row.output(model, 0)
    with reference.untouched(model), pytest.raises(row.outcome, match=row.match):
        Engine(model, check=check).jacobian(output)


def test_the_page_of_the_docs_is_the_table() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tests.architectures"


def test_hooks_of_parameters_run_once_as_in_a_backward() -> None:
    row = ARCHITECTURES["MLP"]
    model = row.build()
    calls = []
    model[0].weight.register_hook(lambda g: calls.append(g) or 2 * g)
    output = row.output(model, 0)
    expected = reference.deposited(output, torch.ones_like(output), dict(model.named_parameters()))
    calls.clear()

    Engine(model).jacobian(output).backward(torch.ones_like(output))
    assert len(calls) == 1
    _close_all({n: p.grad for n, p in model.named_parameters()}, expected, row)


def test_a_row_that_two_predictions_come_to_share_is_noticed() -> None:
    m, model = 60, ARCHITECTURES["MLP"].build().float()
    parameters = reference.trainable(model)
    for seed in range(20):
        engine = Engine(model)
        chosen = torch.randperm(m)
        x = draw(seed, m, 4, dtype=torch.float32)
        engine.jacobian(model(x)[chosen, 0])

        one, other = torch.randperm(m)[:2]
        chosen[one] = chosen[other]
        output = model(x)[chosen, 0]
        matrix = reference.rows(output, parameters)
        with pytest.warns(UserWarning, match="depend on each other"):
            found = engine.jacobian(output).matrix()
        torch.testing.assert_close(found, matrix, rtol=1e-4, atol=1e-5)


def _check_step(row: Architecture, model: nn.Module, engine: Engine, *, seed: int) -> PoseJacobian:
    """One gather against plain autograd, and one training step."""
    output = row.output(model, seed)
    parameters = reference.trainable(model)
    matrix = reference.rows(output, parameters)
    gradients = torch.autograd.grad(
        output.sum(), list(parameters.values()), retain_graph=True, allow_unused=True
    )

    jacobian = engine.jacobian(output)

    weights = draw(seed, *output.shape).to(output)
    scale = float(matrix.abs().max())
    _close(jacobian.matrix(), matrix, row, scale)
    expected = reference.gramian(matrix.double(), output.shape)
    _close(jacobian.gramian(), expected, row, float(expected.abs().max()))
    norms = matrix.double().norm(dim=1).reshape(output.shape)
    _close(jacobian.norms(), norms, row, float(norms.max()))
    _close_all(jacobian.combine(weights), reference.product(weights, matrix, parameters), row)
    index = tuple(size - 1 for size in output.shape)
    unit = torch.zeros_like(output)
    unit[index] = 1
    _close_all(jacobian[index], reference.product(unit, matrix, parameters), row)

    with torch.no_grad():
        for p, gradient in zip(parameters.values(), gradients, strict=True):
            if gradient is not None:
                p -= 0.01 * gradient
    return jacobian


def _close_all(found: dict[str, Tensor], expected: dict[str, Tensor], row: Architecture) -> None:
    assert list(found) == list(expected)
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        assert found[name].dtype == gradient.dtype
        _close(found[name], gradient, row, scale)


def _close(found: Tensor | None, expected: Tensor | None, row: Architecture, scale: float) -> None:
    """Within the row's tolerance of the largest entry."""
    if found is None or expected is None:
        assert found is expected
        return
    torch.testing.assert_close(
        found.to_dense().double(), expected.double(), rtol=0, atol=row.tolerance * scale
    )


def _outcome(jacobian: PoseJacobian) -> str:
    paths = [p for own in jacobian.paths.values() for path in own for p in path.split(" + ")]
    return "exact-fast" if all(p.startswith("closed form") for p in paths) else "exact-slow"


def _warning(row: Architecture, *, first: bool) -> AbstractContextManager[object]:
    return pytest.warns(UserWarning, match="per-pose") if row.warns and first else nullcontext()


def _is_freed(output: Tensor) -> bool:
    try:
        output.backward(torch.ones_like(output))
    except RuntimeError:
        return True
    return False


def _is_freed_by_jacobian(row: Architecture, model: nn.Module) -> bool:
    output = row.output(model, 0)
    with _warning(row, first=True):
        Engine(model).jacobian(output)
    return _is_freed(output)
