"""Peak memory of one training step, in a process of its own.

A process that has run another method has touched, freed and kept memory that hides this one's, so
each case starts fresh: `python -m benchmarks.memory '{"method": …, "rule": …, "poses": …,
"threads": …}'` prints one JSON object.
"""

import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.methods import METHODS, RULES, distinct_poses, model
from examples.docked_poses.network import score
from posegrad.testing import peak_live_bytes

__all__ = ["TARGET", "measure"]

MIB = 2**20
TARGET = -9.0


def measure(method: str, rule: str, poses: int, *, threads: int) -> dict[str, float | None]:
    """Peak live and resident MiB of one step, in a fresh process.

    Returns:
        `live_mib`: bytes of the tensors alive at once beyond those alive before the step, exact.
        `resident_mib`: the process's high-water mark over its size before the step, which adds the
        allocator's own keeping; None where the system has no `/proc`.
    """
    case = {"method": method, "rule": rule, "poses": poses, "threads": threads}
    command = [sys.executable, "-m", "benchmarks.memory", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"memory case {case} failed:\n{done.stderr}")
    result: dict[str, float | None] = json.loads(done.stdout.splitlines()[-1])
    return result


def _case(method: str, rule: str, poses: int, threads: int) -> dict[str, float | None]:
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    network = model()
    step, combine, group = METHODS[method](network, score), RULES[rule](), distinct_poses(poses)

    # First use loads kernels and code: two small poses, to stay below any step's own peak.
    step(sorted(group, key=lambda pose: len(pose.z))[:2], combine, TARGET)
    network.zero_grad()
    gc.collect()

    _give_back_freed_memory()
    baseline = _reset_high_water_mark()
    step(group, combine, TARGET)
    resident = None if baseline is None else (_status("VmHWM") - baseline) / MIB

    network.zero_grad()
    gc.collect()
    with peak_live_bytes() as peak:  # a second run: watching each operation costs memory itself
        step(group, combine, TARGET)
    return {"live_mib": peak.bytes / MIB, "resident_mib": resident}


def _give_back_freed_memory() -> None:
    """Return what glibc keeps of freed memory, which the step would else reuse unseen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _reset_high_water_mark() -> int | None:
    """Let the kernel forget the peak of the imports; current resident bytes, if it can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def main(arguments: list[str]) -> None:
    """Print the peaks of the case described by the JSON object in the first argument."""
    case: dict[str, Any] = json.loads(arguments[0])
    print(json.dumps(_case(**case)))


if __name__ == "__main__":
    main(sys.argv[1:])
