"""Peak memory of one step of the suite `scaling`, in a process of its own.

`python -m benchmarks.scaling_memory '{"case": …, "method": …, "threads": …, "device": …}'` prints
one JSON object.
"""

from functools import partial

from benchmarks import scaling
from benchmarks.methods import RULES
from benchmarks.process import Peaks, serve, step_peaks
from benchmarks.settings import Settings


def _case(case: str, method: str, threads: int, device: str) -> Peaks:
    """Peak MiB of one step, beyond network and poses, as `step_peaks` gives them."""
    Settings(threads=threads).prepare()
    point = scaling.CASES[case]
    network, poses = point.network().to(device), point.inputs().to(device)
    step, rule = scaling.STEPS[method](network), RULES[point.rule]()
    step(poses[:2], rule)  # loads kernels and code, measures a graph
    network.zero_grad()

    return step_peaks(partial(step, poses, rule), network, device)


if __name__ == "__main__":
    serve(_case)
