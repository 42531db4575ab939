"""Peak memory of one training step of the suite `multipose`, in a process of its own.

`python -m benchmarks.multipose_memory '{"model": …, "method": …, "rule": …, "poses": …,
"threads": …, "device": …}'` prints one JSON object.
"""

from functools import partial

import torch

from benchmarks.methods import JOINED, METHODS, RULES, TARGET
from benchmarks.models import MODELS
from benchmarks.process import Peaks, serve, step_peaks
from benchmarks.settings import Settings


def _case(model: str, method: str, rule: str, poses: int, threads: int, device: str) -> Peaks:
    """Peak MiB of one step, as `step_peaks` gives them."""
    Settings(threads=threads).prepare()
    known = MODELS[model]
    network = known.make().to(device)
    methods = JOINED if known.joined else METHODS
    step, combine = methods[method](network, known.predict), RULES[rule]()
    group = [known.to(pose, device, torch.float32) for pose in known.poses(poses)]

    # First use loads kernels and code: two poses, to stay below any step's own peak.
    step(known.group(group[:2]), combine, TARGET)
    network.zero_grad()

    return step_peaks(partial(step, known.group(group), combine, TARGET), network, device)


if __name__ == "__main__":
    serve(_case)
