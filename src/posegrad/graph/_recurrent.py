r"""A layer of an LSTM that one operator computes, opened up to the products inside it.

oneDNN's operator runs all steps of a layer at once, and its own backward gives gradients summed
over poses. But all it does with weights are products,

.. math:: G_t = X_t W^\top + H_{t-1} U^\top + b + c, \qquad (i, f, g, o) = G_t

so with the cotangents of the gates :math:`G` in hand, W, U and the biases have the closed forms of
any linear layer, with the steps as rows of a pose. The states H are its output, so all gates follow
from one product; the cells C and the cotangents take a walk along the steps, there and back.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, final

import torch
from torch import Tensor

from posegrad.graph._layouts import Facts
from posegrad.graph._read import Entry, Operator
from posegrad.jacobian import ClosedForm, Factor, Layout, wide
from posegrad.jacobian.layers import Elementwise, Linear

__all__ = ["GATES", "Opening", "gate_bias", "input_weight", "recurrent", "state_weight"]


@final
class Opening(NamedTuple):
    """How an operator is opened up to a product inside it.

    Args:
        cotangents: From the operator and the cotangents of its outputs to that of the product.
        layout: From the layouts of the outputs' cotangents, by number, to that of the product's.
    """

    cotangents: Callable[[Operator, Sequence[Tensor | None]], Tensor]
    layout: Callable[[Mapping[int, Layout | None]], Layout | None]


def recurrent(
    facts: Facts, arg: int, layout: Layout, out: torch.Size, inside: torch.Size
) -> Layout | None:
    """From an input `[T, B, d]` and states `[B, H]` to outputs of the same kinds."""
    batch = len(out) - 2  # the output's dimension of poses
    if arg in _WEIGHTS or layout.dim != batch or inside[len(inside) - 2] != out[batch]:
        return None
    return layout.moved(len(inside) - 2)


_WEIGHTS = range(1, 5)

_STATES = 0  # the output that has the states of all steps; the others are the last one and its cell


def input_weight(op: Operator, entry: Entry) -> ClosedForm | None:
    """Weight W."""
    return _weight(entry, op.saved("input")) if _is_known(op) else None


def state_weight(op: Operator, entry: Entry) -> ClosedForm | None:
    """Weight U."""
    return _weight(entry, _before(op)) if _is_known(op) else None


def gate_bias(op: Operator, entry: Entry) -> ClosedForm | None:
    """Biases b and c."""
    if not _is_known(op):
        return None
    return Elementwise(entry.shape, torch.Size([1, 1, *entry.shape]), 1.0)


def gates_layout(layouts: Mapping[int, Layout | None]) -> Layout | None:
    """Whose the rows of the gates' cotangents `[T, B, 4 H]` are; None if poses mix in them.

    The cotangents of all later states reach a gate, so these must be one pose's: poses lie along B,
    and in the same way in all outputs.

    Args:
        layouts: Of the cotangents of the outputs, by number; None where poses mix.
    """
    found: Layout | None = None
    for output, layout in layouts.items():
        along = (1,) if output == _STATES else (0,)
        if layout is None or layout.dims not in ((), along):
            return None
        if found is not None and not torch.equal(found.owners, layout.owners):
            return None
        found = layout
    return replace(found, dims=(1,)) if found is not None and found.dims else found


def gates(op: Operator, cotangents: Sequence[Tensor | None]) -> Tensor:
    """The cotangents of the gates, `[T, B, 4 H]`, by those of the outputs.

    Args:
        op: The operator.
        cotangents: Of all states `[T, B, H]`, of the last one and of its cell `[B, H]`; None where
            nothing flows.
    """
    names = ("input", "weight0", "weight1", "cx_")
    x, w, u, last = (_of(op, name) for name in names)
    each = x.flatten(0, 1) @ w.mT
    if op.saved("has_biases"):
        each += _of(op, "weight2") + _of(op, "weight3")
    each = each.addmm_(wide(_before(op)).flatten(0, 1), u.mT).reshape(*x.shape[:2], -1)
    i, f, g, o = each.chunk(4, 2)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    steps = list(_steps(op, len(x)))
    cells = torch.empty_like(i)
    earlier = torch.empty_like(i)  # the cell that each step started with
    for t in steps:
        earlier[t] = last
        last = torch.addcmul(i[t] * g[t], f[t], last, out=cells[t])
    bent = cells.tanh()
    # What a unit of a cell's cotangent, and of a state's, gives to each gate
    by_cell = torch.stack([g * i * (1 - i), earlier * f * (1 - f), i * (1 - g * g)], 2)
    by_state = bent * o * (1 - o)
    to_cell = o * (1 - bent * bent)
    outputs, state, back = (None if one is None else wide(one) for one in cotangents)
    found = torch.empty_like(each)
    split = found.view(*i.shape[:2], 4, -1)
    state = torch.zeros_like(last) if state is None else state
    back = torch.zeros_like(last) if back is None else back
    for t in reversed(steps):
        if outputs is not None:
            state = state + outputs[t]
        back = torch.addcmul(back, state, to_cell[t])
        torch.mul(back.unsqueeze(1), by_cell[t], out=split[t][:, :3])
        torch.mul(state, by_state[t], out=split[t][:, 3])
        back = back * f[t]
        state = found[t] @ u
    return found


GATES = Opening(gates, gates_layout)


def _weight(entry: Entry, inputs: Tensor) -> ClosedForm:
    return Linear(entry.shape, Factor.of(inputs, entry.name), entry.transposed, False, 1.0)


def _is_known(op: Operator) -> bool:
    """Whether it is an LSTM, and all that is needed has been saved; reads it in one go."""
    names = ("input", "weight0", "weight1", "weight2", "weight3", "hx_", "cx_", "result0")
    tensors = all(isinstance(op.saved(name), Tensor) for name in names)
    told = all(op.saved(name) is not None for name in ("mode", "reverse", "has_biases"))
    return tensors and told and op.saved("mode") == _LSTM and not op.saved("batch_sizes")


_LSTM = 2  # torch's number for it


def _before(op: Operator) -> Tensor:
    """The state that each step started with, `[T, B, H]`."""
    states, first = op.saved("result0").detach(), op.saved("hx_").detach().unsqueeze(0)
    if op.saved("reverse"):
        return torch.cat([states[1:], first])
    return torch.cat([first, states[:-1]])


def _of(op: Operator, name: str) -> Tensor:
    """What the operator saved under a name, in float32 at least."""
    tensor: Tensor = op.saved(name)
    return wide(tensor.detach())


def _steps(op: Operator, count: int) -> Iterator[int]:
    """The steps in the order in which they are made."""
    return reversed(range(count)) if op.saved("reverse") else iter(range(count))
