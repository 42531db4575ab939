"""One group of docked poses on several processes of one thread each, beside one process alone.

PyG SchNet, 64 distinct docked poses in unequal shares. The processes are real ones that torchrun
starts; the first of them also takes the step alone, while the others sleep at a barrier, so both
are timed in the same rounds. By the wall clock: what counts is when the last one is done.
Gradients: against plain autograd in float64.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.settings import Settings

__all__ = ["CASES", "run"]

CASES = ("Mean", "Min(1000)")
"""Rules: every pose is differentiated; one is."""

SHARES = {2: (33, 31)}
"""Poses of each process, 64 in all."""


def run(rules: Sequence[str], settings: Settings) -> dict[str, Any]:
    """Run the suite.

    Args:
        rules: Names out of `CASES`.
        settings: How.

    Returns:
        What goes into the JSON file: a row for each rule, in one process and in several.
    """
    settings.prepare()
    rows = [row for count in SHARES for row in _of(count, rules, settings)]
    wall = Settings(settings.rounds, settings.threads, "wall", settings.device)
    return wall.result("processes", rows)


def _of(count: int, rules: Sequence[str], settings: Settings) -> list[dict[str, Any]]:
    """The rows that the first of several processes prints."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    case = {"rules": list(rules), "shares": SHARES[count], "rounds": settings.rounds}
    command = [sys.executable, *launch, "-m", "benchmarks.processes_worker", json.dumps(case)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=one_thread)
    if done.returncode:
        raise RuntimeError(f"{count} processes failed:\n{done.stderr}")
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return rows
