"""Backwards that must not touch the user's gradients, and whose failures have names."""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from threading import RLock
from typing import Any, final

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from posegrad._restoring import Change, no_autocast, no_graph, ordinary_mode
from posegrad._torch import is_listened_to, is_python, slots_of
from posegrad.errors import ReentrantCheckpointError, StaleFactorError, UnsupportedModuleError
from posegrad.graph._edges import EdgeRegistry
from posegrad.graph._release import Slot

__all__ = [
    "alone",
    "cotangents_copied",
    "failures_named",
    "grad_set_aside",
    "listened_to",
    "python_contained",
    "retained_set_aside",
    "undisturbed",
]

Guard = AbstractContextManager[Any]


@final
class _Turn:
    """The turn that the threads of a process take to set `.grad` aside."""

    lock = RLock()


def _renew() -> None:
    _Turn.lock = RLock()  # the thread that held it is not in the child


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def alone() -> Guard:
    """The lock to hold around `grad_set_aside`.

    Take it in the `with` itself, where nothing comes between taking it and the promise to release
    it.
    """
    return _Turn.lock


@final
class grad_set_aside(Change):  # noqa: N801
    """Refuses a backward that deposits gradients by itself, before there are weights for them.

    Raises:
        ReentrantCheckpointError: if one did; every `.grad` is as it was.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters
        self._held: dict[str, Tensor] | None = None

    def make(self) -> None:
        # Noted only here: until it was this thread's turn, another may have had them set aside.
        held = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        self._held = held
        for name in held:
            self._parameters[name].grad = None

    def undo(self) -> None:
        if self._held is None:
            return
        for name, p in self._parameters.items():
            if p.grad is not (before := self._held.get(name)):
                p.grad = before

    def __exit__(self, *failure: object) -> None:
        written = [name for name, p in self._parameters.items() if p.grad is not None]
        super().__exit__(*failure)
        if written and not any(failure):
            raise ReentrantCheckpointError(
                f"A custom autograd function inside the model calls backward() and deposits "
                f"gradients by itself (into {written[0]}), before their weights are known.\n"
                f"Let the function return its gradients; combine() can also use schedule='retain'."
            )


def python_contained(
    registry: EdgeRegistry, parameters: Mapping[str, Tensor]
) -> tuple[Guard, Guard, Guard]:
    """Guards against what functions written in Python may do in a backward; enter all three.

    They may deposit gradients and write to cotangents. torch's own functions do neither.
    """
    if registry.has_python():
        return alone(), grad_set_aside(parameters), cotangents_copied(registry)
    return nullcontext(), nullcontext(), nullcontext()


def listened_to(output: Tensor, registry: EdgeRegistry, slots: Iterable[Slot]) -> list[Tensor]:
    """The activations whose gradients somebody wants to see or change: by hooks, `retain_grad`.

    Only the output and what a node has saved are looked at; torch alone knows of other activations,
    and of hooks on nodes.

    Args:
        output: The output of a graph.
        registry: The graph.
        slots: Where its nodes may have saved tensors.
    """
    nodes = registry.nodes
    saved = [slot.data for number, name in slots for slot in slots_of(nodes[number], name)]
    found = [t for t in (output, *saved) if isinstance(t, Tensor) and is_listened_to(t)]
    return list({id(tensor): tensor for tensor in found}.values())


@final
class retained_set_aside(Change):  # noqa: N801
    """Leaves the `.grad` of activations as it is.

    torch fills it in every backward that passes; ours would leave a sum of probes there.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._held = [(tensor, tensor.grad) for tensor in tensors if tensor.retains_grad]

    def make(self) -> None:
        for tensor, _ in self._held:
            tensor.grad = None

    def undo(self) -> None:
        for tensor, before in self._held:
            tensor.grad = before


@final
class undisturbed(Change):  # noqa: N801
    """Inside it no graph is made, and nothing is cast."""

    def make(self) -> None:
        for change in (ordinary_mode, no_graph, no_autocast):
            change().__enter__()

    def undo(self) -> None:
        pass  # each does that for itself


@final
class cotangents_copied(Change):  # noqa: N801
    """Hands functions written in Python copies of their cotangents.

    Some write to the cotangents they are handed, and a reader may hold these, or views of them.
    """

    def __init__(self, registry: EdgeRegistry) -> None:
        self._nodes = [node for node in registry.nodes if is_python(node)]
        self._handles: list[RemovableHandle] = []

    def make(self) -> None:
        for node in self._nodes:
            # In one call: between two steps of Python an interrupt could lose the handle.
            self._handles.extend(map(node.register_prehook, (_copies,)))

    def undo(self) -> None:
        for handle in self._handles:
            handle.remove()


def _copies(cotangents: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple([None if b is None else b.clone() for b in cotangents])


@final
class failures_named:  # noqa: N801
    """Turns torch's own errors in a backward into named ones, which say what to do.

    Raises:
        StaleFactorError: if a saved tensor was changed in place.
        UnsupportedModuleError: if a compiled graph, or one of a selective checkpoint, can be used
            only once.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, RuntimeError):
            return
        if "modified by an inplace operation" in str(error):
            raise StaleFactorError(
                f"A tensor saved in the forward was changed in place before its Jacobian was read; "
                f"a plain backward would fail, too.\n{error}\nChange a clone."
            ) from error
        if "donated buffer" in str(error):
            raise UnsupportedModuleError(
                "A part of the model was compiled so that its graph can be used only once, but "
                "here it is needed more often.\nSet torch._functorch.config.donated_buffer = False "
                "before the model is compiled."
            ) from error
        if "under selective activation checkpoint" in str(error):
            raise UnsupportedModuleError(
                "A part of the model was run under a selective activation checkpoint, which can be "
                "recomputed only once, but here it is needed more often.\n"
                "Use checkpoint(..., use_reentrant=False) without context_fn=; or combine() with a "
                "rule of the predictions, which recomputes each pose once."
            ) from error
