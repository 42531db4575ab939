"""What hooks on a graph hear of a backward that somebody else runs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial, reduce
from typing import final
from weakref import WeakMethod

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from posegrad._restoring import no_autocast, ordinary_mode
from posegrad._torch import is_python, version_of
from posegrad.errors import CotangentBypassError, ListeningError, StaleFactorError
from posegrad.graph._edges import Edge, EdgeRegistry, named
from posegrad.graph._reading import Parts
from posegrad.graph._release import Slot
from posegrad.graph._worklist import Worklist

__all__ = ["Hearing", "Hooks", "Route", "versions_count"]


@final
@dataclass(frozen=True)
class Route:
    """The way of cotangents from an output to where parameters enter, which the structure tells.

    Args:
        work: What is read there.
        early: For each operator whose cotangents must be seen before it runs, those that are read:
            the number of the operator's output, and the place in the worklist. Such operators are
            the first one, those that are read, and those that may write to what they are handed.
        sends: For each operator on the way, the arguments that lie on the way, too, and their
            edges.
        uses: For each operator that is read, the numbers of the uses there, and a worklist of
            these alone.
        packable: For each operator whose saved tensors are read, one of its slots, to see whether
            a checkpoint holds it.
        names: What the operators are called.
        root: The output.
    """

    work: Worklist
    early: Mapping[int, tuple[tuple[int, int], ...]]
    sends: Mapping[int, tuple[tuple[int, Edge], ...]]
    uses: Mapping[int, tuple[list[int], Worklist]]
    packable: Sequence[Slot]
    names: Sequence[str]
    root: Edge

    @classmethod
    def of(cls, registry: EdgeRegistry, work: Worklist, slots: Sequence[Slot]) -> "Route":
        """The way to all that a worklist reads in a graph; `slots` hold its saved tensors."""
        uses: dict[int, list[int]] = {}
        for number, use in enumerate(work.uses):
            uses.setdefault(use.site.node, []).append(number)
        nodes = {*registry.above(uses), *uses}
        early = {node for node in nodes if is_python(registry.nodes[node])}
        early |= {registry.root[0], *uses}
        places: dict[int, list[tuple[int, int]]] = {node: [] for node in sorted(early)}
        for place, (node, output) in enumerate(work.edges):
            places[node].append((output, place))
        sends = {
            node: tuple([
                (argument, edge)
                for argument, edge in enumerate(registry.sources[node])
                if edge is not None and edge[0] in nodes
            ])
            for node in nodes
        }  # fmt: skip
        seen = {node: tuple(pairs) for node, pairs in places.items()}
        own = {
            node: (numbers, replace(work, uses=[work.uses[i] for i in numbers]))
            for node, numbers in uses.items()
        }
        read = _read(registry, work)
        packable = {node: name for node, name in reversed(slots) if node in read}
        return cls(work, seen, sends, own, [*packable.items()], registry.names, registry.root)


def _read(registry: EdgeRegistry, work: Worklist) -> set[int]:
    """The operators whose saved tensors are read: by forms, or by backwards of computed weights."""
    nodes = {*work.operators, *(use.site.node for use in work.uses)}
    far = {s.source[0] for s in work.recipe.sites if not (s.direct or s.light)}
    return nodes.union(*map(registry.below, far))


Take = WeakMethod[Callable[["Hearing", int], None]]
"""Called when an operator that is read has all its cotangents, before it runs."""

Begin = WeakMethod[Callable[[], "Hearing | None"]]
"""Makes a hearing for a backward that starts."""


@final
class Hearing:
    """One backward, as far as it was heard; it holds no node, since the nodes' hooks hold it.

    All cotangents must enter through the output. So what arrives at an operator must be the sum of
    what the operators between it and the output have sent it; a loss that enters from the side
    would add to that. A cotangent that was sent alone arrives as the same tensor. Of several,
    autograd adds two into a new tensor and the others to that in place, so its version counts them
    (`versions_count`). If the version does not fit, the sum is taken again, as autograd takes it,
    and compared bit by bit.

    Args:
        route: Where to listen, and what is read there.
        take: Reads an operator that has all its cotangents.
        copies: Whether cotangents are copied, since somebody may write to them.
        counts: Whether versions count the cotangents that are added up.

    Attributes:
        weights: The cotangent of the output; None if none came.
        columns: The cotangents by their place in the worklist.
        parts: What was read of them, by parameter.
        failure: The first error; it is raised only once the backward is over.
    """

    def __init__(self, route: Route, take: Take, *, copies: bool, counts: bool) -> None:
        places = len(route.work.edges)
        self.weights: Tensor | None = None
        self.columns: list[Tensor | None] = [None] * places
        self.parts: Parts = {}
        self.failure: Exception | None = None
        self._versions = [0] * places
        self._route = route
        self._take = take
        self._copies = copies
        self._counts = counts and not torch.is_grad_enabled()
        self._waiting = set(route.sends)
        self._running: set[int] = set()
        self._is_taking = False  # taking may run backwards of its own below
        self._sent: dict[Edge, list[Tensor]] = {}

    def arrive(self, node: int, cotangents: Sequence[Tensor | None]) -> None:
        """Notes the cotangents of an operator that is about to run."""
        if self.failure is not None or self._is_taking or node not in self._waiting:
            return  # an operator runs once in a backward; this is another, which began elsewhere
        try:
            self._compare(node, cotangents)
            self._running.add(node)
            if pairs := self._route.early[node]:
                for output, place in pairs:
                    self._note(place, cotangents[output])
                take = self._take()
                if take is not None:
                    self._is_taking = True
                    take(self, node)
        except Exception as error:
            self._fail(error)
        finally:
            self._is_taking = False

    def leave(
        self, node: int, gradients: Sequence[Tensor | None], cotangents: Sequence[Tensor | None]
    ) -> None:
        """Notes what an operator that has run sends on; compares what it was handed, if not yet."""
        if self.failure is not None or self._is_taking:
            return
        try:
            if node in self._running:
                self._running.discard(node)
            elif node in self._waiting and node not in self._route.early:
                self._compare(node, cotangents)
            else:
                return
        except Exception as error:
            self._fail(error)
            return
        for argument, edge in self._route.sends[node]:
            gradient = gradients[argument]
            if gradient is not None:
                self._sent.setdefault(edge, []).append(gradient)

    def check(self) -> None:
        """Raises what went wrong.

        Raises:
            ListeningError: if the backward did not come, or not all of it.
            CotangentBypassError: if cotangents entered from the side.
            StaleFactorError: if one was changed in place since.
        """
        if self.failure is not None:
            raise self.failure
        if self._waiting or self.weights is None:
            raise ListeningError(
                "The backward did not pass all the parameters that were listened to: it was cut "
                "short, took inputs=, or sent the output no gradient.\n"
                "Call backward() of a loss of the output, without inputs=."
            )
        for cotangent, version in zip(self.columns, self._versions, strict=True):
            if cotangent is not None and version_of(cotangent) != version:
                raise StaleFactorError(
                    f"A cotangent of shape {list(cotangent.shape)} that was heard in the backward "
                    f"has been changed in place since, as a part of .grad.\n"
                    f"Call stop(), or leave the with block, before gradients are changed."
                )

    def _note(self, place: int, cotangent: Tensor | None) -> None:
        if cotangent is not None:
            if self._copies:
                cotangent = cotangent.detach().clone()
            elif cotangent.requires_grad:
                cotangent = cotangent.detach()
            self._versions[place] = version_of(cotangent)
        self.columns[place] = cotangent

    def _compare(self, node: int, cotangents: Sequence[Tensor | None]) -> None:
        """Compares what an operator was handed with what was sent."""
        self._waiting.discard(node)
        for output, arrived in enumerate(cotangents):
            sent = self._sent.pop((node, output), ())
            if len(sent) != 1 or arrived is not sent[0]:
                self._check((node, output), arrived, sent)

    def _check(self, edge: Edge, arrived: Tensor | None, sent: Sequence[Tensor]) -> None:
        if edge == self._route.root:
            self.weights = None if arrived is None else arrived.detach().clone()
        elif self._counts and len(sent) > 1 and _is_sum(arrived, sent):
            pass
        elif _differ(arrived, sent):
            raise CotangentBypassError(
                f"A gradient reached the result of {named(self._route.names[edge[0]])} past the "
                f"output that is listened to: from an auxiliary loss, or a hook that changes "
                f"gradients.\n"
                f"What arrives at the parameters behind it is no longer the output's alone. Add "
                f"the auxiliary loss to the output before listening, give it a backward of its "
                f"own, or call engine.jacobian(output, retain_graph=True)."
            )

    def _fail(self, error: Exception) -> None:
        self.failure = error.with_traceback(None)  # a traceback's frames hold the graph
        self.columns = [None] * len(self.columns)
        self.parts.clear()
        self._sent.clear()


@final
class Hooks:
    """The hooks on the operators of a route, and what they have heard last.

    They know whoever listens only by weak references. The graph holds them, and whoever listens
    holds the graph: that would be a cycle through torch's own nodes, which no collector finds.

    Attributes:
        heard: The last backward.
    """

    def __init__(self, begin: Begin) -> None:
        self.heard: Hearing | None = None
        self._begin = begin
        self._handles: list[RemovableHandle] = []

    def put(self, registry: EdgeRegistry, route: Route) -> None:
        """Puts them on; all or none."""
        try:
            for node in route.sends:
                at = registry.nodes[node]
                # In one call: between two steps of Python an interrupt could lose the handle.
                if node in route.early:
                    before = self._first if node == route.root[0] else self._arrive
                    self._handles.extend(map(at.register_prehook, (partial(before, node),)))
                self._handles.extend(map(at.register_hook, (partial(self._leave, node),)))
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Takes them off; also if some are off already."""
        try:
            self._remove()
        except BaseException:  # an interrupt: once more
            self._remove()
            raise

    def _remove(self) -> None:
        while self._handles:
            self._handles[-1].remove()
            self._handles.pop()

    def _first(self, node: int, cotangents: tuple[Tensor | None, ...]) -> None:
        begin = self._begin()
        self.heard = None if begin is None else begin()
        self._arrive(node, cotangents)

    def _arrive(self, node: int, cotangents: tuple[Tensor | None, ...]) -> None:
        if self.heard is not None:
            self.heard.arrive(node, cotangents)

    def _leave(
        self,
        node: int,
        gradients: tuple[Tensor | None, ...],
        cotangents: tuple[Tensor | None, ...],
    ) -> None:
        if self.heard is not None:
            self.heard.leave(node, gradients, cotangents)


