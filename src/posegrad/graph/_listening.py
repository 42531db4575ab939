"""Reads a Jacobian out of a backward that somebody else runs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Self, final
from weakref import WeakMethod

import torch
from torch import Tensor

from posegrad._restoring import restoring
from posegrad._torch import is_of_static_ddp, is_packed_at, is_python, memory_of
from posegrad.errors import ListeningError, NonFiniteGradientError, NoPosesError, listed
from posegrad.graph._edges import EdgeRegistry
from posegrad.graph._guard import failures_named, undisturbed
from posegrad.graph._hearing import Hearing, Hooks, Route, versions_count
from posegrad.graph._reading import Forms, Looked, Reading, Tables
from posegrad.graph._release import Slot
from posegrad.graph._subject import Subject
from posegrad.graph._trial import known_layout
from posegrad.graph._worklist import Worklist
from posegrad.jacobian import (
    Backwards,
    Block,
    Jacobian,
    Layout,
    PoseJacobian,
    Unweighted,
    is_cast,
)

__all__ = ["Listening", "Outline", "check_heard", "check_packed", "check_static"]

Finish = Callable[[Callable[[Mapping[str, Tensor]], PoseJacobian]], Jacobian]
"""From the function that makes this process's Jacobian to the Jacobian of all ranks."""


@final
@dataclass(frozen=True)
class Outline:
    """All that is known of a Jacobian before the backward in which it is heard.

    Args:
        reading: The reading.
        route: What is read, and where hooks go.
        forms: The closed form of each use.
        tables: The tables that rows were looked up in.
        layouts: By place; None where the numbers of the cotangent have to be seen.
        parameters: The parameters of the Jacobian, by name.
        backwards: The backwards that it took to find all this out.
        is_watched: Whether somebody else may keep the cotangents and write to them.
    """

    reading: Reading
    route: Route
    forms: Forms
    tables: Tables
    layouts: Sequence[Layout | None]
    parameters: Mapping[str, Tensor]
    backwards: Backwards
    is_watched: bool

    @property
    def subject(self) -> Subject:
        """What is differentiated."""
        return self.reading.subject

    @property
    def work(self) -> Worklist:
        """What is read."""
        return self.route.work


