"""What comes out with a model that is wrapped for several processes."""

from posegrad import UnsupportedModuleError
from tests.modes.columns import Refused
from tests.modes.ways import COMBINE, JACOBIAN

__all__ = ["DDP", "FSDP2", "OUTCOMES"]

DDP, FSDP2 = "DistributedDataParallel", "FSDP2 (`fully_shard`)"

_LOCAL = Refused(
    ValueError,
    r"plain autograd, whose gradients would stay on each rank",
    "Use another schedule; or `DistributedDataParallel(MultiPose(model, rule))`, where each "
    "process has groups of its own and every schedule is exact.",
)

_BACKWARD_ONLY = Refused(
    UnsupportedModuleError,
    r"sharded by fully_shard get none but from backward\(\)",
    "Use `auto` or `recompute`.",
)

_NO_ROWS = Refused(
    UnsupportedModuleError,
    r"whose parameters are not in the graph",
    "Use a rule of the predictions, or `DistributedDataParallel`.",
)

# Mode: way: "exact", or what is raised. Each is tested by tests/distributed/ranks_modes.py.
OUTCOMES: dict[str, dict[str, Refused | str]] = {
    DDP: dict.fromkeys((*COMBINE, *JACOBIAN), "exact") | {"retain": _LOCAL},
    FSDP2: {
        **dict.fromkeys(COMBINE, _BACKWARD_ONLY),
        **dict.fromkeys(("auto", "recompute", "embed"), "exact"),
        **dict.fromkeys(JACOBIAN, _NO_ROWS),
    },
}
