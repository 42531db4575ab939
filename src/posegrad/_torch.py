"""The only place that uses names PyTorch does not promise to keep.

If a release of torch lacks one, something else that is exact takes its place: a public function, or
a slower look at the numbers themselves. A test renames one after the other.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, final

import torch
from torch import Tensor, UntypedStorage, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node
from torch.autograd.variable import Variable
from torch.nn.parallel import DistributedDataParallel

__all__ = [
    "TorchDispatchMode", "UntoldError", "add_each", "address_of", "after_backward",
    "backward_into_leaves", "backward_to", "calls_by", "copy_each", "ddp_sinks", "device_of",
    "distances_backward", "dtype_of",
    "facts_of", "free_memory", "has_forward_hooks", "has_hooks", "have_noticed", "held_by",
    "holds", "hooks_of", "in_ddp",
    "in_fsdp_backward", "in_static_ddp", "inside_compiled", "is_first_of_static", "is_hooked",
    "is_listened_to", "is_of_static_ddp", "is_packed", "is_packed_at", "is_python", "keeps_graph",
    "made_at", "memory_of", "mode_guard", "mode_stack", "multithreading", "outputs_of", "pass_sink",
    "saved", "saved_tensors", "set_grad", "set_multithreading", "shape_of", "slot_names",
    "slots_of", "tables_of", "tells_slots", "tree_leaves", "version_of",
]  # fmt: skip


@final
class UntoldError(Exception):
    """An operator of this release of torch does not tell what it was asked for."""


def _found(look: Callable[[], Any], otherwise: Any) -> Any:
    try:
        return look()
    except AttributeError:
        return otherwise


TorchDispatchMode: Any = _found(lambda: torch.utils._python_dispatch.TorchDispatchMode, object)
"""Sees every operator that runs; without it, memory cannot be measured."""


def add_each(totals: list[Tensor], terms: list[Tensor], factor: float) -> None:
    """Adds `factor` times each term to its total in place, in one call."""
    _found(lambda: torch._foreach_add_, _add_one_by_one)(totals, terms, alpha=factor)


def _add_one_by_one(totals: list[Tensor], terms: list[Tensor], alpha: float) -> None:
    for total, term in zip(totals, terms, strict=True):
        total.add_(term, alpha=alpha)


def copy_each(places: list[Tensor], values: list[Tensor]) -> None:
    """Copies each value to its place, in one call."""
    _found(lambda: torch._foreach_copy_, _copy_one_by_one)(places, values)


def _copy_one_by_one(places: list[Tensor], values: list[Tensor]) -> None:
    for place, value in zip(places, values, strict=True):
        place.copy_(value)


def backward_to(
    output: Tensor, edges: Sequence[GradientEdge], cotangent: Tensor, *, keep_graph: bool
) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad` at edges, without its checks, which cost as much as a small layer."""
    try:
        run = Variable._execution_engine.run_backward
    except AttributeError:
        return torch.autograd.grad(
            (output,), tuple(edges), (cotangent,), retain_graph=keep_graph, allow_unused=True
        )
    found: tuple[Tensor | None, ...] = run(
        (output,), (cotangent,), keep_graph, False, tuple(edges), True, accumulate_grad=False
    )
    return found


def backward_into_leaves(outputs: tuple[Tensor, ...], cotangents: tuple[Tensor, ...]) -> None:
    """`torch.autograd.backward` without its checks, and without a hold on the cotangents."""
    try:
        run = Variable._execution_engine.run_backward
    except AttributeError:
        torch.autograd.backward(outputs, cotangents)
    else:
        run(outputs, cotangents, False, False, (), True, accumulate_grad=True)


def after_backward(work: Callable[[], None]) -> None:
    """Makes the backward that is running do some work at its end, if this torch can."""
    _found(lambda: Variable._execution_engine.queue_callback, bool)(work)


def keeps_graph() -> bool:
    """Whether the backward that is running keeps its graph; True if torch does not tell."""
    told = _found(lambda: torch._C._autograd._get_current_graph_task_keep_graph, None)
    return True if told is None else bool(told())


