"""Losses and layers of torch.nn: their rows are exact, and take one backward."""

import pytest
import torch

from posegrad import Engine
from posegrad.graph._operators import OPERATORS
from tests.operators.cases import reading_of
from tests.operators.layers import LAYERS
from tests.operators.losses import LOSSES
from tests.operators.page import PAGE, case_line
from tests.reference import rows, trainable

TABLE = {**LOSSES, **LAYERS}

# Packed sequences lie by time step and length, so that their poses are found by probing.
PROBED = {"RNN packed", "LSTM packed", "GRU packed"}


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.filterwarnings("ignore")  # of torch, on odd options
def test_rows_are_those_of_autograd_and_no_poses_mix(name: str) -> None:
    found = reading_of(TABLE[name])
    assert found.is_fast or found.kind == "probed", found
    assert found.backwards == 1 or name in PROBED  # in the third call on one structure
    assert case_line(name, found) in PAGE.read_text(encoding="utf-8").splitlines()


def test_a_saved_attribute_that_is_missing_means_that_the_operator_is_probed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in a release of torch that names it otherwise."""
    row = OPERATORS["SoftmaxBackward0"]
    monkeypatch.setitem(OPERATORS, "SoftmaxBackward0", row._replace(told=("no_such_name",)))
    model = torch.nn.Linear(3, 4).double()
    output = (model(torch.randn(5, 3).double()).softmax(1) ** 2).sum(1)
    expected = rows(output, trainable(model))
    J = Engine(model, check="never").jacobian(output)
    torch.testing.assert_close(J.matrix(), expected)
