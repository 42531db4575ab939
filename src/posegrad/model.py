"""The models an engine can follow: what they are wrapped in, and their parameters by name."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from operator import is_
from typing import Any, final

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from posegrad._torch import tables_of
from posegrad.errors import UnsupportedModuleError, listed
from posegrad.ranks import Ranks

__all__ = ["Roster", "Wanted", "check_modules", "check_no_talk", "unwrapped"]

Wanted = Iterable[str | Tensor] | None
"""Parameters or names of some; None for all."""

_FULLY_SHARD = "FSDPModule"  # by name: its module takes a second to import
_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel")


def check_modules(modules: tuple[nn.Module, ...]) -> None:
    """Refuses what is no module, is wrapped for distributed training, or is inside another.

    Raises:
        TypeError: if a module is not an `nn.Module`.
        ValueError: if there is none.
        UnsupportedModuleError: if one is wrapped, or inside another.
    """
    if not modules:
        raise ValueError("The engine has no module. Pass the model: Engine(model).")
    for i, module in enumerate(modules):
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"Module {i} is a {type(module).__name__}, not an nn.Module. Pass the model "
                f"itself; a function that calls it belongs into predict=."
            )
        for name, part in module.named_modules():
            _check_not_wrapped(name or f"module {i}", part)
            inside = next((j for j, m in enumerate(modules) if m is part and j != i), None)
            if inside is not None:
                raise UnsupportedModuleError(
                    f"Module {inside} is inside module {i} (as {name or 'the same object'}), so "
                    f"its parameters would be counted twice. Pass the outer one only."
                )


def _check_not_wrapped(name: str, module: nn.Module) -> None:
    found = [kind for kind in _WRAPPERS if is_wrapper(module, kind)]
    if found:
        raise UnsupportedModuleError(
            f"{name} is wrapped by {found[0]}, which averages gradients over processes when its "
            f"own forward runs with a graph. The engine scores poses without one, so the gradients "
            f"would silently stay local.\n"
            f"Wrap the whole model: Engine(DistributedDataParallel(model)), where all processes "
            f"share a group of poses, or DistributedDataParallel(MultiPose(model, rule)), where "
            f"each has groups of its own. Or shard the model by fully_shard."
        )


@final
class Roster:
    """The parameters of some modules by name, looked up again only when one has been replaced.

    Args:
        modules: As `check_modules` lets them pass.
        sharded: Whether FSDP2 has sharded them; its forward may leave others in their place.
    """

    def __init__(self, modules: Sequence[nn.Module], *, sharded: bool = False) -> None:
        self._modules = modules
        self._sharded = sharded
        self._named: dict[str, nn.Parameter] = {}
        self._within: list[nn.Module] = []  # all modules inside
        self._within_lists = False  # whether they list parameters as `nn.Module` does
        self._held: list[object] = []  # what these modules held when they were looked through
        self._kinds: list[object] | None = None  # the dtypes of parameters, False for frozen ones
        self._trainable: dict[str, nn.Parameter] = {}
        self._complex: list[str] = []

    def named(self) -> dict[str, nn.Parameter]:
        """All parameters by dotted name; those of several modules under `0.`, `1.`, ...

        Raises:
            UnsupportedModuleError: if one is not initialised yet.
        """
        if self._sharded:
            reshard(self._modules)
        held = _held_by(self._within)
        same = len(held) == len(self._held) and all(map(is_, held, self._held))
        lists = self._within_lists and all(map(_lists_all, self._modules))
        if not same or not lists:
            self._named, self._kinds = _named_parameters(self._modules), None
            self._within = [part for module in self._modules for part in module.modules()]
            self._held = _held_by(self._within)
            self._within_lists = all(map(_lists_all, self._within))
        return self._named

    def parts(self) -> Sequence[nn.Module]:
        """All modules inside, the modules themselves too, as of the last call of `named`."""
        return self._within

    def trainable(self, wanted: Wanted = None, *, real: bool = True) -> dict[str, nn.Parameter]:
        """The trainable parameters, each once; only those wanted, if any are named.

        Args:
            wanted: Names or parameters, or None for all.
            real: Whether complex ones are refused.

        Raises:
            ValueError: if one that is wanted is not there or not trainable.
            UnsupportedModuleError: if one of these is complex, or any is not initialised yet.
        """
        named = self.named()
        kinds: list[object] = [p.requires_grad and p.dtype for p in named.values()]
        if kinds != self._kinds:
            self._trainable, self._kinds = _trainable(named), kinds
            self._complex = [name for name, p in self._trainable.items() if p.is_complex()]
        found = self._trainable if wanted is None else self._named_by(wanted)
        unreal = [name for name in self._complex if real and name in found]
        if unreal:
            raise UnsupportedModuleError(_complex_message(unreal))
        return found

    def parted(self, wanted: Wanted) -> tuple[Wanted, dict[str, Tensor]]:
        """What is wanted of the modules; and other tensors that require grad, by their places."""
        if wanted is None or isinstance(wanted, str):
            return wanted, {}
        listed = list(wanted)
        own = set(map(id, self.named().values()))
        activations = {
            f"params[{place}]": one
            for place, one in enumerate(listed)
            if isinstance(one, Tensor) and one.requires_grad and id(one) not in own
        }
        others = set(map(id, activations.values()))
        return [one for one in listed if id(one) not in others], activations

    def tensors(self) -> list[Tensor]:
        """All parameters and buffers."""
        buffers = [buffer for module in self._modules for buffer in module.buffers()]
        return [*self.named().values(), *buffers]

    def _named_by(self, wanted: Iterable[str | Tensor]) -> dict[str, nn.Parameter]:
        trainable = self._trainable
        names = {id(parameter): name for name, parameter in trainable.items()}
        wanted = [wanted] if isinstance(wanted, str) else wanted
        keys = {key if isinstance(key, str) else names.get(id(key), "?") for key in wanted}
        missing = sorted(keys - trainable.keys())
        if missing:
            raise ValueError(
                f"params names {', '.join(missing)}, which the engine's modules do not have or do "
                f"not train. There are: {', '.join(trainable)}."
            )
        return {name: parameter for name, parameter in trainable.items() if name in keys}


def _lists_all(module: nn.Module) -> bool:
    """Whether a module lists its parameters as `nn.Module` does, that is, by what it holds."""
    kind, own = type(module), vars(module)
    theirs = kind.named_parameters is _NAMED_PARAMETERS and kind.named_modules is _NAMED_MODULES
    return theirs and "named_parameters" not in own and "named_modules" not in own


_NAMED_PARAMETERS, _NAMED_MODULES = nn.Module.named_parameters, nn.Module.named_modules


def _held_by(modules: Collection[nn.Module]) -> list[object]:
    held: list[object] = []
    for parameters, parts, _ in tables_of(modules):
        for table in (parameters, parts):
            held += table.keys()  # a new name is another object; scripted tables cannot iterate
            held += table.values()
    return held


def _named_parameters(modules: Sequence[nn.Module]) -> dict[str, nn.Parameter]:
    prefixes = [f"{i}." for i in range(len(modules))] if len(modules) > 1 else [""]
    named = {
        prefix + name: parameter
        for prefix, module in zip(prefixes, modules, strict=True)
        for name, parameter in module.named_parameters()
    }
    lazy = [name for name, parameter in named.items() if is_lazy(parameter)]
    if lazy:
        raise UnsupportedModuleError(
            f"Not initialised yet: {', '.join(lazy)}. The engine cannot follow a parameter "
            f"that does not exist. Score one pose with the model first."
        )
    return named


def _trainable(named: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    names: dict[int, str] = {}
    for name, parameter in named.items():
        if parameter.requires_grad:
            names.setdefault(id(parameter), name)  # a weight tied across modules is one
    return {name: named[name] for name in names.values()}


def _complex_message(names: Sequence[str]) -> str:
    return (
        f"Complex parameters: {', '.join(names)}. A Jacobian of real rows has no entry for them.\n"
        f"Leave them out, jacobian(output, params=[...]), or freeze them; or hold them as "
        f"torch.view_as_real(...) and view them as complex in the forward. combine() serves them."
    )


def is_wrapper(module: nn.Module, name: str) -> bool:
    """Whether a module is of a class of torch's of some name, or of one derived from it."""
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
        TypeError: if the group is no process group.
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

    Each process scores and differentiates as many poses as its own weights ask for. So its
    statistics would be joined with those of other poses elsewhere, or waited for in vain.

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
                    f"backward wait for all processes, and these score and differentiate different "
                    f"numbers of poses.\n"
                    f"Call .eval() on it, use a BatchNorm or a LayerNorm, or use "
                    f"schedule='retain' with equally many chunks of poses in every process."
                )
            if not sharded and is_wrapper(part, _FULLY_SHARD):
                raise UnsupportedModuleError(
                    f"{name or f'module {i}'} was sharded by fully_shard after the engine was "
                    f"made, so the engine does not know that processes wait for each other.\n"
                    f"Call fully_shard(model) first, then Engine(model) or MultiPose(model, rule)."
                )


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