@final
class Listening:
    r"""Hears the Jacobian of an output in a backward that somebody else runs.

    Made by `Engine.listen`. While it listens, hooks stand on the edges of the graph between the
    output and where parameters enter. What the backward brings there is what a Jacobian needs,
    times each pose's cotangent of the output, :math:`w_i`; `jacobian` divides that out again.

    Use it in a `with`, or by `start()` and `stop()`, where a trainer calls the backward.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> losses = model(torch.eye(2)).squeeze(1)
        >>> with Engine(model).listen(losses) as heard:
        ...     losses.mean().backward()
        >>> heard.jacobian.norms()
        tensor([1.4142, 1.4142])
        >>> heard.rows
        tensor([True, True])
    """

    def __init__(self, outline: Outline | NoPosesError, finish: Finish) -> None:
        self._outline = outline if isinstance(outline, Outline) else None
        self._nothing = None if isinstance(outline, Outline) else outline
        self._finish = finish
        # A hook may hand on a tensor of its own, whose version counts nothing.
        self._counts = versions_count() and not (self._outline and self._outline.is_watched)
        self._hooks = Hooks(WeakMethod(self._begin))
        self._shared: list[Layout] = []
        self._found: tuple[Tensor, PoseJacobian] | None = None
        self._failure: Exception | None = None
        self._of_all: Jacobian | None = None

    @classmethod
    def of(cls, outlined: Callable[[], Outline], finish: Finish, *, is_shared: bool) -> Self:
        """A listening that waits for a backward.

        Args:
            outlined: Looks at the graph; raises NoPosesError if the output is empty, as it may be
                on some ranks.
            finish: Makes the Jacobian of all ranks.
            is_shared: Whether there are ranks.
        """
        try:
            return cls(outlined(), finish)
        except NoPosesError as error:
            if not is_shared:
                raise
            return cls(error, finish)

    @restoring
    def start(self) -> Self:
        """Puts the hooks on.

        Raises:
            ListeningError: if it has been stopped: one `listen` hears one graph.
        """
        if self._nothing is not None:
            return self
        if self._outline is None:
            raise ListeningError(
                "start() after stop(): the graph that was listened to is gone.\n"
                "Call engine.listen(output) for each new output."
            )
        self._hooks.remove()
        self._hooks.put(self._outline.subject.registry, self._outline.route)
        return self

    @restoring
    def stop(self) -> None:
        """Takes the hooks off, and lets go of the graph; what was heard stays. Never raises."""
        self._hooks.remove()
        if self._outline is not None:
            try:
                self._settle()
            except Exception as error:
                self._failure = error.with_traceback(None)  # a traceback's frames hold the graph
            self._outline = None
            self._hooks.heard = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def jacobian(self) -> Jacobian:
        """J of the output, of the rows whose cotangent is not zero, by the last backward.

        Its output is the one that was listened to; if some rows are absent, only the numbers that
        have a row, `[M]`.

        Raises:
            ListeningError: if no backward came, or not all of one.
            CotangentBypassError: if gradients reached the parameters past the output.
            StaleFactorError: if a tensor the forward saved was changed in place since.
            NonFiniteGradientError: if rows of cotangent zero have gradients that are not finite.
        """
        if self._of_all is None:
            self._of_all = self._finish(lambda _: self._settle()[1])
        return self._of_all

    @property
    def rows(self) -> Tensor:
        """Which numbers of the output have a row, a mask in its shape; raises as `jacobian`."""
        return self._settle()[0]

    @restoring
    def _settle(self) -> tuple[Tensor, PoseJacobian]:
        """The mask and this process's Jacobian."""
        failure = self._nothing or self._failure
        if failure is not None:
            raise failure
        if self._found is None:
            if self._hooks.heard is None or self._outline is None:
                raise ListeningError(
                    "No backward came through the output while it was listened to.\n"
                    "Call backward() of a loss of that very output inside the with block, or "
                    "between start() and stop()."
                )
            with failures_named(), undisturbed():
                self._found = self._read(self._outline, self._hooks.heard)
        return self._found

    def _begin(self) -> Hearing | None:
        outline = self._outline
        if outline is None:
            return None
        self._found = self._of_all = None
        copies = outline.subject.registry.has_python()  # which may write to what it is handed
        return Hearing(outline.route, WeakMethod(self._take), copies=copies, counts=self._counts)

    @restoring
    def _take(self, hearing: Hearing, node: int) -> None:
        """Reads what needs an operator's saved tensors, before the operator runs and frees them."""
        outline = self._outline
        if outline is None:
            return
        work, subject = outline.work, outline.subject
        layouts = [*outline.layouts]
        with failures_named(), _at_ease():
            for place in [place for _, place in outline.route.early[node]]:
                if layouts[place] is None:
                    layouts[place] = known_layout(
                        subject, work.arrangement, work.edges[place],
                        hearing.columns[place], self._shared,
                    )  # fmt: skip
                if layouts[place] is None:
                    raise NonFiniteGradientError(
                        "Rows of activations that belong to no pose have gradients that are nan "
                        "or infinite.\nLook for infinite numbers in the forward."
                    )
            numbers, work = outline.route.uses[node]
            forms = [outline.forms[i] for i in numbers]
            looked = Looked([[*hearing.columns]], layouts)  # a copy, as it is emptied
            found = outline.reading.multiplied(work, forms, outline.tables, looked)
        for name, parts in found.items():
            hearing.parts.setdefault(name, []).extend(parts)

    def _read(self, outline: Outline, hearing: Hearing) -> tuple[Tensor, PoseJacobian]:
        hearing.check()
        weights, output = hearing.weights, outline.subject.output
        assert weights is not None
        own = {memory_of(b) for b in hearing.columns if b is not None} - {-1}
        if not outline.is_watched:
            grads = [p.grad for p in outline.parameters.values() if p.grad is not None]
            own &= {*map(memory_of, grads)}
        unweighted = Unweighted(weights, outline.work.arrangement, foreign=own)
        parts = hearing.parts if unweighted.count else {}
        blocks = {
            name: Block.of(
                p, unweighted.count, [unweighted.of(part) for part in parts.get(name, ())]
            )
            for name, p in outline.parameters.items()
        }
        rows = unweighted.kept.reshape(output.shape)
        values = output.detach()
        values = values.clone() if unweighted.count == output.numel() else values[rows]
        return rows, PoseJacobian(values, outline.parameters, blocks, outline.backwards)