def distances_backward(b: Tensor, points: Tensor, x: Tensor, p: float, distances: Tensor) -> Tensor:
    """The gradient `[..., k, d]` of points `[k, d]`, as the backward of `torch.cdist` takes it.

    Args:
        b: The cotangents of their distances to x, `[..., k, T]`.
        points: The points.
        x: `[..., T, d]`.
        p: The order of the norm.
        distances: The distances of the points to x, `[..., k, T]`.
    """
    pull = _found(lambda: torch.ops.aten._cdist_backward, _distances_backward_again)
    pulled: Tensor = pull(b.contiguous(), points, x, p, distances.contiguous())
    return pulled


def _distances_backward_again(
    b: Tensor, points: Tensor, x: Tensor, p: float, distances: Tensor
) -> Tensor:
    each = points.expand(*b.shape[:-1], points.shape[-1])
    with torch.enable_grad():
        each = each.detach().requires_grad_()
        again = torch.cdist(each, x, p, compute_mode="donot_use_mm_for_euclid_dist")
    return torch.autograd.grad(again, each, b)[0]


def hooks_of(leaf: Tensor) -> dict[int, Any] | None:
    """The table of a tensor's `register_hook` hooks, to be written to; None if it never had one."""
    # If torch does not show the table, hooks run more often than in a plain backward.
    return _found(lambda: leaf._backward_hooks, None)  # type: ignore[no-any-return]


def set_grad(enabled: bool) -> None:
    """Sets whether this thread makes graphs."""
    _found(lambda: torch._C._set_grad_enabled, torch.set_grad_enabled)(enabled)


def set_multithreading(enabled: bool) -> None:
    """Sets whether backwards that this thread starts may run on other threads."""
    public = torch.autograd.set_multithreading_enabled
    _found(lambda: torch._C._set_multithreading_enabled, public)(enabled)


def multithreading() -> bool:
    """Whether backwards may run on other threads; True, the default, if torch does not tell."""
    try:
        return torch._C._is_multithreading_enabled()
    except AttributeError:
        return True


def mode_stack() -> tuple[Callable[[], int], Callable[[], Any]]:
    """Functions that count the modes torch's functions go through, and that remove the last."""
    try:
        return torch._C._len_torch_function_stack, torch._C._pop_torch_function_stack
    except AttributeError:
        return int, int


def mode_guard(inference: bool) -> AbstractContextManager[Any]:
    """A context manager of inference mode that has been entered."""
    return _found(lambda: torch._C._InferenceMode, _entered)(inference)  # type: ignore[no-any-return]


def _entered(inference: bool) -> AbstractContextManager[Any]:
    (guard := torch.inference_mode(inference)).__enter__()
    return guard


def has_hooks(tensor: Tensor) -> bool:
    """Whether functions of the user's run on a tensor's gradient, before or after it is added."""
    # True if torch does not tell: what is done for hooks is exact without them, too.
    return bool(_found(lambda: tensor._backward_hooks or tensor._post_accumulate_grad_hooks, True))


def shape_of(node: Node) -> tuple[torch.Size, ...]:
    """The shapes of a node's outputs."""
    return tuple([torch.Size(data.shape) for data in node._input_metadata])


def dtype_of(node: Node) -> list[torch.dtype]:
    """The dtypes of a node's outputs."""
    return [data.dtype for data in node._input_metadata]


def device_of(node: Node) -> torch.device:
    """The device of a node's first output."""
    return torch.device(node._input_metadata[0].device)


def outputs_of(node: Node) -> tuple[tuple[tuple[int, ...], ...], tuple[torch.dtype, ...]]:
    """The sizes and the dtypes of a node's outputs.

    If torch does not tell, or a nested tensor has no shape, something that is no number stands for
    the sizes, so that rows take backwards through the whole graph. A dtype that torch does not tell
    counts as float16, which takes most care.
    """
    try:
        data = node._input_metadata
        if len(data) == 1:
            return (tuple(data[0].shape),), (data[0].dtype,)
        return tuple([tuple(d.shape) for d in data]), tuple([d.dtype for d in data])
    except AttributeError:
        return (_NO_SIZE,), (torch.float16,)
    except RuntimeError:  # a nested tensor that is not jagged has no shape at all
        return (_NO_SIZE,) * len(data), tuple([d.dtype for d in data])


