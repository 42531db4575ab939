"""How a suite is run, and what its JSON says of that."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from benchmarks.environment import environment
from benchmarks.process import Peaks, fresh
from benchmarks.rounds import CLOCKS, Stopwatch
from benchmarks.table.lines import Row

__all__ = ["Memory", "Row", "Settings"]


def _fits(row: Row) -> bool:
    return "unfit" not in row


class Memory(NamedTuple):
    """How peak memory is measured.

    Attributes:
        module: What the process of a case runs; see `process.fresh`.
        names: The entries of a row that say which case it is.
        of: Which rows are measured.
    """

    module: str
    names: Sequence[str]
    of: Callable[[Row], bool] = _fits


@dataclass(frozen=True)
class Settings:
    """What all suites have in common.

    Attributes:
        rounds: How often each case is timed.
        threads: Threads of torch.
        clock: One of `CLOCKS`.
        device: Where networks and inputs are: `"cpu"` or `"cuda"`.
        processes: How many of those that measure memory run at once.
    """

    rounds: int = 3
    threads: int = 1
    clock: str = "cpu"
    device: str = "cpu"
    processes: int = 1

    def prepare(self) -> None:
        """Set what every process of a benchmark has in common.

        Denormals are flushed: SchNet's Gaussians underflow, and backward through denormals takes up
        to ten times as long.
        """
        torch.set_num_threads(self.threads)
        torch.set_flush_denormal(True)
        torch.backends.cudnn.allow_tf32 = False  # as matrix products

    @property
    def stopwatch(self) -> Stopwatch:
        """What takes the seconds of a call."""
        return CLOCKS[self.clock]

    def measure(self, rows: Sequence[Row], memory: Memory) -> None:
        """Adds peak memory to rows, each from a process of its own.

        A case whose process fails, as for want of memory, goes without: the seconds of the others
        took long to measure.

        Args:
            rows: What was timed.
            memory: How.
        """
        how = {"threads": self.threads, "device": self.device}
        if self.device == "cuda":
            torch.cuda.empty_cache()  # what this process keeps of the GPU, the others may need

        def measured(row: Row) -> Peaks:
            try:
                return fresh(memory.module, {n: row[n] for n in memory.names} | how)
            except RuntimeError as error:
                tqdm.write(str(error))
                return {}

        cases = [row for row in rows if memory.of(row)]
        with ThreadPoolExecutor(self.processes) as pool:
            for row, found in zip(cases, pool.map(measured, cases), strict=True):
                row |= found

    def result(self, suite: str, rows: Sequence[Row], **more: Any) -> dict[str, Any]:
        """What goes into the JSON file: environment, and a row for each case, with raw seconds."""
        how = {"suite": suite, "rounds": self.rounds, "clock": self.clock, "device": self.device}
        return {**how, "environment": environment(self.device), **more, "rows": rows}
