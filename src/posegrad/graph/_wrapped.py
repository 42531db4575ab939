"""Models wrapped for distributed training: what is inside, and who shares the poses."""

from collections.abc import Iterator, Sequence
from typing import Any, final

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from posegrad._restoring import Change
from posegrad._torch import ddp_sinks, have_noticed, is_first_of_static, pass_sink
from posegrad.errors import UnsupportedModuleError, listed
from posegrad.graph._edges import EdgeRegistry
from posegrad.ranks import Ranks

__all__ = ["Sinks", "check_no_talk", "is_wrapper", "reshard", "unwrapped"]

_FULLY_SHARD = "FSDPModule"  # by name: its module takes a second to import


def is_wrapper(module: nn.Module, name: str) -> bool:
    """Whether a module is of a class of torch's of some name, or of one made of it."""
    own = type(module).__mro__
    return any(kind.__name__ == name and kind.__module__.startswith("torch.") for kind in own)


def unwrapped(
    modules: Sequence[nn.Module], group: Any
) -> tuple[tuple[nn.Module, ...], Ranks | None]:
    """Modules without the DistributedDataParallel around them, and the ranks that share groups.

    Args:
        modules: As users give them.
        group: A process group, or None for that of the wrappers.

    Raises:
        ValueError: if this process is not in the group, or wrappers have another one.
        TypeError: if the group is none.
        UnsupportedModuleError: if `fully_shard` has sharded parts of a model only, or has
            replicated it too.
    """
    groups = [group] if group is not None else []
    groups += [m.process_group for m in modules if isinstance(m, DistributedDataParallel)]
    plain = [m.module if isinstance(m, DistributedDataParallel) else m for m in modules]
    sharded = any(True for _ in _sharded_parts(plain))
    if sharded:
        reshard(plain)
        groups += _groups_of_shards(plain)
    if not groups:
        return tuple(plain), None
    _check_groups(groups)
    own = groups[0]
    if sharded and dist.get_world_size(own) == dist.get_world_size():
        own = dist.new_group()  # so that our messages never meet those of FSDP2
    return tuple(plain), Ranks(own, sharded)


def check_no_talk(modules: Sequence[nn.Module], *, sharded: bool) -> None:
    """Refuses a forward in which processes wait for each other.

    Each scores and differentiates as many poses as its own weights ask for, so that one process's
    statistics would be joined with those of another's other poses, or waited for in vain.

    Args:
        modules: The engine's.
        sharded: Whether the engine keeps ranks in step, for parameters that FSDP2 has sharded.

    Raises:
        UnsupportedModuleError: if there is such a module, and there are processes.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    for i, module in enumerate(modules):
        for name, part in module.named_modules():
            if isinstance(part, nn.SyncBatchNorm) and part.training:
                raise UnsupportedModuleError(
                    f"{name or f'module {i}'} is a SyncBatchNorm in training: its forward and "
                    f"backward wait for all processes, and each of these scores and differentiates "
                    f"another number of poses.\n"
                    f"Call .eval() on it, use a BatchNorm or a LayerNorm, or use "
                    f"schedule='retain' with equally many chunks of poses in every process."
                )
            if not sharded and is_wrapper(part, _FULLY_SHARD):
                raise UnsupportedModuleError(
                    f"{name or f'module {i}'} was sharded by fully_shard after the engine was "
                    f"made, which so does not know that processes wait for each other.\n"
                    f"Call fully_shard(model) first, then Engine(model) or MultiPose(model, rule)."
                )


@final
class Sinks(Change):
    """Where DDP notices, in the graph of its outputs, that a backward passes.

    Within, a backward passes unnoticed: it reads rows, and gradients come later.

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
        """Refuses rows whose gradient would come to no DDP's notice.

        Raises:
            UnsupportedModuleError: if a DDP waits for the first backward through its outputs.
        """
        if self._first:
            raise UnsupportedModuleError(
                "The output was computed by a DistributedDataParallel with static_graph=True, "
                "which sums gradients over processes only once a first backward has passed its "
                "outputs. Rows that are read are no such backward: gradients made of them would "
                "stay local, in silence.\n"
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


def reshard(modules: Sequence[nn.Module]) -> None:
    """Frees what a forward left gathered, so that the parameters are the sharded ones again."""
    for part in _sharded_parts(modules):
        part.reshard()


def _sharded_parts(modules: Sequence[nn.Module]) -> Iterator[Any]:
    for module in modules:
        if isinstance(module, nn.Module):
            for part in module.modules():
                if is_wrapper(part, _FULLY_SHARD):
                    yield part


def _groups_of_shards(modules: Sequence[nn.Module]) -> list[Any]:
    """The process groups over which parameters are spread."""
    named = [
        (f"{i}.{name}" if len(modules) > 1 else name, parameter)
        for i, module in enumerate(modules)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    ]
    whole = [name for name, parameter in named if not hasattr(parameter, "device_mesh")]
    if whole:
        raise UnsupportedModuleError(
            f"Parts of the model are sharded by fully_shard, and {listed(whole)} are not: their "
            f"gradients would stay on each rank.\nCall fully_shard on the model itself too."
        )
    meshes = [parameter.device_mesh for _, parameter in named]  # type: ignore[attr-defined]
    if any(mesh.ndim != 1 for mesh in meshes):
        raise UnsupportedModuleError(
            "fully_shard has spread the parameters over a mesh of several dimensions, and a group "
            "of poses is shared along one.\nUse a mesh of one dimension."
        )
    return [mesh.get_group() for mesh in meshes]


def _check_groups(groups: Sequence[Any]) -> None:
    if not dist.is_initialized() or not isinstance(groups[0], dist.ProcessGroup):
        raise TypeError(
            f"process_group is {groups[0]!r}, which is no group of processes. Pass "
            f"torch.distributed.group.WORLD, or what torch.distributed.new_group returned, after "
            f"torch.distributed.init_process_group()."
        )
    if dist.get_rank(groups[0]) < 0:
        raise ValueError(
            "This process is no member of the process group. Make the engine on its ranks only."
        )
    members = dist.get_process_group_ranks(groups[0])
    others = [dist.get_process_group_ranks(other) for other in groups if other is not groups[0]]
    if any(other != members for other in others):
        raise ValueError(
            "The modules and process_group= name several process groups, but a group of poses is "
            "shared by one. Wrap all modules with the same process_group, or leave it out here."
        )