_NO_SIZE: Any = (None,)  # stands for sizes that are not known; it is no number


def facts_of(node: Node, names: Iterable[str]) -> tuple[Any, ...]:
    """What a node saved under some names, hashable; None for what it does not tell."""
    values = [getattr(node, f"_saved_{name}", None) for name in names]
    return tuple([tuple(value) if isinstance(value, list) else value for value in values])


def is_python(node: Node) -> bool:
    """Whether a node is that of a function written in Python, whatever its name."""
    return isinstance(node, BackwardCFunction)


def saved(node: Node, name: str) -> Any:
    """What a node saved under a name in the forward; None if there was nothing to save.

    Raises:
        UntoldError: if nodes of its kind have no such name.
        RuntimeError: if it is a tensor that was changed in place since, or was freed.
    """
    try:
        return getattr(node, f"_saved_{name}")
    except AttributeError:
        raise UntoldError(name) from None


def holds(node: Node, name: str) -> bool:
    """Whether nodes of its kind save something under a name."""
    return hasattr(type(node), f"_saved_{name}")


def slot_names(node: Node) -> list[str]:
    """The names under which a kind of node may hold saved tensors."""
    kind = type(node)
    if kind not in _SLOTS:
        _SLOTS[kind] = [name for name in dir(kind) if name.startswith("_raw_saved_")]
    return _SLOTS[kind]


def saved_tensors(node: Node) -> list[Tensor] | None:
    """The tensors that a node saved; None if a checkpoint would have to recompute them."""
    if is_packed(node):
        return None
    slots = [slot for name in slot_names(node) for slot in slots_of(node, name)]
    return [slot.data for slot in slots if isinstance(slot.data, Tensor)]


def held_by(node: Node) -> list[Tensor]:
    """The tensors that a node keeps for its backward; what a hook has packed is left as it is."""
    slots = [slot for name in slot_names(node) for slot in slots_of(node, name)]
    return [slot.data for slot in slots if isinstance(slot.data, Tensor)]


def free_memory(device: torch.device) -> int | None:
    """The bytes that are free on an accelerator; None if it does not tell."""
    try:
        return int(torch.get_device_module(device).mem_get_info(device)[0])
    except (AttributeError, RuntimeError):
        return None


def memory_of(tensor: Tensor) -> int:
    """The address of the memory that a tensor or its base lies in; -1 if there is no single one."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # sparse, or of no real memory
        return -1


def slots_of(node: Node, name: str) -> Sequence[Any]:
    """Where a node holds the tensors it saved under a name."""
    value = getattr(node, name)
    return value if isinstance(value, tuple | list) else (value,)


def is_packed(node: Node) -> bool:
    """Whether a saved tensor has to be unpacked first, as by a checkpoint, which recomputes it."""
    return any(is_packed_at(node, name) for name in slot_names(node)) or not tells_slots()


def is_packed_at(node: Node, name: str) -> bool:
    """Whether a tensor saved under one name has to be unpacked first."""
    value = getattr(node, name)
    try:
        if not isinstance(value, _SEVERAL):  # nearly always
            return value.unpack_hook is not None
        return any(slot.unpack_hook is not None for slot in value)
    except AttributeError:
        return True  # what is done for a checkpoint is exact without one, too


def is_listened_to(tensor: Tensor) -> bool:
    """Whether somebody wants to see or change the gradient of an activation."""
    try:
        return bool(tensor._backward_hooks or tensor.retains_grad) and not tensor.is_leaf
    except AttributeError:
        return not tensor.is_leaf


def is_hooked(tensor: Tensor) -> bool:
    """Whether functions of the user's run on a tensor's gradient."""
    return bool(_found(lambda: tensor._backward_hooks, True))


@cache
def tells_slots() -> bool:
    """Whether nodes tell where they keep what they saved."""
    with torch.enable_grad():
        node = torch.zeros((), requires_grad=True, device="cpu").exp().grad_fn
    return node is not None and bool(slot_names(node))


_SEVERAL = (tuple, list)
_SLOTS: dict[type, list[str]] = {}


def made_at(node: Node) -> int:
    """The number of a node in the order in which its thread made them; 0 if torch does not tell."""
    try:
        return node._sequence_nr()
    except AttributeError:
        return 0


def version_of(tensor: Tensor) -> int:
    """A number that is a new one after every change in place."""
    try:
        return tensor._version
    except AttributeError:
        return hash(str(tensor.tolist()))  # changes with the numbers


def address_of(storage: UntypedStorage) -> int:
    """A number that no other storage has while this one lives."""
    # All empty storages have the same `data_ptr`, but they hold nothing anyway.
    return int(_found(lambda: storage._cdata, None) or storage.data_ptr())


def tree_leaves(tree: Any) -> Any:
    """What containers within containers hold, as a list."""
    return _found(lambda: torch.utils._pytree.tree_leaves, _leaves_of)(tree)


def _leaves_of(tree: Any) -> list[Any]:
    if not isinstance(tree, (*_SEVERAL, Mapping)):
        return [tree]
    parts = tree.values() if isinstance(tree, Mapping) else tree
    return [leaf for part in parts for leaf in _leaves_of(part)]


def tables_of(modules: Collection[nn.Module]) -> list[tuple[Mapping[str, Any], ...]]:
    """The own parameters, parts and buffers of each module, by name."""
    try:
        return [(m._parameters, m._modules, m._buffers) for m in modules]
    except AttributeError:
        return [
            (
                dict(m.named_parameters(recurse=False)),
                dict(m.named_children()),
                dict(m.named_buffers(recurse=False)),
            )
            for m in modules
        ]


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether there are hooks, which might look at what the module is given."""
    return bool(_found(lambda: module._forward_hooks or module._forward_pre_hooks, True))


