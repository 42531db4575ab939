"""An output, and what is asked of its graph."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from posegrad._torch import memory_of
from posegrad.graph._beside import Beside
from posegrad.graph._edges import Edge, EdgeRegistry, named
from posegrad.graph._inference import Inferred, Trail, infer
from posegrad.jacobian import Arrangement, Backwards, Layout

__all__ = ["Subject"]


@final
@dataclass(frozen=True)
class Subject:
    """An output, and what is asked of its graph.

    Args:
        output: The predictions, with their graph.
        registry: That graph.
        parameters: Those that the output depends on, by name.
        pose_index: Owners of rows, as the caller has stated them.
        dim: The output's dimension that counts poses, if the caller has said.
        generator: The engine's own source of random numbers.
        trail: What following poses through graphs of this very structure told.
        tensors: Lists the modules' parameters and buffers, which are no data.
        is_hooked: Whether activations are seen to have hooks, which may do today what they did not
            when rows were last compared with autograd.
        quiet: Whether not to warn of slow ways.
        beside: Leaves that are no parameters, if the gradient of the output's sum by them is wanted
            too.
        inferred: Where poses lie, as far as `layouts` was asked or it holds for all graphs of the
            structure, by the output's dimension of poses.
    """

    output: Tensor
    registry: EdgeRegistry
    parameters: Mapping[str, Tensor]
    pose_index: Sequence[Tensor]
    dim: int | None
    generator: torch.Generator
    trail: Trail
    tensors: Callable[[], Iterable[Tensor]]
    is_hooked: bool = False
    quiet: bool = False
    beside: Beside | None = None
    inferred: dict[int | None, Inferred] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        # A copy: what this graph's numbers say must not be taken for any other graph.
        self.inferred.update(self.trail.fixed)

    def layouts(self, arrangement: Arrangement) -> Mapping[Edge, Layout]:
        """Where poses lie at the edges for which operators tell, one after another."""
        if arrangement.dim not in self.inferred:
            found = infer(self.registry, self.trail, arrangement, self.generator)
            self.inferred[arrangement.dim] = found
        return self.inferred[arrangement.dim].layouts

    @cached_property
    def backwards(self) -> Backwards:
        """The backwards that it took so far; a reading by just one does not count it here."""
        return Backwards()

    def own(self) -> frozenset[int]:
        """The memory of the modules' parameters and buffers."""
        return frozenset(map(memory_of, self.tensors())) - {-1}

    def lost_at(self, arrangement: Arrangement, edges: Iterable[Edge]) -> list[str]:
        """The operators through which poses cannot be followed to some edges."""
        found = self.inferred.get(arrangement.dim)
        lost = {} if found is None else found.lost
        return self._names(lost[edge] for edge in edges if edge in lost)

    def blame(self, arrangement: Arrangement, edges: Iterable[Edge]) -> None:
        """Notes the operators to blame for the backwards that it takes to look at some edges."""
        found = self.inferred.get(arrangement.dim)
        if found is None:
            return
        lost = [found.lost[edge] for edge in edges if edge in found.lost]
        if lost or found.alone:
            self.backwards.blame(self._names(lost), self._names(found.alone))

    def _names(self, nodes: Iterable[int]) -> list[str]:
        return [named(self.registry.names[node]) for node in dict.fromkeys(nodes)]

    @property
    def is_fixed(self) -> bool:
        """Whether what is inferred holds for all graphs of this structure, as far as is known."""
        return all(found.is_fixed for found in self.inferred.values())
