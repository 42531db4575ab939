"""One look at the cotangents: what they are, and whose."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor

from posegrad.graph._edges import Edge
from posegrad.graph._probing import disproved, narrowest, probed
from posegrad.graph._sites import Site
from posegrad.graph._subject import Subject
from posegrad.graph._vjp import cotangents_at
from posegrad.jacobian import Arrangement, Layout, Purpose, single

__all__ = ["Trial", "attempt", "known_layout"]


@final
@dataclass(frozen=True)
class Trial:
    """Cotangents at edges and their layouts.

    Args:
        cotangents: By edge, if every pose has cotangent one; None where nothing flows.
        layouts: By edge; None where poses mix.
    """

    cotangents: dict[Edge, Tensor | None]
    layouts: dict[Edge, Layout | None]

    def serves(self, site: Site) -> bool:
        """Whether every cotangent at a site belongs, row by row, to single poses."""
        return all(self.layouts.get(edge) is not None for edge in site.edges)

    def knows(self, site: Site) -> bool:
        """Whether a site was looked at."""
        return all(edge in self.layouts for edge in site.edges)

    def is_lost_in_nan(self) -> bool:
        """Whether rows have no owners that can be found, because they are nan or infinite."""
        unclear = [b for edge, b in self.cotangents.items() if self.layouts[edge] is None]
        return any(b is not None and not bool(b.isfinite().all()) for b in unclear)

    def joined(self, other: "Trial") -> "Trial":
        """Both trials."""
        return Trial({**self.cotangents, **other.cotangents}, {**self.layouts, **other.layouts})


def attempt(subject: Subject, arrangement: Arrangement, sites: Sequence[Site]) -> Trial:
    """One backward for the cotangents, and probes for owners that are not known without them.

    Args:
        subject: What is differentiated.
        arrangement: Which numbers of the output are one pose.
        sites: Where to look.
    """
    output = subject.output
    edges = list(dict.fromkeys(edge for site in sites for edge in site.edges))
    count, parts = arrangement.poses, arrangement.components
    mix = torch.ones(parts, dtype=torch.float64, device="cpu")  # cotangents of a pose's components
    if parts > 1:
        mix = 0.5 + torch.rand(
            parts, dtype=torch.float64, device="cpu", generator=subject.generator
        )

    def answer(
        edges: Sequence[Edge], own: Tensor, scales: Tensor, purpose: Purpose = Purpose.PROBES
    ) -> dict[Edge, Tensor | None]:
        """The cotangents under numbers for components and for poses, `[K]` and `[m]`."""
        each = arrangement.join(scales.double().unsqueeze(1) * own).reshape(output.shape)
        return _at(subject, edges, each.to(output), purpose)

    base = answer(edges, mix, torch.ones(count, device="cpu"), Purpose.ACTIVATIONS)
    shared: list[Layout] = []
    layouts = {
        edge: known_layout(subject, arrangement, edge, b, shared) for edge, b in base.items()
    }
    unknown = [edge for edge, layout in layouts.items() if layout is None]
    if unknown:
        values = {edge: b for edge in unknown if (b := base[edge]) is not None}
        passed = [dtype for node, _ in unknown for dtype in subject.registry.dtypes_passed[node]]
        narrow = narrowest([output.dtype, *passed])
        generator = subject.generator
        layouts |= probed(partial(answer, unknown, mix), values, count, narrow, generator)
        for own in torch.eye(parts, dtype=torch.float64, device="cpu") if parts > 1 else ():
            served = {edge: layout for edge in unknown if (layout := layouts[edge]) is not None}
            ask = partial(answer, [*served], own)
            layouts |= dict.fromkeys(disproved(ask, served, count, narrow, generator))
    return Trial(base, layouts)


def _at(
    subject: Subject, edges: Sequence[Edge], cotangent: Tensor, purpose: Purpose
) -> dict[Edge, Tensor | None]:
    if not edges:
        return {}
    subject.backwards.add(purpose)
    cotangent = cotangent.clone()  # a hook may write to it
    found = cotangents_at(subject.output, subject.registry.at(edges), cotangent)
    return dict(zip(edges, found, strict=True))


def known_layout(
    subject: Subject,
    arrangement: Arrangement,
    edge: Edge,
    cotangent: Tensor | None,
    shared: list[Layout],
) -> Layout | None:
    """The layout if it needs no probe: of one pose, where nothing flows, inferred, or stated."""
    count = arrangement.poses
    if cotangent is None:
        nobody = torch.full((1,), -1, dtype=torch.long, device=subject.output.device)
        return Layout(count, (), nobody)
    if count == 1:
        return single(cotangent)
    inferred = subject.layouts(arrangement).get(edge)
    if inferred is not None:
        layout = inferred.to(cotangent.device)
        if inferred.pattern is not None:
            return layout
        layout = _shared(layout, shared)
        return None if layout.has_strays(cotangent) else layout
    if subject.pose_index and cotangent.ndim:
        return _stated(subject.pose_index, arrangement, cotangent)
    return None


def _shared(layout: Layout, known: list[Layout]) -> Layout:
    """A known layout that is equal, for what it has worked out; else this one, now known too."""
    for other in known:
        if layout.dims == other.dims and (
            layout.stated is other.stated or torch.equal(layout.owners, other.owners)
        ):
            return other
    known.append(layout)
    return layout


def _stated(
    pose_index: Sequence[Tensor], arrangement: Arrangement, cotangent: Tensor
) -> Layout | None:
    """The layout the caller's owners give, None if none of them fits, or several do.

    There may be as many edges as atoms, or as many atoms as poses: where one number fits two kinds
    of rows, the cotangent is probed. So it is where the owners may count several dimensions of the
    output.
    """
    count = arrangement.poses
    fitting = [
        index.cpu()
        for index in pose_index
        if len(index) == len(cotangent) and _counts(index, arrangement)
    ]
    if not fitting:
        return None
    if len(cotangent) == count:
        fitting.append(torch.arange(count, device="cpu"))
    if any(not torch.equal(index, fitting[0]) for index in fitting):
        return None
    return Layout.along(count, 0, fitting[0].to(cotangent.device, copy=True))


def _counts(index: Tensor, arrangement: Arrangement) -> bool:
    """Whether owners number the poses of an arrangement, and could number no others."""
    if not len(index):
        return True
    lowest, highest = int(index.min()), int(index.max())
    able = [dim for dim, size in enumerate(arrangement.shape) if size > highest]
    alone = len(able) == 1 and arrangement.shape[able[0]] == arrangement.poses
    return lowest >= 0 and alone and arrangement.dim in (None, able[0])
