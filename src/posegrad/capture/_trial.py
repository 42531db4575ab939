"""One look at the cotangents: what they are, and whose."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import Node

from posegrad.capture._axis import Axis
from posegrad.capture._compat import dtype_of
from posegrad.capture._edges import Edge, EdgeRegistry, gradient_edges
from posegrad.capture._inference import infer
from posegrad.capture._owners import find_layout, make_probes
from posegrad.capture._sites import Site
from posegrad.capture._vjp import cotangents_at
from posegrad.jacobian import Arrangement, Layout, single

__all__ = ["Subject", "Trial", "attempt", "edges_of"]


@dataclass(frozen=True)
class Subject:
    """What is being differentiated.

    Args:
        output: The predictions, with their graph.
        registry: That graph.
        pose_index: Owners of rows the caller has stated.
        dim: The output's dimension that counts poses, if the caller has said.
        generator: The engine's own source of random numbers.
        inferred: What `axes` has found, by the output's dimension of poses.
    """

    output: Tensor
    registry: EdgeRegistry
    pose_index: Sequence[Tensor]
    dim: int | None
    generator: torch.Generator
    inferred: dict[int | None, dict[Edge, Axis]] = field(default_factory=dict)

    def axes(self, arrangement: Arrangement) -> dict[Edge, Axis]:
        """Where poses lie at the edges for which the graph alone tells."""
        if arrangement.dim not in self.inferred:
            self.inferred[arrangement.dim] = infer(self.registry, arrangement)
        return self.inferred[arrangement.dim]


@dataclass(frozen=True)
class Trial:
    """Cotangents at edges and their layouts.

    Args:
        cotangents: Under ones, by edge; None where nothing flows.
        layouts: By edge; None where poses mix.
    """

    cotangents: dict[Edge, Tensor | None]
    layouts: dict[Edge, Layout | None]

    def serves(self, registry: EdgeRegistry, site: Site) -> bool:
        """Whether every cotangent at a site belongs, row by row, to single poses."""
        return all(self.layouts.get(edge) is not None for edge in edges_of(registry, site))

    def knows(self, registry: EdgeRegistry, site: Site) -> bool:
        """Whether a site was looked at."""
        return all(edge in self.layouts for edge in edges_of(registry, site))

    def joined(self, other: "Trial") -> "Trial":
        """Both trials."""
        return Trial({**self.cotangents, **other.cotangents}, {**self.layouts, **other.layouts})


def edges_of(registry: EdgeRegistry, site: Site) -> list[Edge]:
    """The edges whose cotangents a site needs."""
    node: Node = registry.nodes[site.node]
    return [(node, number) for number in registry.outputs(node)]


def attempt(subject: Subject, arrangement: Arrangement, sites: Sequence[Site]) -> Trial:
    """One backward for the cotangents, and probes for what is not known without.

    Args:
        subject: What is differentiated.
        arrangement: Which numbers of the output are one pose.
        sites: Where to look.
    """
    registry, output = subject.registry, subject.output
    edges = list(dict.fromkeys(edge for site in sites for edge in edges_of(registry, site)))
    count, parts = arrangement.poses, arrangement.components
    mix = torch.ones(parts, dtype=torch.float64)
    if parts > 1:
        mix = torch.rand(parts, dtype=torch.float64, generator=subject.generator) + 0.5

    def cotangent(scales: Tensor) -> Tensor:  # [m] to the output's shape
        flat = arrangement.join((scales.unsqueeze(1) * mix).cpu())
        return flat.reshape(output.shape).to(output.device, output.dtype)

    base = _at(output, edges, cotangent(torch.ones(count, dtype=torch.float64)))
    axes = {} if count == 1 else subject.axes(arrangement)
    layouts = {
        edge: _known_layout(subject, count, value, axes.get(edge)) for edge, value in base.items()
    }
    unknown = [edge for edge, layout in layouts.items() if layout is None]
    if unknown:
        probes = make_probes(count, _narrowest(unknown, output), subject.generator)
        probed = [_at(output, unknown, cotangent(scales)) for scales in probes.scales()]
        for edge in unknown:
            value = base[edge]
            assert value is not None
            under = [
                p if (p := found[edge]) is not None else torch.zeros_like(value) for found in probed
            ]
            layouts[edge] = find_layout(value, under, probes, count)
    return Trial(base, layouts)


def _at(output: Tensor, edges: Sequence[Edge], cotangent: Tensor) -> dict[Edge, Tensor | None]:
    found = cotangents_at(output, gradient_edges(edges), cotangent) if edges else []
    return dict(zip(edges, found, strict=True))


def _known_layout(
    subject: Subject, count: int, cotangent: Tensor | None, axis: Axis | None
) -> Layout | None:
    """The layout that needs no probe: of one pose, of nothing, inferred, or stated."""
    if cotangent is None:
        nobody = torch.full((1,), -1, dtype=torch.long, device=subject.output.device)
        return Layout(count, (), nobody)
    if count == 1:
        return single(cotangent)
    if axis is not None:
        size = cotangent.shape[axis.dim]
        return Layout.regular(count, axis.dim, size, axis.inner, cotangent.device)
    if subject.pose_index and cotangent.ndim:
        # Edges may be as many as atoms, or atoms as poses: where one number fits two kinds of rows,
        # it is probed.
        fitting = [index.cpu() for index in subject.pose_index if len(index) == len(cotangent)]
        if len(cotangent) == count:
            fitting.append(torch.arange(count))
        stated = len(fitting) > (len(cotangent) == count)
        if stated and all(torch.equal(index, fitting[0]) for index in fitting):
            return Layout.along(count, 0, fitting[0].to(cotangent.device))
    return None


def _narrowest(edges: Sequence[Edge], output: Tensor) -> torch.dtype:
    dtypes = {dtype_of(node)[number].to_real() for node, number in edges} | {output.dtype}
    return min(dtypes, key=lambda dtype: (-torch.finfo(dtype).eps, torch.finfo(dtype).max))
