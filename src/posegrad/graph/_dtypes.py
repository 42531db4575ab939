"""The dtypes in which gradients pass a node."""

import torch
from torch import Tensor
from torch.autograd.graph import Node

from posegrad._torch import (
    is_python,
    outputs_of,
    slot_names,
    slots_of,
    tells_slots,
    tree_leaves,
)

__all__ = ["carries_float16", "dtypes_passed"]


def dtypes_passed(node: Node) -> set[torch.dtype]:
    """The dtypes in which a gradient passes a node.

    One node can stand for many operators: a compiled graph, a custom function. The tensors that
    such a node saved tell in which dtypes it computes. They are looked at as they were packed:
    unpacking them would make a checkpoint run again. Where this torch does not tell them, float16
    is assumed.
    """
    dtypes = {*outputs_of(node)[1]}
    if is_python(node):
        dtypes |= set() if tells_slots() else {torch.float16}
        packed = [slot.data for name in slot_names(node) for slot in slots_of(node, name)]
        found = [leaf for data in packed for leaf in tree_leaves(data)]
        dtypes.update(leaf.dtype for leaf in found if isinstance(leaf, Tensor))
    return dtypes


def carries_float16(node: Node) -> bool:
    """Whether a gradient passes a node as float16."""
    return torch.float16 in dtypes_passed(node)
