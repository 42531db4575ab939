"""Where DistributedDataParallel notices, in the graph of its outputs, that a backward passes."""

from typing import final

import torch.distributed as dist

from posegrad._restoring import Change
from posegrad._torch import ddp_sinks, have_noticed, is_first_of_static, pass_sink
from posegrad.errors import UnsupportedModuleError
from posegrad.graph._edges import EdgeRegistry

__all__ = ["Sinks"]


@final
class Sinks(Change):
    """Where DDP notices, in the graph of its outputs, that a backward passes.

    Inside, a backward passes unnoticed: it reads rows, and gradients come later.

    Args:
        registry: The graph; None if there is none.

    Attributes:
        awaited: The leaves, by `id`, that a DDP which looks for unused parameters has found used.
            It waits for each of them, also for one that the losses do not depend on.
    """

    def __init__(self, registry: EdgeRegistry | None) -> None:
        talks = dist.is_available() and dist.is_initialized()
        self._all = ddp_sinks(registry.nodes) if registry is not None and talks else []
        self._first = [sink for sink in self._all if is_first_of_static(sink)]
        self.awaited: set[int] = set()
        if registry is not None and len(self._all) > len(self._first):
            for sink in self._all:
                below = registry.below(registry.nodes.index(sink))
                self.awaited |= {key for key, node in registry.leaves.items() if node in below}

    def check_delivered(self) -> None:
        """Refuses rows whose gradient no DDP would notice.

        Raises:
            UnsupportedModuleError: if a DDP waits for the first backward through its outputs.
        """
        if self._first:
            raise UnsupportedModuleError(
                "The output was computed by a DistributedDataParallel with static_graph=True, "
                "which sums gradients over processes only once a first backward has passed its "
                "outputs. Reading rows is no such backward: gradients made of them would stay "
                "local, in silence.\n"
                "Use engine.loss(losses, rule).backward(), which passes; or leave static_graph out."
            )

    def make(self) -> None:
        for sink in self._first:
            have_noticed(sink, True)

    def undo(self) -> None:
        for sink in self._first:
            have_noticed(sink, False)

    def pass_all(self) -> None:
        """Has every DDP notice the backward that is running."""
        for sink in self._all:
            pass_sink(sink)
