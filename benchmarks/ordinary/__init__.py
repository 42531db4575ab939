"""The suite `ordinary`."""

from benchmarks.ordinary.cases import CASES
from benchmarks.ordinary.suite import run

__all__ = ["CASES", "run"]
