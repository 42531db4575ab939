"""Real process groups: torchrun, started from a test, with gloo on the CPU.

`run` starts any script or module; `run_tests` runs files of ordinary tests in every process at
once, inside a process group. Name such a file `ranks_*.py`, so that pytest does not collect it
elsewhere.
"""

import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

__all__ = ["run", "run_tests"]

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, processes: int = 2, timeout: float = 120, folder: Path = ROOT) -> str:
    """Runs a Python script or module in several processes that torchrun starts.

    Each has one thread, and finds posegrad and the tests where this process finds them. It ends
    without taking Python down: gloo's threads let go of a tensor late, and if Python is on its way
    out by then they abort the process, in one of some twenty runs on two busy cores, whether
    posegrad has a part in them or not.

    Args:
        command: What would follow `python`: a script or `"-m"` and a module, then its arguments.
        processes: How many.
        timeout: Seconds after which all of them are killed.
        folder: Where they run.

    Returns:
        What they printed, line by line with the rank in front.

    Raises:
        AssertionError: if one fails or the time is up; the message has all they printed.
    """
    with tempfile.TemporaryDirectory() as logs:
        launch = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        options = [f"--nproc-per-node={processes}", "--tee=3", f"--log-dir={logs}"]
        with subprocess.Popen(
            [sys.executable, *launch, *options, "-m", __name__, *map(str, command)],
            cwd=folder,
            env=_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as launcher:
            try:
                printed, _ = launcher.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                _kill(launcher)
                printed, _ = launcher.communicate()
                raise AssertionError(f"Not done after {timeout:g} s:\n{printed}") from None
            finally:
                _kill(launcher)
    assert launcher.returncode == 0, f"Exit status {launcher.returncode}:\n{printed}"
    return printed


def run_tests(*files: str | Path, processes: int = 2, timeout: float = 120) -> str:
    """Runs files of tests in every process of a group; they must all pass in all of them.

    A gloo group is open. The first failure ends a process, and torchrun then ends the others, so
    that none waits for who is gone.

    Args:
        files: Their paths, relative ones from the root of the repository; also options of pytest.
        processes: As for `run`.
        timeout: As for `run`.

    Returns:
        As `run`.
    """
    own = ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", __name__]
    return run(*own, *files, processes=processes, timeout=timeout)


@pytest.fixture(scope="session", autouse=True)
def _process_group() -> Iterator[None]:
    """Around all tests where this file is a plugin of pytest, which `run_tests` makes it.

    One for all files: the next group in the same processes may meet addresses of the last. Who
    waits for another longer than 60 s fails.
    """
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    yield
    dist.destroy_process_group()


def _environment() -> dict[str, str]:
    """This process's, with one thread, its import path, and nothing of an outer pytest."""
    left_out = ("PYTEST", "POSEGRAD_TEST_DEVICE")
    inherited = {name: v for name, v in os.environ.items() if not name.startswith(left_out)}
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    return inherited | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": path}


def _kill(launcher: "subprocess.Popen[str]") -> None:
    """Ends torchrun and its workers, which have sessions of their own."""
    if launcher.poll() is not None:
        return
    family = psutil.Process(launcher.pid).children(recursive=True)
    launcher.kill()
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _main(command: list[str]) -> int:
    """What `python` would do with the command; returns the exit status."""
    try:
        if command[0] == "-m":
            sys.argv = command[1:]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            sys.path.insert(0, str(Path(command[0]).parent))
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    status = _main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
