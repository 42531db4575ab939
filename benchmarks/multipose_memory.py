"""Peak memory of one training step of the suite `multipose`, in a process of its own.

`python -m benchmarks.multipose_memory '{"model": …, "method": …, "rule": …, "poses": …,
"threads": …, "device": …}'` prints one JSON object.
"""

from functools import partial

import torch

from benchmarks.methods import METHODS, RULES, TARGET
from benchmarks.models import MODELS
from benchmarks.process import Peaks, fresh, serve, step_peaks
from benchmarks.settings import Row, Settings

__all__ = ["measure"]


def measure(settings: Settings, row: Row) -> Peaks:
    """Peak live and resident MiB of one step, in a fresh process.

    Returns:
        `live_mib`: bytes of the tensors alive at once beyond those alive before the step, exact.
        `resident_mib`: the process's high-water mark over its size before the step, which adds the
        allocator's own keeping; None where the system has no `/proc`.
    """
    case = {name: row[name] for name in ("model", "method", "rule", "poses")}
    how = {"threads": settings.threads, "device": settings.device}
    return fresh("benchmarks.multipose_memory", case | how)


def _case(model: str, method: str, rule: str, poses: int, threads: int, device: str) -> Peaks:
    Settings(threads=threads).prepare()
    known = MODELS[model]
    network = known.make().to(device)
    step, combine = METHODS[method](network, known.predict), RULES[rule]()
    group = [known.to(pose, device, torch.float32) for pose in known.poses(poses)]

    # First use loads kernels and code: two poses, to stay below any step's own peak.
    step(group[:2], combine, TARGET)
    network.zero_grad()

    return step_peaks(partial(step, group, combine, TARGET), network, device)


if __name__ == "__main__":
    serve(_case)
