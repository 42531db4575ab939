"""mtenn's multi-pose models: its combination objects with any rule, and its GroupedModel anew.

Two steps, each useful alone. mtenn itself is imported by neither.

- `MeanCombination`, `MaxCombination`, `BoltzmannCombination` and `RuleCombination` are called as
  mtenn's are: an existing GroupedModel takes them.
- `grouped` gives a model GroupedModel's forward with an `Engine` inside.
"""

from posegrad.interop.mtenn._combination import (
    BoltzmannCombination,
    MaxCombination,
    MeanCombination,
    RuleCombination,
    join_grad_dict,
    split_grad_dict,
)
from posegrad.interop.mtenn._grouped import Grouped, grouped

__all__ = [
    "BoltzmannCombination",
    "Grouped",
    "MaxCombination",
    "MeanCombination",
    "RuleCombination",
    "grouped",
    "join_grad_dict",
    "split_grad_dict",
]
