"""Where poses lie before `as_strided`, as its own backward tells.

Numbers are read from memory by strides. Where they lay in the argument depends on its strides, and
no graph tells those. Pooling an image to one pixel leaves such an operator in the graph, one that
leaves all numbers where they were.
"""

import torch
from torch.autograd.graph import Node

from posegrad._torch import device_of, dtype_of
from posegrad.graph._alone import apply_node
from posegrad.graph._indexed import Memo
from posegrad.jacobian import Layout

__all__ = ["restrided"]


def restrided(
    node: Node, arg: int, layout: Layout, out: torch.Size, inside: torch.Size, memo: Memo
) -> Layout | None:
    """`out = x.as_strided(size, stride)`, if no number changes its pose.

    Powers of the owners are sent through its backward: o^0, o^1 and o^2. A place of memory that j
    numbers behind the operator read and k before it share hands each of the k the sum of the j,
    over k. If all come back as they were sent, then j = k, and the j have the owner of each of the
    k for their mean and its square for their mean square: so they are all that owner's. Numbers may
    change places within a pose.
    """
    device = device_of(node)
    if out != inside or layout.is_whole or layout.has_dead_rows:
        return None
    if not dtype_of(node)[0].is_floating_point or layout.count**2 * out.numel() >= 2**53:
        return None  # float64, which the operator takes whatever its dtype, would round the sums
    shape = [size if dim == layout.dim else 1 for dim, size in enumerate(out)]
    owners = layout.to(device).owners.double().reshape(shape).expand(out)
    for power in range(3):
        sent = owners.pow(power)
        (back,) = apply_node(node, [sent])
        if back is None or not torch.equal(back, sent):
            return None
    return layout
