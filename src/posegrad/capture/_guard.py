"""Backwards that must not touch the user's gradients, and whose failures have names."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from threading import RLock

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from posegrad._compat import is_python
from posegrad.capture._edges import EdgeRegistry
from posegrad.errors import ReentrantCheckpointError, StaleFactorError, UnsupportedModuleError
from posegrad.jacobian import no_autocast

__all__ = ["failures_named", "grad_set_aside", "undisturbed"]

_ONE_AT_A_TIME = RLock()


@contextmanager
def grad_set_aside(parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Refuses a backward that deposits gradients by itself, before there are weights for them.

    Raises:
        ReentrantCheckpointError: if one did; every `.grad` is as it was.
    """
    with _ONE_AT_A_TIME:  # of the threads of a process
        held = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        for name in held:
            parameters[name].grad = None
        try:
            yield
        finally:
            written = [name for name, p in parameters.items() if p.grad is not None]
            for name in {*held, *written}:
                parameters[name].grad = held.get(name)
    if written:
        raise ReentrantCheckpointError(
            f"A custom autograd function inside the model calls backward() and deposits "
            f"gradients by itself (into {written[0]}), before their weights are known.\n"
            f"Let the function return its gradients; combine() can also use schedule='retain'."
        )


@contextmanager
def undisturbed(registry: EdgeRegistry, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """No graph is made, nothing is cast, and no `.grad` is written."""
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(no_autocast())
        if registry.has_python():  # torch's own functions deposit nothing, and write to nothing
            stack.enter_context(grad_set_aside(parameters))
            stack.enter_context(_cotangents_copied(registry))
        yield


@contextmanager
def _cotangents_copied(registry: EdgeRegistry) -> Iterator[None]:
    """Hands functions written in Python copies of their cotangents.

    Some write to what they are handed, and that is what a reader holds, or a view of it.
    """
    handles: list[RemovableHandle] = []
    try:
        for node in registry.nodes:
            if is_python(node):
                handles.append(node.register_prehook(_copies))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _copies(cotangents: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple([None if b is None else b.clone() for b in cotangents])


class failures_named:  # noqa: N801
    """Gives torch's own failures of a backward a name, and says what to do.

    Raises:
        StaleFactorError: if a saved tensor was changed in place.
        UnsupportedModuleError: if a compiled graph can be used only once.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, RuntimeError):
            return
        if "modified by an inplace operation" in str(error):
            raise StaleFactorError(
                f"A tensor saved in the forward was changed in place before its Jacobian was read; "
                f"a plain backward would fail likewise.\n{error}\nChange a clone."
            ) from error
        if "donated buffer" in str(error):
            raise UnsupportedModuleError(
                "A part of the model was compiled so that its graph can be used only once, and "
                "this needs it more often.\nSet torch._functorch.config.donated_buffer = False "
                "before the model is compiled."
            ) from error