def _at_ease() -> AbstractContextManager[object]:
    """Inside it no graph is made and nothing is cast, as in most backwards anyway."""
    is_ordinary = not (torch.is_grad_enabled() or torch.is_inference_mode_enabled() or is_cast())
    return nullcontext() if is_ordinary else undisturbed()


def check_packed(registry: EdgeRegistry, slots: Iterable[Slot]) -> None:
    """Refuses operators whose saved tensors have been packed.

    A checkpoint unpacks each tensor once in a backward, and the operator itself needs that.

    Raises:
        ListeningError: if one is.
    """
    packed = [
        registry.names[node] for node, name in slots if is_packed_at(registry.nodes[node], name)
    ]
    if packed:
        raise ListeningError(
            f"What {len(packed)} operators at parameters saved ({listed(packed)}) has been packed, "
            f"by a checkpoint or save_on_cpu, and is unpacked once in a backward, by the operator "
            f"itself.\n"
            f"Call engine.jacobian(output, retain_graph=True) before the backward instead."
        )


def check_static(registry: EdgeRegistry) -> None:
    """Refuses graphs through a DDP with `static_graph=True`: no backward may pass before yours.

    Raises:
        ListeningError: if this is one.
    """
    if any(map(is_of_static_ddp, registry.nodes)):
        raise ListeningError(
            "The output was computed through a DistributedDataParallel with static_graph=True, "
            "which averages gradients after the first backward that passes it, and finding out "
            "how to listen takes a backward before yours.\n"
            "Leave static_graph=True out."
        )


def check_heard(subject: Subject, work: Worklist) -> None:
    """Refuses rows that one backward does not tell.

    The rows of a function written in Python take its backward once for each row. That may free, as
    the backward of a compiled part does, what the function needs when its own turn comes.

    Raises:
        ListeningError: if there are any.
    """
    recipe, arrangement = work.recipe, work.arrangement
    instead = "Call engine.jacobian(output, retain_graph=True) before the backward instead."
    if recipe.by_rows:
        whys = listed([f"{name} ({why})" for name, why in sorted(recipe.by_rows.items())])
        raise ListeningError(
            f"The rows of some parameters take a backward each: {whys}. One backward brings only "
            f"their weighted sum.\n{instead}"
        )
    if arrangement.components > 1:
        raise ListeningError(
            f"The output has shape {list(arrangement.shape)}: {arrangement.components} numbers for "
            f"each pose share rows of activations, and a backward brings only their weighted sum.\n"
            f"Listen to one number for each pose, as its loss. Or: {instead}"
        )
    nodes = [use.site.node for use in work.uses if use.reader is None]
    custom = [subject.registry.names[n] for n in nodes if is_python(subject.registry.nodes[n])]
    if custom:
        raise ListeningError(
            f"Parameters enter functions written in Python or compiled: {listed(custom)}. Their "
            f"rows take a backward of these functions each, before the one that counts.\n{instead}"
        )
