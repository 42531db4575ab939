"""The suites `ordinary` and `published`."""

from benchmarks.ordinary.suite import SUITES, run

__all__ = ["SUITES", "run"]
