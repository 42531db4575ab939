"""Real process groups: the files `ranks_*.py` are run by all ranks at once."""

from pathlib import Path

import pytest

from tests.processes import run_tests

FILES = sorted(Path(__file__).parent.glob("ranks_*.py"))


@pytest.mark.parametrize("processes", [2, 3])
def test_ranks(processes: int) -> None:
    run_tests(*FILES, processes=processes, timeout=600)
