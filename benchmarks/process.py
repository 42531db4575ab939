"""Peak memory, in processes that have done nothing else.

A process that has run another method has touched, freed and kept memory that hides this one's, so
each case starts fresh: a module run as `python -m module '{…}'` prints the figures of one case.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.environment import ALLOCATOR
from posegrad.testing import peak_live_bytes

__all__ = ["Peaks", "fresh", "live_mib", "resident_mib", "serve", "step_peaks"]

MIB = 2**20
Peaks = dict[str, float | None]


def fresh(module: str, case: Mapping[str, Any]) -> Peaks:
    """What `module`, run in a new process, prints for a case.

    The process has glibc's own settings: those that make the heap keep what is freed are for
    timing, and would be measured here.
    """
    settings = {name: value for name, value in os.environ.items() if name not in ALLOCATOR}
    command = [sys.executable, "-m", module, json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=settings)
    if done.returncode:
        raise RuntimeError(f"memory case {case} failed:\n{done.stderr}")
    result: Peaks = json.loads(done.stdout.splitlines()[-1])
    return result


def serve(measure: Callable[..., Peaks]) -> None:
    """Print the peaks of the case described by the JSON object in the first argument."""
    print(json.dumps(measure(**json.loads(sys.argv[1]))))


def step_peaks(step: Callable[[], object], network: nn.Module, device: str) -> Peaks:
    """Peaks of a training step that finds no gradients.

    Returns:
        `live_mib`, of the tensors alive at once beyond those alive before; `resident_mib`, of the
        process, which adds the allocator's own keeping.
    """
    resident = resident_mib(step, device)
    network.zero_grad()
    live = live_mib(step, device)  # a second run: to watch each operation costs memory itself
    return {"live_mib": live, "resident_mib": resident}


def live_mib(call: Callable[[], object], device: str) -> float:
    """Most MiB of tensors alive at once during a call, beyond those alive before it; exact.

    On a GPU it is what torch's allocator has handed out at most, operators' workspaces included.
    """
    gc.collect()
    if device == "cuda":
        return _allocator_peak(call, "allocated")
    with peak_live_bytes() as peak:
        call()
    return peak.bytes / MIB


def resident_mib(call: Callable[[], object], device: str) -> float | None:
    """How far a call raises the process's high-water mark over its size before.

    This adds the allocator's own keeping. None where the system has no `/proc`. On a GPU it is what
    torch's allocator has reserved at most.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        return _allocator_peak(call, "reserved")
    _give_back_freed_memory()
    baseline = _reset_high_water_mark()
    call()
    return None if baseline is None else (_status("VmHWM") - baseline) / MIB


def _allocator_peak(call: Callable[[], object], kind: str) -> float:
    """MiB by which a call raises torch's CUDA allocator's figure of a kind over that before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()[f"{kind}_bytes.all.current"]
    call()
    torch.cuda.synchronize()
    peak: int = torch.cuda.memory_stats()[f"{kind}_bytes.all.peak"]
    return (peak - before) / MIB


def _give_back_freed_memory() -> None:
    """Return what glibc keeps of freed memory, which the call would else reuse unseen."""
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
