"""Models wrapped for training on several devices.

A column of the table whose cells are tested elsewhere, as in several processes: `OUTCOMES` says
what they found, `"exact"` or a `Refused`. Below, the engine is made from a wrapped model.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from posegrad import UnsupportedModuleError
from tests.modes.columns import Refused
from tests.modes.ways import WAYS

__all__ = ["OUTCOMES", "WRAPPERS", "one_process"]

_REFUSED = Refused(
    UnsupportedModuleError,
    r"is wrapped by .*\n.*Engine\(wrapped.module\), then all-reduce",
    "Make the engine from the model inside and all-reduce `.grad` before `optimizer.step()`.",
)

# column: way: "exact" or what is raised.
OUTCOMES: dict[str, dict[str, Refused | str]] = {
    "DistributedDataParallel": dict.fromkeys(WAYS, _REFUSED),
    "FSDP2 (`fully_shard`)": dict.fromkeys(WAYS, _REFUSED),
}


def _sharded(model: nn.Module) -> nn.Module:
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    return model


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "DistributedDataParallel": DistributedDataParallel,
    "FSDP2 (`fully_shard`)": _sharded,
}


@contextmanager
def one_process() -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
