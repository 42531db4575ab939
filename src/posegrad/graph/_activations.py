"""The Jacobian by tensors that the forward computed: activations, inputs that require grad.

Where poses stay apart, the cotangent at such a tensor is all that is needed: each of its rows is
the gradient of one pose. Where they mix, as the losses of several tasks do in the layers they
share, each number of the output takes a backward of its own, down to the tensors and no further.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from posegrad.errors import NotDifferentiableError, UnsupportedModuleError
from posegrad.graph._edges import Edge, EdgeRegistry
from posegrad.graph._reading import Parts
from posegrad.graph._recipe import first_look
from posegrad.graph._sites import Site
from posegrad.graph._subject import Subject
from posegrad.graph._trial import Trial
from posegrad.graph._vjp import cotangents_at, rows_of_graph
from posegrad.jacobian import Arrangement, Block, Factors, Part, Purpose, Rows, Weights, wide
from posegrad.jacobian.layers import Activation

__all__ = ["edges_of", "parts_at"]

_TOLERANCE = 64  # how far sums of rows may be from autograd's, in square roots of its rounding


def edges_of(registry: EdgeRegistry, activations: Mapping[str, Tensor]) -> dict[str, Edge]:
    """The edge of each tensor in a graph.

    Raises:
        NotDifferentiableError: if one is not in it.
        UnsupportedModuleError: if one is complex.
    """
    found: dict[str, Edge] = {}
    places = {node: number for number, node in enumerate(registry.nodes)}
    for name, tensor in activations.items():
        if tensor.is_complex():
            raise UnsupportedModuleError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}: a Jacobian of real rows has no "
                f"entry for it.\nTake torch.view_as_real(...) of it, compute the output from that, "
                f"and pass that."
            )
        leaf, node = registry.leaves.get(id(tensor)), tensor.grad_fn
        place = leaf if node is None else places.get(node)
        if place is None:
            raise NotDifferentiableError(
                f"The output does not depend on {name}, of shape {list(tensor.shape)}: it was "
                f"computed from another tensor.\n"
                f"Pass the very tensor that the output was computed from, not a copy or a slice."
            )
        found[name] = place, tensor.output_nr if node is not None else 0
    return found


def parts_at(
    subject: Subject, activations: Mapping[str, Tensor], most: int, *, checked: bool
) -> Parts:
    """The rows of the Jacobian by some tensors of a graph; the graph is kept.

    Args:
        subject: What is differentiated.
        activations: The tensors, by name.
        most: The bytes that rows may take at once.
        checked: Whether the rows are compared with a plain backward.
    """
    edges = edges_of(subject.registry, activations)
    sites = [_site(name, edge) for name, edge in edges.items()]
    arrangement, trial = first_look(subject, sites)
    cotangents = _cotangents(subject, arrangement, trial, list(edges.values()))
    parts: Parts = {}
    for name, edge in edges.items():
        layout, own = trial.layouts[edge], cotangents[edge]
        if own is None:
            parts[name] = []
        elif layout is not None:
            form = Activation(activations[name].shape)
            parts[name] = [Factors("its cotangent", 0, form, layout, arrangement, own)]
    wrong = _disagreeing(subject, activations, edges, parts) if checked else []
    for name, edge in edges.items():
        if name in wrong or name not in parts:
            parts[name] = _by_rows(subject, edge, most)
    return parts


def _site(name: str, edge: Edge) -> Site:
    """A tensor of the graph as a site: its own cotangent is what is read."""
    return Site(
        name, edge, direct=True, light=True, node=edge[0], argument=0, transposed=False,
        closed=True, edges=(edge,),
    )  # fmt: skip


def _cotangents(
    subject: Subject, arrangement: Arrangement, trial: Trial, edges: Sequence[Edge]
) -> dict[Edge, tuple[Tensor, ...] | None]:
    """The cotangents at the edges, one for each component of the output; None if nothing flows."""
    if arrangement.components == 1:
        return {e: None if (b := trial.cotangents[e]) is None else (b,) for e in edges}
    found: dict[Edge, list[Tensor | None]] = {edge: [] for edge in edges}
    units = torch.eye(arrangement.components, dtype=torch.float64)
    for unit in units:
        each = arrangement.join(torch.ones(arrangement.poses, 1, dtype=torch.float64) * unit)
        each = each.reshape(subject.output.shape).to(subject.output)
        subject.backwards.add(Purpose.ACTIVATIONS)
        places = subject.registry.at(edges)
        for edge, b in zip(edges, cotangents_at(subject.output, places, each), strict=True):
            found[edge].append(b)
    told = {edge: next((b for b in own if b is not None), None) for edge, own in found.items()}
    return {
        edge: None
        if (like := told[edge]) is None
        else tuple([torch.zeros_like(like) if b is None else b for b in own])
        for edge, own in found.items()
    }


def _by_rows(subject: Subject, edge: Edge, most: int) -> list[Part]:
    """A backward for every number of the output."""
    output, registry = subject.output, subject.registry

    def units(start: int, stop: int) -> list[Tensor]:
        cotangents = output.new_zeros(stop - start, output.numel())
        cotangents[range(stop - start), range(start, stop)] = 1
        return [cotangents.reshape(-1, *output.shape)]

    subject.backwards.add(Purpose.ROWS, output.numel())
    numbers = max(1, registry.shape(edge).numel())
    at_once = max(1, most // (8 * numbers))
    (rows,) = rows_of_graph([output], units, registry.at([edge]), output.numel(), at_once)
    return [] if rows is None else [Rows("rows of the whole graph: poses mix", 0, rows)]


def _disagreeing(
    subject: Subject, activations: Mapping[str, Tensor], edges: Mapping[str, Edge], parts: Parts
) -> list[str]:
    """The tensors whose rows do not add up to what one plain backward gives."""
    output = subject.output
    weights = torch.randn(
        output.shape, generator=subject.generator, dtype=torch.float64, device="cpu"
    ).to(output.device, output.dtype)
    subject.backwards.add(Purpose.CHECK)
    places = subject.registry.at(edges.values())
    found = cotangents_at(output, places, weights.clone())  # a hook may write to it
    wrong = []
    for (name, tensor), expected in zip(activations.items(), found, strict=True):
        if name not in parts:
            continue
        block = Block.of(tensor, output.numel(), parts[name])
        sum_of_rows = wide(block.combine(Weights(wide(weights).reshape(-1)))).double()
        plain = torch.zeros_like(sum_of_rows) if expected is None else wide(expected).double()
        passed = subject.registry.dtypes_passed[edges[name][0]]
        eps = max(torch.finfo(dtype).eps for dtype in {*passed, output.dtype, tensor.dtype})
        error = (sum_of_rows - plain).norm()
        if bool(plain.isfinite().all()) and not error <= _TOLERANCE * eps**0.5 * plain.norm():
            wrong.append(name)
    return wrong
