"""From an output with its graph to its Jacobian."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import final

import torch
from torch import Tensor

from posegrad._restoring import restoring
from posegrad._torch import is_hooked
from posegrad._warn import warn
from posegrad.errors import NotDifferentiableError, ReentrantCheckpointError
from posegrad.graph._activations import edges_of, parts_at
from posegrad.graph._beside import Beside, gradients_of_sum
from posegrad.graph._boundary import (
    check_dimension,
    check_index,
    check_output,
    unrelated_message,
)
from posegrad.graph._edges import EdgeRegistry
from posegrad.graph._float16 import Scaling
from posegrad.graph._guard import (
    failures_named,
    listened_to,
    python_contained,
    retained_set_aside,
    undisturbed,
)
from posegrad.graph._hearing import Route
from posegrad.graph._inference import Trail
from posegrad.graph._listening import Outline, check_heard, check_packed, check_static
from posegrad.graph._outlook import Outlook, foreseen
from posegrad.graph._reading import Parts, Reading
from posegrad.graph._recipe import Recipe, of_rows, resolve, slow_parameters, uses_of
from posegrad.graph._release import release, slots_above
from posegrad.graph._sinks import Sinks
from posegrad.graph._structure import Found, Structure, Structures
from posegrad.graph._subject import Subject
from posegrad.graph._trial import Trial, attempt
from posegrad.graph._verify import Reference
from posegrad.graph._warnings import (
    coupled_message,
    disagreement_message,
    nan_message,
    nested_message,
)
from posegrad.graph._worklist import SettledWorklist, Worklist
from posegrad.jacobian import (
    ONE,
    TOGETHER,
    Arrangement,
    Backwards,
    Block,
    Layout,
    PoseJacobian,
    is_cast,
)

__all__ = ["Gatherer"]

CHECKS = ("first", "always", "never")

_NO_BACKWARDS = Backwards()


def _seeded() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(0)


@final
@dataclass
class Gatherer:
    """Reads Jacobians off graphs; remembers how for graphs of the same structure.

    Args:
        check: `"first"`, `"always"` or `"never"`: when to compare with a plain backward.
        batch_dim: The output's dimension that counts poses, `"auto"`, or None for rows only.
        block_bytes: About how much memory rows that have no closed form may take at once.
        tensors: Lists the parameters and buffers of the modules.
        is_shared: Whether all ranks make the same gradients of the rows, so that no DDP need sum
            them.
    """

    check: str
    batch_dim: int | str | None
    block_bytes: int
    tensors: Callable[[], Iterable[Tensor]]
    is_shared: bool = False
    _structures: Structures = field(default_factory=Structures)
    _scaling: Scaling = field(default_factory=Scaling)
    _generator: torch.Generator = field(default_factory=_seeded)

    def __post_init__(self) -> None:
        if self.check not in CHECKS:
            raise ValueError(f"check={self.check!r} is unknown; it is one of {', '.join(CHECKS)}.")
        dim = self.batch_dim
        if dim != "auto" and dim is not None and (type(dim) is not int or dim < 0):
            raise ValueError(
                f"batch_dim={dim!r} is unknown; it is 'auto', None, or a dimension from 0."
            )

    def outlook(self, output: object, parameters: Mapping[str, Tensor]) -> Outlook | None:
        """How an output would be read; None for anything that depends on no parameter."""
        if not isinstance(output, Tensor) or output.grad_fn is None:
            return None
        registry = _graph_of(output)
        used = registry.used(parameters)
        if not used:
            return None
        if registry.has_float16():  # it is a multiple that is read
            output = self._scaling.scaled(output)
            registry = _graph_of(output)
        dim = self._dim_of(output)
        known = self._structures.of(registry, used, output, stated=False)
        subject = Subject(output, registry, used, (), dim, _seeded(), known.trail, self.tensors)
        recipe = known.found.recipe
        is_due = self.check == "always" if recipe is None else self._is_due(recipe, subject)
        with failures_named(), undisturbed():
            recipe = recipe or self._of_rows(subject)
            return foreseen(subject, parameters, recipe, known.settled, is_due=is_due)

    def read(
        self,
        output: Tensor,
        parameters: Mapping[str, Tensor],
        *,
        pose_index: Sequence[Tensor] = (),
        keep_graph: bool = False,
        must_depend: bool = True,
        quiet: bool = False,
        registry: EdgeRegistry | None = None,
        beside: Beside | None = None,
    ) -> PoseJacobian:
        """The Jacobian of `output` with respect to `parameters`.

        Args:
            output: Of any shape, with its graph.
            parameters: Leaves, by name.
            pose_index: Owners of rows, one tensor for each kind of row.
            keep_graph: Leave the graph as it is.
            must_depend: Refuse an output that depends on none of them.
            quiet: Do not warn of slow ways.
            registry: The output's graph, if it was walked already.
            beside: Other leaves, if the gradient of the output's sum there is wanted too. Whoever
                asks for them has DDP notice the backward in which gradients are delivered.

        Raises:
            NoPosesError: if the output is empty.
            NotDifferentiableError: if it depends on none of the parameters.
            ReentrantCheckpointError: if a reentrant checkpoint is in its graph.
        """
        check_output(output)
        parts: Parts = {}
        backwards = _NO_BACKWARDS
        if output.requires_grad:
            registry = registry or _graph_of(output)
            used, dim = registry.used(parameters), self._dim_of(output)
            check_dimension(output, dim)
            check_index(pose_index)
            if used:
                known = self._structures.of(registry, used, output, stated=bool(pose_index))
                heard = listened_to(output, registry, known.slots)
                subject = Subject(
                    output, registry, used, pose_index, dim, self._generator, known.trail,
                    self.tensors, any(map(is_hooked, heard)), quiet, beside,
                )  # fmt: skip
                scale = known.has_float16
                scale = registry.has_float16() if scale is None else scale
                read = self._parts_in_float16 if scale else self._parts_of
                sinks = Sinks(registry)
                if beside is None and not self.is_shared:
                    sinks.check_delivered()
                with retained_set_aside(heard), sinks:
                    parts, backwards = read(subject, known, keep_graph)
        if not parts and must_depend:
            raise NotDifferentiableError(unrelated_message(output, len(parameters)))
        if beside is not None and registry is not None and beside.gradients is None:
            exponent = (self._scaling.exponent or 0) if registry.has_float16() else None
            with Sinks(registry):
                beside.gradients = gradients_of_sum(
                    output, registry, beside.leaves, parameters, exponent
                )
        blocks = {
            name: Block.of(p, output.numel(), parts.get(name, ())) for name, p in parameters.items()
        }
        return PoseJacobian(output.detach().clone(), parameters, blocks, backwards)

    @restoring
    def read_at(
        self,
        output: Tensor,
        activations: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor],
        *,
        pose_index: Sequence[Tensor] = (),
        keep_graph: bool = False,
    ) -> PoseJacobian:
        """The Jacobian of `output` by tensors of its graph, and by parameters if there are any.

        Args:
            output: As for `read`.
            activations: Tensors that the output was computed from, by name.
            parameters: Leaves, by name.
            pose_index: As for `read`.
            keep_graph: As for `read`.

        Raises:
            NotDifferentiableError: if the output does not depend on one of the tensors, or on none
                of the parameters. Other errors are those of `read`.
        """
        check_output(output)
        if not output.requires_grad:
            raise NotDifferentiableError(unrelated_message(output, len(activations)))
        registry, dim = _graph_of(output), self._dim_of(output)
        check_dimension(output, dim)
        check_index(pose_index)
        edges = edges_of(registry, activations)
        slots = slots_above(registry, [node for node, _ in edges.values()])
        heard = {id(t): t for t in (*listened_to(output, registry, slots), *activations.values())}
        backwards = Backwards()

        def read(scaled: Tensor) -> Parts:
            own = registry if scaled is output else EdgeRegistry(scaled)
            subject = Subject(
                scaled, own, {}, pose_index, dim, self._generator, Trail(), self.tensors, quiet=True
            )
            checked = self.check != "never"
            parts = parts_at(subject, activations, self.block_bytes, checked=checked)
            for purpose, count in subject.backwards.counts.items():
                backwards.add(purpose, count)
            return parts

        lock, aside, copied = python_contained(registry, parameters)
        guards = retained_set_aside([*heard.values()]), failures_named(), undisturbed()
        with Sinks(registry), guards[0], guards[1], guards[2], lock, aside, copied:
            scales = registry.has_float16()
            scaling = Scaling()
            parts = scaling.parts(output, activations, read, backwards) if scales else read(output)
        blocks = {
            name: Block.of(h.detach(), output.numel(), parts[name])
            for name, h in activations.items()
        }
        held = {name: h.detach() for name, h in activations.items()}
        if not parameters:
            if not keep_graph:
                release(registry, slots)
            return PoseJacobian(output.detach().clone(), held, blocks, backwards)
        rest = self.read(output, parameters, pose_index=pose_index, keep_graph=keep_graph)
        return rest.beside(held, blocks, backwards)

    def graph_of(self, output: Tensor) -> EdgeRegistry | None:
        """The graph of an output that can have a Jacobian; None if it has no graph."""
        check_output(output)
        return _graph_of(output) if output.requires_grad else None

    @restoring
    def listen(self, output: Tensor, parameters: Mapping[str, Tensor]) -> Outline:
        """All that is needed to hear the Jacobian of `output` in a backward of somebody else's.

        A structure that was not met before, or of which some rows were only zeros so far, is read
        and compared, as by `read`; the graph is kept.

        Raises:
            NoPosesError: if the output is empty.
            NotDifferentiableError: if it depends on none of the parameters.
            ListeningError: if one backward does not tell the rows.
        """
        check_output(output)
        registry = _graph_of(output) if output.requires_grad else None
        used = {} if registry is None else registry.used(parameters)
        if registry is None or not used:
            raise NotDifferentiableError(unrelated_message(output, len(parameters)))
        dim = self._dim_of(output)
        check_dimension(output, dim)
        known = self._structures.of(registry, used, output, stated=False)
        heard = listened_to(output, registry, known.slots)
        subject = Subject(
            output, registry, used, (), dim, self._generator, known.trail, self.tensors,
            any(map(is_hooked, heard)), quiet=True,
        )  # fmt: skip
        check_static(registry)
        lock, aside, copied = python_contained(registry, used)
        with retained_set_aside(heard), failures_named(), undisturbed(), lock, aside, copied:
            work, layouts = self._heard_by(subject, known)
            if known.route is None or known.route.work is not work:
                known.route = Route.of(registry, work, known.slots)
            check_packed(registry, known.route.packable)
            reading = Reading(subject, self.block_bytes)
            forms, tables = reading.forms(work)
        return Outline(
            reading, known.route, forms, tables, layouts, parameters, subject.backwards, bool(heard)
        )

    def _heard_by(
        self, subject: Subject, known: Structure
    ) -> tuple[Worklist, Sequence[Layout | None]]:
        """What to read, and whose the rows of each cotangent are, as far as that is known."""
        recipe = known.found.recipe if known.heard is None else known.heard.work.recipe
        if recipe is None or self._is_due(recipe, subject) or self._waiting(recipe, subject):
            own = {site.node for name in subject.parameters for site in uses_of(subject, name)}
            check_packed(subject.registry, [slot for slot in known.slots if slot[0] in own])
            _, backwards = self._parts_of(subject, known, keep_graph=True)
            if backwards is not subject.backwards:
                for purpose, count in backwards.counts.items():
                    subject.backwards.add(purpose, count)
            known.heard, recipe = None, known.found.recipe
        if known.heard is None and recipe is not None:
            known.heard = SettledWorklist.of(subject, recipe, known.slots)
        settled = known.heard
        if settled is not None and _is_followed(subject, settled):
            check_heard(subject, settled.work)
            return settled.work, settled.layouts or [None] * len(settled.work.edges)
        recipe, trial = _serving(subject, known.found)
        if recipe is None or trial is None:
            recipe, trial = self._new_recipe(subject)
        work = Worklist.of(subject, recipe)
        check_heard(subject, work)
        return work, [trial.layouts.get(edge) for edge in work.edges]

    def _parts_of(
        self, subject: Subject, known: Structure, keep_graph: bool
    ) -> tuple[Parts, Backwards]:
        special = subject.is_hooked or is_cast() or torch.is_inference_mode_enabled()
        with failures_named():
            if known.settled is not None and not special:
                settled = known.settled
                waiting = self._waiting(settled.work.recipe, subject)
                reading = Reading(subject, self.block_bytes, waiting)
                with nullcontext() if settled.spares_graph else undisturbed():
                    keeps = keep_graph or bool(waiting)
                    parts = reading.settled(settled, known.slots, keep_graph=keeps)
                if parts is not None and not reading.flowing:
                    if keeps and not keep_graph:
                        release(subject.registry, known.slots)
                    if settled.together:
                        return parts, TOGETHER
                    return parts, ONE if settled.takes_one else subject.backwards
            recipes = [r for r in (known.found.recipe, known.found.other) if r is not None]
            waiting = frozenset[str]().union(*(self._waiting(r, subject) for r in recipes))
            reading = Reading(subject, self.block_bytes, waiting)
            lock, aside, copied = python_contained(subject.registry, subject.parameters)
            with undisturbed(), lock, aside, copied:
                recipe, parts = self._read(reading, known.found)
                if not keep_graph:
                    release(subject.registry, known.slots)
        is_usual = recipe is known.found.recipe and (
            subject.is_fixed or not slow_parameters(recipe)
        )
        if is_usual and not special and not self._is_due(recipe, subject):
            known.settle(subject, recipe, reading.declined)
        return parts, subject.backwards

    def _parts_in_float16(
        self, subject: Subject, known: Structure, keep_graph: bool
    ) -> tuple[Parts, Backwards]:
        readings: list[Backwards] = []

        def read(scaled: Tensor) -> Parts:
            own = EdgeRegistry(scaled)
            stated = bool(subject.pose_index)
            known = self._structures.of(own, subject.parameters, scaled, stated=stated)
            seen = replace(subject, output=scaled, registry=own, trail=known.trail, beside=None)
            parts, backwards = self._parts_of(seen, known, keep_graph=True)
            readings.append(backwards)
            return parts

        lock, aside, copied = python_contained(subject.registry, subject.parameters)
        with undisturbed(), lock, aside, copied, failures_named():
            parts = self._scaling.parts(subject.output, subject.parameters, read, subject.backwards)
            if not keep_graph:
                release(subject.registry, known.slots)
        return parts, reduce(Backwards.joined, readings, subject.backwards)

    def _dim_of(self, output: Tensor) -> int | None:
        """The output's dimension that counts poses, if the caller has said."""
        return self.batch_dim if isinstance(self.batch_dim, int) and output.ndim else None

    def _read(self, reading: Reading, found: Found) -> tuple[Recipe, Parts]:
        subject, is_lasting = reading.subject, True
        reference = Reference.of(subject) if self._is_due(found.recipe, subject) else None
        recipe, trial = _serving(subject, found)
        if recipe is None or trial is None:
            recipe, trial = self._new_recipe(subject)  # or poses mix this time
            if reference is None and self._is_due(None, subject):
                reference = Reference.of(subject)  # before anything else is held
            slow = slow_parameters(recipe)
            is_lasting = not trial.is_lost_in_nan()
            if slow and not subject.quiet and self.batch_dim is not None:
                warn(_why_slow(slow, subject, is_lasting=is_lasting))
        parts = reading.open(recipe, trial)
        if reference is None and reading.flowing - recipe.verified:
            reference = Reference.of(subject)
        if reference is not None:
            once = self.check == "first" and not subject.is_hooked
            done = recipe.verified if once else frozenset()
            doubtful = frozenset(parts) - done - recipe.by_rows.keys()  # those are autograd's own
            recipe, parts = _verified(reading, recipe, parts, reference, doubtful)
        if is_lasting:
            found.keep(recipe, subject)
        return recipe, parts

    def _is_due(self, recipe: Recipe | None, subject: Subject) -> bool:
        """Whether rows are to be compared with a plain backward, whatever they are."""
        if self.check == "first" and not subject.is_hooked:
            return recipe is None
        return self.check != "never"

    def _waiting(self, recipe: Recipe, subject: Subject) -> frozenset[str]:
        """The parameters whose rows are compared as soon as they are not zero.

        They have been zero, which agrees with a gradient of zero; but a gate may open. As long as
        no cotangent comes to where a parameter enters, its rows are zero by any reading.
        """
        if self.check == "never" or subject.is_hooked:
            return frozenset()
        return frozenset(subject.parameters) - recipe.verified

    def _new_recipe(self, subject: Subject) -> tuple[Recipe, Trial]:
        whole = self._of_rows(subject)
        return resolve(subject) if whole is None else (whole, Trial({}, {}))

    def _of_rows(self, subject: Subject) -> Recipe | None:
        if self.batch_dim is None:
            return Recipe(None, (), dict.fromkeys(subject.parameters, "batch_dim=None"))
        return of_rows(subject)


