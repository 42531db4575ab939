"""The only place that uses names PyTorch does not promise to keep."""

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from operator import call
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _InferenceMode as InferenceGuard
from torch._C._autograd import SavedTensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node
from torch.autograd.variable import Variable
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = [
    "InferenceGuard",
    "ThreadState",
    "TorchDispatchMode",
    "add_each",
    "apply_node",
    "backward_into_leaves",
    "backward_to",
    "carries_float16",
    "device_kinds",
    "device_of",
    "dtype_of",
    "dtypes_passed",
    "facts_of",
    "has_hooks",
    "hooks_of",
    "in_backward",
    "in_ddp",
    "in_fsdp_backward",
    "in_static_ddp",
    "is_hooked",
    "is_listened_to",
    "is_packed",
    "is_packed_at",
    "is_python",
    "memory_of",
    "on_intel",
    "outputs_of",
    "put_back",
    "saved",
    "saved_tensors",
    "set_multithreading",
    "shape_of",
    "slot_names",
    "slots_of",
    "thread_state",
    "tree_leaves",
]


def add_each(totals: list[Tensor], terms: list[Tensor], factor: float) -> None:
    """Adds `factor` times each term to its total in place, in one call."""
    torch._foreach_add_(totals, terms, alpha=factor)


def backward_to(
    output: Tensor, edges: Sequence[GradientEdge], cotangent: Tensor, *, keep_graph: bool
) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad` at edges, without its checks, which cost as much as a small layer."""
    found: tuple[Tensor | None, ...] = Variable._execution_engine.run_backward(
        (output,), (cotangent,), keep_graph, False, tuple(edges), True, accumulate_grad=False
    )
    return found


def backward_into_leaves(outputs: tuple[Tensor, ...], cotangents: tuple[Tensor, ...]) -> None:
    """`torch.autograd.backward` without its checks, and without a hold on the cotangents."""
    Variable._execution_engine.run_backward(
        outputs, cotangents, False, False, (), True, accumulate_grad=True
    )


def hooks_of(leaf: Tensor) -> dict[int, Any] | None:
    """The table of a tensor's `register_hook` hooks, to be written to; None if it never had one."""
    table: dict[int, Any] | None = leaf._backward_hooks
    return table


@cache
def device_kinds() -> tuple[str, ...]:
    """The kinds of device that this machine has."""
    accelerator = torch.accelerator.current_accelerator()
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)


class ThreadState(NamedTuple):
    """What torch's context managers set for a thread, and leave behind if they are cut short."""

    grad: bool
    multithreading: bool
    casts: list[tuple[str, bool, torch.dtype]]
    cache: bool
    nesting: int
    modes: int


def thread_state() -> ThreadState:
    """That of this thread, in a microsecond or two."""
    return ThreadState(
        torch.is_grad_enabled(),
        torch._C._is_multithreading_enabled(),
        [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in device_kinds()
        ],
        torch.is_autocast_cache_enabled(),
        _nesting(),
        torch._C._len_torch_function_stack(),
    )


def put_back(state: ThreadState) -> None:
    """Makes it that of this thread again; harmless if nothing has changed."""
    while torch._C._len_torch_function_stack() > state.modes:  # default devices are such modes
        torch._C._pop_torch_function_stack()
    for kind, enabled, dtype in state.casts:
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)
    torch.set_autocast_cache_enabled(state.cache)
    for _ in range(_nesting() - state.nesting):
        torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()  # casts made without a graph carry no gradient
    set_multithreading(state.multithreading)
    torch._C._set_grad_enabled(state.grad)


def set_multithreading(enabled: bool) -> None:
    """Whether backwards that this thread starts may run on others."""
    torch._C._set_multithreading_enabled(enabled)


def _nesting() -> int:
    """How many autocasts this thread is in.

    torch tells only while it counts up or down. Both calls are made by `map`, between which no
    signal is looked for.
    """
    up, _ = map(call, (torch.autocast_increment_nesting, torch.autocast_decrement_nesting))
    return up - 1


def has_hooks(tensor: Tensor) -> bool:
    """Whether functions of the user's run on a tensor's gradient, before or after it is added."""
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)


@cache
def on_intel() -> bool:
    """Whether the processor is one of Intel's; False if torch does not say."""
    return "Intel" in torch.cpu.get_capabilities().get("cpu_name", "")


def shape_of(node: Node) -> tuple[torch.Size, ...]:
    """The shapes of a node's outputs."""
    return tuple([torch.Size(data.shape) for data in node._input_metadata])


def dtype_of(node: Node) -> list[torch.dtype]:
    """The dtypes of a node's outputs."""
    return [data.dtype for data in node._input_metadata]


def device_of(node: Node) -> torch.device:
    """The device of a node's first output."""
    device: torch.device = node._input_metadata[0].device
    return device


def outputs_of(node: Node) -> tuple[tuple[tuple[int, ...], ...], tuple[torch.dtype, ...]]:
    """The sizes and the dtypes of a node's outputs."""
    data = node._input_metadata
    try:
        if len(data) == 1:
            return (tuple(data[0].shape),), (data[0].dtype,)
        return tuple([tuple(d.shape) for d in data]), tuple([d.dtype for d in data])
    except RuntimeError:  # a nested tensor that is not jagged has no shape at all
        return ((_NO_SIZE,),) * len(data), tuple([d.dtype for d in data])


_NO_SIZE: Any = None  # what stands for the sizes of such a tensor: no number


def facts_of(node: Node, names: Iterable[str]) -> tuple[Any, ...]:
    """What a node saved under some names, hashable."""
    values = [saved(node, name) for name in names]
    return tuple([tuple(value) if isinstance(value, list) else value for value in values])


def is_python(node: Node) -> bool:
    """Whether a node is of a function written in Python, of any name."""
    return isinstance(node, BackwardCFunction)


def saved(node: Node, name: str) -> Any:
    """What a node saved under a name in the forward; None if it saved nothing.

    Raises:
        RuntimeError: if it is a tensor that was changed in place since, or was freed.
    """
    return getattr(node, f"_saved_{name}", None)


def slot_names(node: Node) -> list[str]:
    """The names under which a kind of node may hold saved tensors."""
    kind = type(node)
    if kind not in _SLOTS:
        _SLOTS[kind] = [name for name in dir(kind) if name.startswith("_raw_saved_")]
    return _SLOTS[kind]


def saved_tensors(node: Node) -> list[Tensor] | None:
    """The tensors that a node saved; None if a checkpoint would have to recompute them."""
    slots = [slot for name in slot_names(node) for slot in slots_of(node, name)]
    if any(slot.unpack_hook is not None for slot in slots):
        return None
    return [slot.data for slot in slots if isinstance(slot.data, Tensor)]


def memory_of(tensor: Tensor) -> int:
    """The place in memory where a tensor, or what it is a view of, lies; -1 if in no single one."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # sparse, or of no real memory
        return -1


def slots_of(node: Node, name: str) -> Sequence[Any]:
    """Where a node holds the tensors it saved under a name."""
    value = getattr(node, name)
    return value if isinstance(value, tuple | list) else (value,)


def dtypes_passed(node: Node) -> set[torch.dtype]:
    """The dtypes in which a gradient passes a node.

    One node can stand for many operators: a compiled graph, a custom function. What such a node
    saved tells what it computes in; it is not unpacked for that, as a checkpoint would run again.
    """
    dtypes = {data.dtype for data in node._input_metadata}
    if is_python(node):
        packed = [slot.data for name in slot_names(node) for slot in slots_of(node, name)]
        found = [leaf for data in packed for leaf in tree_leaves(data)]
        dtypes.update(leaf.dtype for leaf in found if isinstance(leaf, Tensor))
    return dtypes


def carries_float16(node: Node) -> bool:
    """Whether a gradient passes a node as float16."""
    return torch.float16 in dtypes_passed(node)


def is_packed(node: Node) -> bool:
    """Whether a saved tensor has to be unpacked first: by a checkpoint, which recomputes it."""
    return any(is_packed_at(node, name) for name in slot_names(node))


def is_packed_at(node: Node, name: str) -> bool:
    """Whether the tensor saved under one name has to be."""
    value = getattr(node, name)
    if isinstance(value, SavedTensor):  # nearly always
        return value.unpack_hook is not None  # type: ignore[attr-defined]
    return any(slot.unpack_hook is not None for slot in value)


def is_listened_to(tensor: Tensor) -> bool:
    """Whether somebody wants to see or change the gradient of an activation."""
    return bool(tensor._backward_hooks or tensor.retains_grad) and not tensor.is_leaf


def is_hooked(tensor: Tensor) -> bool:
    """Whether functions of the user's run on a tensor's gradient."""
    return bool(tensor._backward_hooks)


_SLOTS: dict[type, list[str]] = {}


def apply_node(node: Node, cotangents: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    """One operator's vector-Jacobian product: a gradient for each of its arguments.

    No hook runs, and nothing beyond the operator.
    """
    if not is_python(node):
        result = node(*cotangents)  # type: ignore[operator]
        return result if isinstance(result, tuple) else (result,)
    # A function of Python answers for all its arguments, tensors or not, and its node has edges for
    # the tensors alone; those that need a gradient stand in the same order in both.
    places = zip(shape_of(node), dtype_of(node), strict=True)
    filled = [
        torch.zeros(shape, dtype=dtype, device=device_of(node)) if b is None else b
        for b, (shape, dtype) in zip(cotangents, places, strict=True)
    ]
    result = node.apply(*filled)  # type: ignore[attr-defined]
    answers = result if isinstance(result, tuple) else (result,)
    needed = [i for i, needs in enumerate(node.needs_input_grad) if needs]  # type: ignore[attr-defined]
    live = [i for i, (source, _) in enumerate(node.next_functions) if source is not None]
    by_edge = dict(zip(live, needed, strict=True))
    return tuple(
        answers[by_edge[i]] if i in by_edge else None for i in range(len(node.next_functions))
    )


def in_backward(function: Callable[[], None]) -> None:
    """Calls a function inside a backward of its own.

    Saved tensors of a checkpoint are recomputed once for each backward they are read in; outside
    of any, once for each tensor.
    """
    with torch.enable_grad():
        start = torch.zeros((), requires_grad=True, device="cpu")
        end = start.clone()
    end.register_hook(lambda _: function())  # type: ignore[no-untyped-call]
    torch.autograd.grad(end, start)


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


def _active_ddp() -> DistributedDataParallel | None:
    return getattr(DistributedDataParallel, "_active_ddp_module", None)
