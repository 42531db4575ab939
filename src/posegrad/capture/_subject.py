"""What is asked of a graph."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from posegrad.capture._axis import Axis
from posegrad.capture._edges import Edge, EdgeRegistry
from posegrad.capture._inference import Inferred, infer
from posegrad.jacobian import Arrangement

__all__ = ["Subject"]


@dataclass(frozen=True)
class Subject:
    """An output, and what is asked of its graph.

    Args:
        output: The predictions, with their graph.
        registry: That graph.
        parameters: Those that the output depends on, by name.
        pose_index: Owners of rows the caller has stated.
        dim: The output's dimension that counts poses, if the caller has said.
        generator: The engine's own source of random numbers.
        inferred: What `axes` found in graphs of this very structure, by the dimension of poses.
        own: The memory of the modules' parameters and buffers, which are no data.
        is_hooked: Whether activations are seen to have hooks, which may do today what they did not
            when rows were last compared with autograd.
        quiet: Whether not to warn of slow ways.
    """

    output: Tensor
    registry: EdgeRegistry
    parameters: Mapping[str, Tensor]
    pose_index: Sequence[Tensor]
    dim: int | None
    generator: torch.Generator
    inferred: dict[int | None, Inferred]
    own: Callable[[], frozenset[int]]
    is_hooked: bool = False
    quiet: bool = False

    def axes(self, arrangement: Arrangement) -> Mapping[Edge, Axis]:
        """Where poses lie at the edges for which operators tell, one after another."""
        if arrangement.dim not in self.inferred:
            found = infer(self.registry, arrangement, self.generator)
            self.inferred[arrangement.dim] = found
        return self.inferred[arrangement.dim].axes

    @property
    def is_fixed(self) -> bool:
        """Whether that holds for all graphs of this structure."""
        return all(found.is_fixed for found in self.inferred.values())