def _graph_of(output: Tensor) -> EdgeRegistry:
    try:
        return EdgeRegistry(output)
    except ReentrantCheckpointError:
        raise ReentrantCheckpointError(
            "The output was computed through torch.utils.checkpoint with use_reentrant=True, which "
            "works under a plain backward() only, so no row can be read.\n"
            "Use use_reentrant=False."
        ) from None


def _serving(subject: Subject, found: Found) -> tuple[Recipe | None, Trial | None]:
    """A recipe that is known and serves this graph, and the cotangents it needs."""
    for recipe in found.likely(subject):
        trial = _tried(subject, recipe)
        if all(map(trial.serves, recipe.sites)):
            return recipe, trial
    return None, None


def _is_followed(subject: Subject, settled: SettledWorklist) -> bool:
    """Whether poses are followed to all edges of a worklist in this very graph."""
    if settled.layouts is not None or settled.work.arrangement.poses == 1:
        return True
    layouts = subject.layouts(settled.work.arrangement)
    return all(edge in layouts for edge in settled.work.edges)


def _tried(subject: Subject, recipe: Recipe) -> Trial:
    """The cotangents a known recipe needs."""
    arrangement = Arrangement(subject.output.shape, recipe.dim)
    trial = attempt(subject, arrangement, recipe.sites)
    subject.blame(arrangement, trial.layouts)
    return trial


