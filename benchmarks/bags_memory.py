"""Peak memory of one step of the suite `bags`, in a process of its own.

`python -m benchmarks.bags_memory '{"case": …, "method": …, "threads": …, "device": …}'` prints one
JSON object.
"""

from benchmarks.bags_cases import CASES
from benchmarks.bags_ways import WAYS
from benchmarks.process import Peaks, serve, step_peaks
from benchmarks.settings import Settings


def _case(case: str, method: str, threads: int, device: str) -> Peaks:
    """Peak MiB of one step, as `step_peaks` gives them."""
    Settings(threads=threads).prepare()
    task = CASES[case].make().to(device)
    trained, step = task.trained(), WAYS[method](task)
    step()  # first use loads kernels and code, and looks closer
    trained.zero_grad()
    return step_peaks(step, trained, device)


if __name__ == "__main__":
    serve(_case)
