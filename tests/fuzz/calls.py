"""Random stateful models under `Engine.combine`, held against plain autograd.

`python -m tests.fuzz.calls FIRST LAST` runs a range of seeds and prints a line for every failure;
with one number it describes the seed first.
"""

import sys
import traceback
from collections import Counter

import torch

from tests.fuzz.calls_compare import Verdict, judged
from tests.fuzz.calls_draw import described, draw
from tests.fuzz.calls_run import trace
from tests.fuzz.calls_sides import Plain, Tested
from tests.fuzz.calls_world import World

__all__ = ["describe", "verdict"]


def describe(seed: int) -> str:
    """What a seed stands for, in lines."""
    return described(draw(seed))


def verdict(seed: int) -> Verdict:
    """Runs a seed by plain autograd and by the engine, and compares all there is to see."""
    case = draw(seed)
    plain = trace(Plain(World(case)))
    return judged(case, plain, trace(Tested(World(case))))


def main(first: int, last: int) -> int:
    """Runs the seeds from first to last; returns how many failed."""
    kinds: Counter[str] = Counter()
    compared = calls = 0
    for seed in range(first, last + 1):
        try:
            found = verdict(seed)
        except Exception:
            found = Verdict("broken", traceback.format_exc(limit=-3)[:1500])
        kinds[f"refused {found.why}" if found.kind == "refused" else found.kind] += 1
        compared, calls = compared + found.compared, calls + found.calls
        if found.kind in ("silent", "crash", "broken"):
            print(f"{seed}: {found}", flush=True)
    totals = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    print(f"{last - first + 1} seeds, {calls} calls, {compared} comparisons: {totals}")
    return kinds["silent"] + kinds["crash"] + kinds["broken"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    numbers = [int(argument) for argument in sys.argv[1:]]
    if len(numbers) == 1:
        print(describe(numbers[0]))
    sys.exit(bool(main(numbers[0], numbers[-1])))
