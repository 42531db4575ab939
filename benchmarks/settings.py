"""How a suite is run, and what its JSON says of that."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.environment import environment
from benchmarks.process import Peaks, fresh
from benchmarks.rounds import CLOCKS, Clock
from benchmarks.table.lines import Row

__all__ = ["Row", "Settings"]


@dataclass(frozen=True)
class Settings:
    """What all suites have in common.

    Attributes:
        rounds: How often each case is timed.
        threads: Threads of torch.
        clock: One of `CLOCKS`.
        device: Where networks and inputs are: `"cpu"` or `"cuda"`.
        memory: Whether to measure peak memory, which starts a process for each case.
        processes: How many of these run at once.
    """

    rounds: int = 3
    threads: int = 1
    clock: str = "cpu"
    device: str = "cpu"
    memory: bool = True
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
    def now(self) -> Clock:
        """Seconds, from anywhere on."""
        return CLOCKS[self.clock]

    def measure(self, rows: Iterable[Row], module: str, names: Sequence[str]) -> None:
        """Adds peak memory to rows, if it is to be measured, each from a process of its own.

        A case whose process fails, as for want of memory, goes without: the seconds of the others
        took long to measure.

        Args:
            rows: What was timed.
            module: What the process runs; see `process.fresh`.
            names: The entries of a row that say which case it is.
        """
        how = {"threads": self.threads, "device": self.device}

        def measured(row: Row) -> Peaks:
            try:
                return fresh(module, {name: row[name] for name in names} | how)
            except RuntimeError as error:
                tqdm.write(str(error))
                return {}

        cases = list(rows) if self.memory else []
        with ThreadPoolExecutor(self.processes) as pool:
            for row, found in zip(cases, pool.map(measured, cases), strict=True):
                row |= found

    def result(self, suite: str, rows: Sequence[Row], **more: Any) -> dict[str, Any]:
        """What goes into the JSON file: environment, and a row for each case, with raw seconds."""
        how = {"suite": suite, "rounds": self.rounds, "clock": self.clock, "device": self.device}
        return {**how, "environment": environment(self.device), **more, "rows": rows}
