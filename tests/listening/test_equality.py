"""Law 4: what is heard is the Jacobian, whatever the loss; `.grad` is what it would be, in bits."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from posegrad import CotangentBypassError, Engine, ListeningError
from tests import reference
from tests.architectures import ARCHITECTURES, Architecture
from tests.architectures.row import draw

LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": Tensor.mean,
    "sum": Tensor.sum,
    "weighted": lambda y: (y * draw(9, *y.shape).to(y)).sum(),
    "scaled": lambda y: 1024.0 * y.mean() / 3,
    "masked": lambda y: y.reshape(-1)[::2].sum(),
}

UNHEARD = {
    "[m, k]": r"\[6, 3\]: 3 numbers for each pose share rows",
    "[k, m]": r"\[3, 6\]: 3 numbers for each pose share rows",
    "[2, m, 3]": r"\[2, 6, 3\]: 6 numbers for each pose share rows",
    "[m, m]": r"\[6, 6\]: 6 numbers for each pose share rows",
    "One row for two predictions": r"poses mix",
    "Checkpointed": r"packed, by a checkpoint",
    "Checkpointed, several": r"packed, by a checkpoint",
    "Offloaded": r"packed, by a checkpoint or save_on_cpu",
    "autograd.Function": r"written in Python or compiled: DoublingBackward",
    "Compiled, AOT": r"written in Python or compiled",
    "Compiled in part, AOT": r"written in Python or compiled",
    "Hook that clips": r"disagreed with autograd",
}
"""What is refused before the backward, and how."""

HOOKED = ["Hook that rescales"]
EXACT = [name for name, row in ARCHITECTURES.items() if row.exact]
HEARD = [name for name in EXACT if name not in {*UNHEARD, *HOOKED}]

pytestmark = pytest.mark.filterwarnings("ignore:The predictions of different poses depend")


@pytest.mark.parametrize("name", HEARD)
def test_what_is_heard_is_the_jacobian(name: str) -> None:
    row = ARCHITECTURES[name]
    model = row.build()
    engine = Engine(model)
    for seed, loss in enumerate(LOSSES.values()):
        output = row.output(model, seed)
        _check(row, model, engine, output, loss)


@pytest.mark.parametrize("name", UNHEARD)
def test_what_one_backward_does_not_tell_is_refused_by_name(name: str) -> None:
    row = ARCHITECTURES[name]
    model = row.build()
    output = row.output(model, 0)
    expected = _gradients(model, output.sum(), keep=True)

    with pytest.raises(ListeningError, match=rf"(?s){UNHEARD[name]}.*engine\.jacobian"):
        Engine(model).listen(output)
    _assert_same_bits(_gradients(model, output.sum()), expected)


@pytest.mark.parametrize("name", HOOKED)
def test_hooks_that_change_gradients_are_noticed(name: str) -> None:
    row = ARCHITECTURES[name]
    model = row.build()
    output = row.output(model, 0)
    expected = _gradients(model, output.sum(), keep=True)
    with Engine(model).listen(output) as heard:
        found = _gradients(model, output.sum())
    _assert_same_bits(found, expected)
    with pytest.raises(CotangentBypassError, match="a hook that changes gradients"):
        _ = heard.jacobian


@pytest.mark.parametrize("name", ["MLP", "CNN", "TransformerEncoder", "LSTM"])
def test_without_a_check_nothing_else_is_heard(name: str) -> None:
    row = ARCHITECTURES[name]
    model = row.build()
    engine = Engine(model, check="never")
    for seed in range(2):
        _check(row, model, engine, row.output(model, seed), Tensor.mean)


def _check(
    row: Architecture,
    model: nn.Module,
    engine: Engine,
    output: Tensor,
    loss: Callable[[Tensor], Tensor],
) -> None:
    parameters = reference.trainable(model)
    matrix = reference.rows(output, parameters)
    expected = _gradients(model, loss(output), keep=True)

    with engine.listen(output) as heard:
        found = _gradients(model, loss(output))

    _assert_same_bits(found, expected)
    weights = torch.autograd.functional.jacobian(loss, output.detach())
    assert torch.equal(heard.rows, weights != 0)
    rows = matrix[heard.rows.reshape(-1)]
    scale = row.tolerance * float(matrix.abs().max())
    _close(heard.jacobian.matrix(), rows, scale)
    _close(heard.jacobian.norms().reshape(-1), rows.norm(dim=1), scale)
    _close(
        heard.jacobian.gramian().reshape(len(rows), -1),
        reference.gramian(rows, rows.shape[:1]),
        scale * float(matrix.abs().max()) * matrix.shape[1],
    )


def _close(found: Tensor, expected: Tensor, error: float) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-10, atol=error)


def _gradients(model: nn.Module, loss: Tensor, *, keep: bool = False) -> dict[str, Tensor | None]:
    """What a backward leaves in `.grad`, which is None again."""
    loss.backward(retain_graph=keep)
    found = {name: p.grad for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = None
    return found


def _assert_same_bits(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    for name, gradient in expected.items():
        other = found[name]
        assert (other is None) == (gradient is None)
        if gradient is not None and other is not None:
            assert torch.equal(other.to_dense(), gradient.to_dense()), name