def _is_sum(arrived: Tensor | None, sent: Sequence[Tensor]) -> bool:
    """Whether what arrived is autograd's sum of what was sent, as far as its version tells.

    Autograd makes a new tensor of the first two and adds the others to it in place, each of which
    raises its version by one. All parts are held here, so it reuses none of them.
    """
    if type(arrived) is not Tensor or any(arrived is one for one in sent):
        return False
    return version_of(arrived) == len(sent) - 2 and arrived.layout == torch.strided


@cache
def versions_count() -> bool:
    """Whether versions count the gradients that are added up, which torch does not promise.

    The sum of two gradients that somebody holds is a new tensor; each further one is added to it in
    place. A gradient that nobody holds must show in the version, too, be it the first, the second
    or the last.
    """
    held = [_version_of_sum(3, unheld) for unheld in range(3)]
    return _version_of_sum(2) == 0 and _version_of_sum(3) == 1 and 0 not in held


def _version_of_sum(count: int, unheld: int | None = None) -> int:
    """The version of a sum of gradients, of which all but one are held."""
    holding: list[object] = []
    versions: list[int] = []
    with ordinary_mode(), no_autocast(), torch.enable_grad():
        start = torch.zeros(2, requires_grad=True, device="cpu").clone()
        taken = [start * (factor + 1.0) for factor in range(count)]
        for number, one in enumerate(taken):
            if number != unheld:
                one.grad_fn.register_hook(lambda sent, _: holding.append(sent))  # type: ignore[union-attr]
        hook = lambda arrived: versions.append(version_of(arrived[0]))  # noqa: E731
        start.grad_fn.register_prehook(hook)  # type: ignore[union-attr]
        torch.autograd.backward(torch.stack(taken).sum())
    return versions[0]


def _differ(arrived: Tensor | None, sent: Sequence[Tensor]) -> bool:
    """Whether what arrived is not the sum of what was sent, in any bit."""
    if arrived is None or not sent:
        return any(bool(one.any()) for one in (*sent, *([] if arrived is None else [arrived])))
    with torch.no_grad():
        total = reduce(torch.add, sent)
        return not (
            torch.equal(arrived, total) or torch.allclose(arrived, total, 0, 0, equal_nan=True)
        )
