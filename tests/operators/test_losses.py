"""Losses and layers of torch.nn: their rows are exact, and take one backward."""

import pytest

from tests.operators.cases import reading_of
from tests.operators.layers import LAYERS
from tests.operators.losses import LOSSES

TABLE = {**LOSSES, **LAYERS}

# Packed sequences lie by time step and length, so that their poses are found by probing.
PROBED = {"RNN packed", "LSTM packed", "GRU packed"}


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.filterwarnings("ignore")  # of torch, on odd options
def test_rows_are_those_of_autograd_and_no_poses_mix(name: str) -> None:
    found = reading_of(TABLE[name])
    assert found.kind in ("inferred", "probed"), found
    assert found.backwards == 1 or name in PROBED  # in the third call on one structure
