"""An LSTM in float32, which oneDNN computes in one operator, opened up to its products."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from posegrad import Engine
from tests.reference import rows, trainable

Ending = Callable[[Tensor, tuple[Tensor, Tensor]], Tensor]

ENDINGS: dict[str, Ending] = {
    "all states": lambda states, last: states.square().sum((1, 2)),
    "the last state": lambda states, last: states[:, -1].sin().sum(1),
    "the state returned": lambda states, last: last[0][-1].sin().sum(1),
    "state and cell": lambda states, last: (last[0][-1] * last[1][-1]).sum(1),
    "all of them": lambda states, last: (states.sum(1) * last[0][-1] + last[1][0]).sum(1),
}

LAYERS: dict[str, Callable[[], nn.LSTM]] = {
    "plain": lambda: nn.LSTM(3, 4, batch_first=True),
    "without biases": lambda: nn.LSTM(3, 4, bias=False, batch_first=True),
    "two layers": lambda: nn.LSTM(3, 4, num_layers=2, batch_first=True),
}


def _assert_exact(
    model: nn.Module, *scores: Callable[[], Tensor], check: str = "first", closed: bool = True
) -> None:
    engine = Engine(model, check=check)
    for score in scores * 3 if len(scores) == 1 else scores:
        output = score()
        expected = rows(output, trainable(model))
        J = engine.jacobian(output)
        torch.testing.assert_close(J.matrix(), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            J.norms().reshape(-1), expected.norm(dim=1), atol=1e-5, rtol=1e-4
        )
    rungs = {path for own in J.paths.values() for path in own}
    assert not closed or rungs <= {"closed form (Linear)", "closed form (Elementwise)"}


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=[*ENDINGS])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=[*LAYERS])
def test_rows_of_an_lstm(layer: Callable[[], nn.LSTM], ending: Ending) -> None:
    model, x = layer(), torch.randn(5, 6, 3)
    _assert_exact(model, lambda: ending(*model(x)))


def test_rows_of_an_lstm_in_both_directions() -> None:
    model, x = nn.LSTM(3, 4, bidirectional=True), torch.randn(6, 5, 3)
    _assert_exact(model, lambda: model(x)[0].sin().sum((0, 2)))


def test_states_that_are_given() -> None:
    model, x = nn.LSTM(3, 4, batch_first=True), torch.randn(5, 6, 3)
    first = nn.Parameter(torch.randn(1, 5, 4)), torch.randn(1, 5, 4)
    _assert_exact(model, lambda: model(x, first)[0].sin().sum((1, 2)))


def test_layers_below_an_lstm_have_owners() -> None:
    model = nn.ModuleList([nn.Linear(2, 3), nn.LSTM(3, 4, batch_first=True)])
    x = torch.randn(5, 6, 2)
    _assert_exact(model, lambda: model[1](model[0](x).tanh())[1][1].sin().sum((0, 2)))


def test_several_numbers_of_a_pose() -> None:
    model, x = nn.LSTM(3, 4, batch_first=True), torch.randn(5, 6, 3)
    _assert_exact(model, lambda: model(x)[0][:, -1, :2])


@pytest.mark.parametrize("check", ["first", "never"])
def test_states_of_a_row_may_come_to_go_to_another_pose_than_its_last_state(check: str) -> None:
    model, x = nn.LSTM(3, 4, batch_first=True), torch.randn(5, 6, 3)
    ours, others = torch.arange(5), torch.tensor([1, 2, 3, 4, 0])

    def scored(picks: Tensor) -> Callable[[], Tensor]:
        def score() -> Tensor:
            states, (last, _) = model(x)
            return states.sin().sum((1, 2)) + last[-1].cos()[picks].sum(1)

        return score

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # poses mix where the picks are others
        _assert_exact(model, *map(scored, [ours, ours, others, ours]), check=check)


@pytest.mark.parametrize("check", ["first", "never"])
@pytest.mark.parametrize("steps", [5, 6])
def test_steps_may_be_poses(steps: int, check: str) -> None:
    """A state depends on all inputs before it, so the gates are not one pose's."""
    model, x = nn.LSTM(3, 4), torch.randn(steps, 5, 3)
    _assert_exact(model, lambda: model(x)[0].sin().sum((1, 2)), check=check, closed=False)
