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

    Owners, counted from one, are sent through its backward. If they come back as they were sent,
    none was lost or added to another on the way: there are as many numbers before the operator as
    behind it, and each comes from one place, so a place that gets two leaves another with a zero.
    Numbers may change places within a pose.
    """
    device, dtype = device_of(node), dtype_of(node)[0]
    if out != inside or layout.is_whole or layout.has_dead_rows:
        return None
    if not dtype.is_floating_point or layout.count > 1 / torch.finfo(dtype).eps:
        return None  # the dtype cannot tell every number from the next
    shape = [size if dim == layout.dim else 1 for dim, size in enumerate(out)]
    sent = (layout.to(device).owners + 1).to(dtype).reshape(shape).expand(out).contiguous()
    (back,) = apply_node(node, [sent])
    return layout if back is not None and torch.equal(back, sent) else None
