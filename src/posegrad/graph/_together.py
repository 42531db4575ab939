"""Small networks: whether reading all rows in one batched backward is faster than use by use.

A network of a millisecond spends most of its time in calls from Python, and reading one use takes a
dozen of them, however small the use is. A backward of all rows, batched by vmap, is a single call.
In return it computes every number of the graph once for each row.
"""

from itertools import chain
from math import prod

import torch

from posegrad.graph._operators import kind_of
from posegrad.graph._recipe import uses_of
from posegrad.graph._subject import Subject

__all__ = ["pays_together"]

_OPERATOR = 2**13  # the price of one batched operator, in numbers that are computed in that time

_USE = 2**16  # the price of reading one use, likewise


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