def inside_compiled(module: nn.Module) -> nn.Module | None:
    """What `torch.compile` wrapped; None if a module is no such wrapper."""
    inner = _found(lambda: module._orig_mod, None)
    return inner if isinstance(inner, nn.Module) else None


def calls_by(module: nn.Module, function: Callable[..., Any]) -> None:
    """Makes a module run a function in place of its forward, if this torch looks for one."""
    module._compiled_call_impl = function


def in_fsdp_backward(modules: Iterable[Any]) -> bool:
    """Whether FSDP2 is in the midst of a backward of one of its modules."""
    states = [part._get_fsdp_state() for part in modules if hasattr(part, "_get_fsdp_state")]
    contexts = [getattr(state, "_state_ctx", None) for state in states]
    return any(getattr(c, "post_backward_final_callback_queued", False) for c in contexts)


def in_ddp() -> bool:
    """Whether the forward of a DDP is running."""
    return _active_ddp() is not None


def in_static_ddp() -> bool:
    """Whether the forward of a DDP with `static_graph=True` is running."""
    active = _active_ddp()
    return active is not None and bool(active.static_graph)


def is_of_static_ddp(node: Node) -> bool:
    """Whether a node is what a DDP with `static_graph=True` puts behind its outputs."""
    wrapper = getattr(node, "ddp_weakref", lambda: None)()
    return bool(getattr(wrapper, "static_graph", False))


def _active_ddp() -> DistributedDataParallel | None:
    return getattr(DistributedDataParallel, "_active_ddp_module", None)


def ddp_sinks(nodes: Iterable[Node]) -> list[Any]:
    """The nodes where a DDP with `static_graph` or `find_unused_parameters` notices a backward."""
    return [node for node in nodes if type(node).__name__ == "_DDPSinkBackward"]


def is_first_of_static(sink: Any) -> bool:
    """Whether the next backward that passes a sink makes its DDP sum gradients at the end."""
    ddp = sink.ddp_weakref()
    return bool(ddp.static_graph and not ddp._static_graph_delay_allreduce_enqueued)


def have_noticed(sink: Any, noticed: bool) -> None:
    """Tells the DDP of a sink whether its first backward has been seen."""
    sink.ddp_weakref()._static_graph_delay_allreduce_enqueued = noticed


def pass_sink(sink: Any) -> None:
    """Does what happens when a backward passes a sink, within the one that is running."""
    sink._forward_cls.backward(sink)
