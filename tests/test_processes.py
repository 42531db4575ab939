"""The helper that starts process groups: what it reports, and that it leaves nothing running.

That tests run in every process is seen in tests/distributed.
"""

import time
from pathlib import Path

import psutil
import pytest

from tests.processes import run, run_tests

TESTS = """
import torch
import torch.distributed as dist


def test_ranks_add_up():
    number = torch.tensor(dist.get_rank() + 1)
    dist.all_reduce(number)
    assert number == 3 - dist.get_rank()
"""


def test_a_failure_in_a_process_fails_here(tmp_path: Path) -> None:
    file = tmp_path / "ranks_add.py"
    file.write_text(TESTS)
    with pytest.raises(AssertionError, match=r"assert tensor\(3\) == \(3 - 1\)"):
        run_tests(file)


def test_processes_that_hang_are_killed(tmp_path: Path) -> None:
    script = tmp_path / "hangs.py"
    script.write_text("import time\ntime.sleep(600)\n")
    with pytest.raises(AssertionError, match="Not done after 8 s"):
        run(script, timeout=8)
    time.sleep(0.2)
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(script) in _words(p)]


def _words(process: psutil.Process) -> list[str]:
    return process.info["cmdline"] or []
