"""Peak memory of one training step of the suite `multipose`, in a process of its own.

`python -m benchmarks.memory '{"method": …, "rule": …, "poses": …, "threads": …}'` prints one JSON
object.
"""

from functools import partial

from benchmarks.methods import METHODS, RULES, distinct_poses, model
from benchmarks.process import Peaks, fresh, live_mib, resident_mib, serve
from benchmarks.rounds import prepare
from examples.docked_poses.network import score

__all__ = ["TARGET", "measure"]

TARGET = -9.0


def measure(method: str, rule: str, poses: int, *, threads: int) -> Peaks:
    """Peak live and resident MiB of one step, in a fresh process.

    Returns:
        `live_mib`: bytes of the tensors alive at once beyond those alive before the step, exact.
        `resident_mib`: the process's high-water mark over its size before the step, which adds the
        allocator's own keeping; None where the system has no `/proc`.
    """
    case = {"method": method, "rule": rule, "poses": poses, "threads": threads}
    return fresh("benchmarks.memory", case)


def _case(method: str, rule: str, poses: int, threads: int) -> Peaks:
    prepare(threads)
    network = model()
    step, combine, group = METHODS[method](network, score), RULES[rule](), distinct_poses(poses)

    # First use loads kernels and code: two small poses, to stay below any step's own peak.
    step(sorted(group, key=lambda pose: len(pose.z))[:2], combine, TARGET)
    network.zero_grad()

    call = partial(step, group, combine, TARGET)
    resident = resident_mib(call)
    network.zero_grad()
    live = live_mib(call)  # a second run: watching each operation costs memory itself
    return {"live_mib": live, "resident_mib": resident}


if __name__ == "__main__":
    serve(_case)
