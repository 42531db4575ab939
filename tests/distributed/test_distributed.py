"""Real process groups: each file of `ranks_*.py` is run by all ranks at once."""

from pathlib import Path

import pytest

from tests.processes import run_tests

FILES = sorted(Path(__file__).parent.glob("ranks_*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
@pytest.mark.parametrize("processes", [2, 3])
def test_ranks(file: Path, processes: int) -> None:
    run_tests(file, processes=processes, timeout=300)
