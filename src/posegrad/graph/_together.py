"""Small networks, whose rows take less time all together than use by use.

In a network of a millisecond, calls from Python take most of the time, and each use takes a dozen,
however small it is. One backward of all rows together, by torch's rules for batches, takes none of
them. But it computes each number of the graph for every row.
"""

from itertools import chain
from math import prod

import torch

from posegrad.graph._operators import kind_of
from posegrad.graph._recipe import uses_of
from posegrad.graph._subject import Subject

__all__ = ["pays_together"]

_OPERATOR = 2**13  # numbers that take as long as handing an operator a batch

_USE = 2**17  # numbers that take as long as reading one use


def pays_together(subject: Subject) -> bool:
    """Whether all rows together take less time than use by use.

    Operators that take no batch run once for every row.
    """
    registry = subject.registry
    if registry.is_nested:
        return False
    if not {torch.float32, torch.float64}.issuperset(chain.from_iterable(registry.dtypes)):
        return False
    numbers = sum(prod(shape) for shape in chain.from_iterable(registry.sizes))
    uses = sum(len([*uses_of(subject, name)]) for name in subject.parameters)
    alone = sum(kind_of(name).is_unbatched for name in registry.names)
    rows = subject.output.numel()
    return rows * (numbers + _USE * alone) + _OPERATOR * len(registry.nodes) <= _USE * uses