def _why_slow(slow: Sequence[str], subject: Subject, *, is_lasting: bool) -> str:
    if subject.registry.is_nested:
        return nested_message()
    return coupled_message(slow) if is_lasting else nan_message(slow, subject.output)


def _live(parts: Parts, names: Iterable[str]) -> frozenset[str]:
    """Those of some parameters that have rows other than zero."""
    return frozenset(name for name in names if any(part.is_live() for part in parts[name]))


def _verified(
    reading: Reading,
    recipe: Recipe,
    parts: Parts,
    reference: Reference,
    doubtful: frozenset[str],
) -> tuple[Recipe, Parts]:
    """Compares with autograd; what disagrees goes down the ladder, with one warning."""
    subject = reading.subject
    wrong, sure = reference.disagreeing(subject, parts, doubtful)
    if wrong:
        if not subject.quiet:
            warn(disagreement_message(wrong))
        recipe = replace(
            recipe,
            sites=tuple(
                replace(site, closed=False) if site.parameter in wrong else site
                for site in recipe.sites
            ),
        )
        parts = reading.open(recipe, _tried(subject, recipe))
        still, _ = reference.disagreeing(subject, parts, wrong)
        if still:
            sites = tuple(site for site in recipe.sites if site.parameter not in still)
            lost = {**recipe.by_rows, **dict.fromkeys(still, "disagreed with autograd")}
            recipe = replace(recipe, sites=sites, by_rows=lost)
            parts = reading.open(recipe, _tried(subject, recipe))
    verified = recipe.verified | _live(parts, sure) | recipe.by_rows.keys()
    return replace(recipe, verified=verified), parts
