"""Real process groups: `ranks_loss.py` is run by both ranks at once."""

from pathlib import Path

from tests.processes import run_tests


def test_two_processes() -> None:
    printed = run_tests(Path(__file__).with_name("ranks_loss.py"), timeout=300)
    assert printed.count(" passed") == 2
