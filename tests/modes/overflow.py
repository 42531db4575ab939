"""A training step under a GradScaler whose first scale is too large."""

import torch

from tests.device import DEVICE
from tests.modes.run import Mode, Run
from tests.modes.ways import Way

__all__ = ["OVERFLOW", "OVERFLOWING", "step"]

OVERFLOW = (
    "a first scale that is too large: the step is skipped, the scale lowered, training goes on"
)

# In float32, so that every way serves it. The scale falls by 2^60 for every step that is skipped.
OVERFLOWING = Mode(OVERFLOW, dtype=torch.float32)
_SCALES = {"init_scale": 2.0**127, "backoff_factor": 2.0**-60}


def step(run: Run, way: Way) -> tuple[float, float]:
    """One step of gradient descent.

    Returns:
        The scale before and after it.
    """
    run.scaler = torch.amp.GradScaler(DEVICE.type, **_SCALES)
    optimizer = torch.optim.SGD(run.model.parameters(), lr=1e-2)
    before = run.scaler.get_scale()
    way.ours(run)
    run.scaler.step(optimizer)
    run.scaler.update()
    optimizer.zero_grad()
    return before, run.scaler.get_scale()
