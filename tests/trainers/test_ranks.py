"""Two processes with gloo, one thread each: every file `ranks_*.py` here."""

from pathlib import Path

from tests.processes import run_tests

FILES = sorted(Path(__file__).parent.glob("ranks_*.py"))


def test_there_are_tests_for_ranks() -> None:
    assert {file.stem for file in FILES} >= {"ranks_ddp", "ranks_lightning", "ranks_accelerate"}


def test_two_processes() -> None:
    printed = run_tests(*FILES, timeout=240)  # at once: most of the time goes into imports
    assert printed.count(" passed") == 2
