"""Finds the owners of rows by probing a network, or one operator alone."""

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from posegrad._torch import device_of, dtype_of, shape_of
from posegrad.graph._alone import apply_node
from posegrad.graph._edges import EdgeRegistry
from posegrad.graph._probes import faint_poses, find_layout, is_scaled, make_probes
from posegrad.graph._vjp import as_source
from posegrad.jacobian import Layout

__all__ = ["narrowest", "probed", "probed_alone"]

Place = TypeVar("Place")

Answer = Callable[[Tensor], Mapping[Place, Tensor | None]]
"""From a number for each pose, `[m]`, to the cotangents by place."""


def probed(
    answer: Answer[Place],
    base: Mapping[Place, Tensor],
    count: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> dict[Place, Layout | None]:
    """Whose the rows of some cotangents are; None where poses mix.

    Args:
        answer: What the cotangents become if the poses' own are multiplied by numbers.
        base: The cotangents as they are.
        count: m.
        dtype: The narrowest dtype that they pass.
        generator: The engine's own.
    """
    probes = make_probes(count, dtype, generator)
    found = [answer(scales) for scales in probes.scales()]
    layouts: dict[Place, Layout | None] = {
        place: find_layout(value, [_at(place, one, value) for one in found], probes, count)
        for place, value in base.items()
    }
    # A faint pose may hide in the rounding of others: what it reaches alone must be its own.
    served = {place: layout for place, layout in layouts.items() if layout is not None}
    pairs = [(base[place], layout) for place, layout in served.items()]
    for poses in faint_poses(pairs, count) if pairs else ():
        alone = answer(poses.double())
        for place, layout in served.items():
            if not is_scaled(_at(place, alone, base[place]), base[place], layout, poses):
                layouts[place] = None
    return layouts


def disproved(
    answer: Answer[Place],
    layouts: Mapping[Place, Layout],
    count: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> list[Place]:
    """The places whose owners, found under other cotangents, are wrong under these.

    A row that is nothing but rounding may seem one pose's under one cotangent, another's under the
    next. The arguments are those of `probed`.
    """
    base = answer(torch.ones(count, device="cpu"))
    wrong: set[Place] = set()
    probes = make_probes(count, dtype, generator)
    for scales in [one for one, n in zip(probes.scales(), probes.sets, strict=True) if n == 0]:
        found = answer(scales)
        for place, layout in layouts.items():
            like = found[place] if base[place] is None else base[place]
            if like is None:
                continue
            other, one = _at(place, found, like), _at(place, base, like)
            if not is_scaled(other, one, layout, scales):
                wrong.add(place)
    return list(wrong)


def probed_alone(
    registry: EdgeRegistry, node: int, given: Mapping[int, Layout], generator: torch.Generator
) -> dict[int, Layout | None]:
    """Where the poses of an operator's arguments lie, found by its own vjp.

    It costs a few backwards of this one operator. Its cotangents are drawn at random, so that what
    is found holds for all cotangents; but it holds for this graph only, as an operator that is not
    known may look at the numbers that it saved.

    Args:
        registry: The graph.
        node: The number of the operator.
        given: Where the poses of its outputs lie, by the number of the output.
        generator: The engine's own.
    """
    operator = registry.nodes[node]
    device, shapes, dtypes = device_of(operator), shape_of(operator), dtype_of(operator)
    count = next(iter(given.values())).count
    drawn = {i: _drawn(shapes[i], dtypes[i], device, generator) for i in given}
    layouts = {i: layout.to(device) for i, layout in given.items()}

    def answer(scales: Tensor) -> dict[int, Tensor | None]:
        cotangents: list[Tensor | None] = [None] * len(shapes)
        for i, layout in layouts.items():
            cotangents[i] = layout.weigh(drawn[i], scales)
        found = apply_node(operator, cotangents)
        sources = enumerate(registry.sources[node])
        return {
            i: as_source(operator, i, found[i])
            for i, edge in sources
            if edge is not None and found[i] is not None
        }

    base = {i: b for i, b in answer(torch.ones(count, device="cpu")).items() if b is not None}
    dtype = narrowest([*(dtypes[i] for i in given), *(b.dtype for b in base.values())])
    found = probed(answer, base, count, dtype, generator)
    return {i: None if layout is None else _along_one(layout) for i, layout in found.items()}


def narrowest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype with the fewest digits; of those, the one with the smallest range."""
    real = [dtype.to_real() for dtype in dtypes]
    return min(real, key=lambda dtype: (-torch.finfo(dtype).eps, torch.finfo(dtype).max))


def _at(place: Place, found: Mapping[Place, Tensor | None], like: Tensor) -> Tensor:
    value = found.get(place)
    return torch.zeros_like(like) if value is None else value


def _drawn(
    shape: torch.Size, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Tensor:
    """Numbers of both signs, none of them small."""
    sizes = torch.rand(shape, dtype=torch.float64, device="cpu", generator=generator) + 0.5
    signs = torch.randint(2, shape, device="cpu", generator=generator) * 2 - 1
    return (sizes * signs).to(device, dtype)


def _along_one(layout: Layout) -> Layout | None:
    """A layout, by its pattern if it has one; None unless owners change along one dimension."""
    if len(layout.dims) != 1:
        return None
    (dim,), size, count, owners = layout.dims, layout.size, layout.count, layout.owners
    if layout.stride is not None:
        return Layout.regular(count, dim, size, layout.stride, owners.device)
    inner = int((owners != owners[:1]).int().argmax()) or size if size else 1  # of the first pose
    if size % (inner * count) == 0:
        regular = Layout.regular(count, dim, size, inner, owners.device)
        if torch.equal(regular.owners, owners):
            return regular
    return layout
