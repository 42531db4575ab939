"""What is remembered of graphs, and for which others it holds."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, final

from torch import Tensor

from posegrad.graph._edges import EdgeRegistry
from posegrad.graph._hearing import Route
from posegrad.graph._inference import Trail
from posegrad.graph._recipe import Recipe, is_followed, keeps_apart, slow_parameters
from posegrad.graph._release import Slot, slots_above
from posegrad.graph._sites import Site, kept_shapes
from posegrad.graph._subject import Subject
from posegrad.graph._together import pays_together
from posegrad.graph._worklist import SettledWorklist

__all__ = ["Found", "Structure", "Structures"]

_MOST = 256  # structures that are remembered
_MOST_NODES = 2**18  # of all of them together: some 100 MB

_Key = tuple[Any, ...]
"""All that decisions looked at, never only its hash: 4 and 2**64 - 4, as which the dimension -4 is
saved, have the same hash."""


@final
@dataclass
class Found:
    """The recipe of a structure, once there is one; it serves graphs of other sizes too.

    Args:
        recipe: The recipe.
        other: A recipe for graphs in which poses mix, if that depends on the numbers that pick
            rows. So a batch that mixes poses has no effect on those after it.
    """

    recipe: Recipe | None = None
    other: Recipe | None = None

    def likely(self, subject: Subject) -> Iterator[Recipe]:
        """The recipes that may serve a graph, the likelier first."""
        first, other = self.recipe, self.other
        if first is None or (slow_parameters(first) and keeps_apart(subject, first)):
            return
        if other is None or is_followed(subject, first):
            yield first
        if other is not None:
            yield other

    def keep(self, recipe: Recipe, subject: Subject) -> None:
        """Keeps a recipe for graphs to come."""
        known = self.recipe
        if known is None or subject.is_fixed or not slow_parameters(recipe):
            if known is not None and not subject.is_fixed and slow_parameters(known):
                self.other = known
            self.recipe = recipe
        elif slow_parameters(known):
            self.recipe = recipe
        else:
            self.other = recipe


@final
@dataclass
class Structure:
    """What is known of all graphs of one structure and one set of shapes.

    Args:
        found: The recipe.
        has_float16: Whether gradients pass through float16; None if each graph has to be asked, for
            what functions written in Python saved.
        slots: Where nodes above the parameters hold saved tensors.
        trail: What following poses through earlier graphs of it told.
        settled: How to read it, once nothing is open.
        heard: How to hear it, once somebody listened. As in `settled`, where poses lie follows
            without numbers that flow; but no reading has shown which closed forms do not serve.
        route: Where to listen.
        together: Whether all rows together take less time than use by use; None if not yet known.
    """

    found: Found
    has_float16: bool | None
    slots: list[Slot]
    trail: Trail = field(default_factory=Trail)
    settled: SettledWorklist | None = None
    heard: SettledWorklist | None = None
    route: Route | None = None
    together: bool | None = None

    def settle(self, subject: Subject, recipe: Recipe, declined: Collection[Site]) -> None:
        """Settles how graphs of the structure are read, if nothing is open."""
        if self.together is None:
            self.together = pays_together(subject)
        self.settled = SettledWorklist.of(
            subject, recipe, self.slots, declined, together=self.together
        )


@final
@dataclass
class Structures:
    """The structures an engine has met."""

    _found: dict[_Key, Found] = field(default_factory=dict)
    _known: dict[_Key, Structure] = field(default_factory=dict)

    def of(
        self,
        registry: EdgeRegistry,
        parameters: Mapping[str, Tensor],
        output: Tensor,
        *,
        stated: bool,
    ) -> Structure:
        """What is known of graphs like this one.

        Args:
            registry: The graph.
            parameters: Those that the output depends on.
            output: The output.
            stated: Whether the caller states owners.
        """
        kinds = registry.structure({id(p): i for i, p in enumerate(parameters.values())})
        sizes = tuple(registry.sizes)
        devices = frozenset({output.device, *(p.device for p in parameters.values())})
        rest = tuple(parameters), stated, devices
        key = kinds, sizes, rest
        known = self._known.get(key)
        if known is None:
            ranks = tuple(len(shape) for node in sizes for shape in node)
            several = tuple(min(size, 2) for size in output.shape)
            general = kinds, ranks, kept_shapes(registry), several, rest
            leaves = [registry.leaves[id(p)] for p in parameters.values()]
            known = Structure(
                self._found.setdefault(general, Found()),
                None if registry.has_python() else registry.has_float16(),
                slots_above(registry, leaves),
            )
            self._known[key] = known
            most = max(2, min(_MOST, _MOST_NODES // len(registry.nodes)))
            _forget(self._found, most)
            _forget(self._known, most)
        else:
            known.trail.is_met_again = True
        return known


def _forget(known: dict[_Key, Any], most: int) -> None:
    """Drops the oldest."""
    while len(known) > most:
        known.pop(next(iter(known)))
