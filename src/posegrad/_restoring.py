"""Temporary changes, undone when the call that made them ends, wherever it is cut short.

Ctrl-C may strike after any function returns: between a change and the `try` that would undo it,
within a `finally`, within torch's own context managers. So a `Change` is entered in a journal
before it is made. When an exception passes a public door (`@restoring`), the door undoes what is
left in the journal and puts back torch's flags. It does so twice, as the first time may be cut
short too.

None of this is a generator. A generator that was cut off at its `yield` goes on when it is
collected: it would undo its change once more, over what somebody else has set meanwhile.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import wraps
from threading import local
from typing import Any, ParamSpec, TypeVar, final

import torch
from torch import Tensor

from posegrad._threads import ThreadState, device_kinds, put_back, thread_state
from posegrad._torch import hooks_of, mode_guard

__all__ = ["Change", "leaf_hooks_off", "no_autocast", "no_graph", "ordinary_mode", "restoring"]

P = ParamSpec("P")
T = TypeVar("T")


@final
class _Journal(local):
    """The changes of this thread that are to be undone, the last one at the end."""

    def __init__(self) -> None:
        self.open: list[Change] = []


_JOURNAL = _Journal()


def _undo_from(depth: int) -> None:
    """Undoes changes, the last one first, until `depth` are left; if cut short, call it again."""
    changes = _JOURNAL.open
    while len(changes) > depth:
        changes[-1].undo()
        changes.pop()


class Change(ABC):
    """Something that is changed within a `with` and undone after it.

    Whatever `undo` needs is noted in `__init__`, before anything is changed. Changes that `make`
    enters are undone with it.
    """

    _depth: int

    @abstractmethod
    def make(self) -> Any:
        """Makes the change; returns what `with ... as` binds."""

    @abstractmethod
    def undo(self) -> None:
        """Undoes the change, even if it was made in part or not at all, or is undone already."""

    def __enter__(self) -> Any:
        self._depth = len(_JOURNAL.open)
        _JOURNAL.open.append(self)
        return self.make()

    def __exit__(self, *_: object) -> None:
        _undo_from(self._depth)


def restoring(function: Callable[P, T]) -> Callable[P, T]:
    """Makes a function a public door: an exception that passes it leaves no change behind."""

    @wraps(function)
    def door(*args: P.args, **kwargs: P.kwargs) -> T:
        depth, state = len(_JOURNAL.open), thread_state()
        try:
            try:
                return function(*args, **kwargs)
            except BaseException:
                _restore(depth, state)
                raise
        except BaseException:  # cut short while it restored
            _restore(depth, state)
            raise

    return door


def _restore(depth: int, state: ThreadState) -> None:
    _undo_from(depth)
    put_back(state)


@final
class no_graph(Change):  # noqa: N801
    """`torch.no_grad()` as a `Change`."""

    def __init__(self) -> None:
        self._before = torch.is_grad_enabled()

    def make(self) -> None:
        torch.set_grad_enabled(False)

    def undo(self) -> None:
        torch.set_grad_enabled(self._before)


@final
class ordinary_mode(Change):  # noqa: N801
    """Turns inference mode off; holds torch's guard, which undoes that whenever it is collected."""

    def __init__(self) -> None:
        self._guard: AbstractContextManager[Any] | None = None

    def make(self) -> None:
        if torch.is_inference_mode_enabled():
            self._guard = mode_guard(False)

    def undo(self) -> None:
        if self._guard is not None:
            self._guard.__exit__(None, None, None)


@final
class no_autocast(Change):  # noqa: N801
    """Turns autocast off: products of gradients stay in the precision they have."""

    def __init__(self) -> None:
        self._on = [kind for kind in device_kinds() if torch.is_autocast_enabled(kind)]

    def make(self) -> None:
        for kind in self._on:
            torch.set_autocast_enabled(kind, False)

    def undo(self) -> None:
        for kind in self._on:
            torch.set_autocast_enabled(kind, True)


@final
class leaf_hooks_off(Change):  # noqa: N801
    """Keeps `Tensor.register_hook` hooks of leaves from running.

    They would run for every `autograd.grad` that asks for the leaf, and once more when the sum is
    delivered; plain autograd runs them once, on the sum.
    """

    def __init__(self, leaves: Iterable[Tensor]) -> None:
        tables = [table for leaf in leaves if (table := hooks_of(leaf))]
        self._held = [(table, dict(table)) for table in tables]

    def make(self) -> None:
        for table, _ in self._held:
            table.clear()

    def undo(self) -> None:
        for table, functions in self._held:
            table.update(functions)
