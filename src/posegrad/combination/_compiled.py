"""Rules that went through `torch.compile`."""

import copy
from typing import Any

from torch import nn

from posegrad._torch import calls_by, inside_compiled

__all__ = ["uncovered"]


def uncovered(rule: Any) -> Any:
    """A module that `torch.compile` wrapped, as one of its own class; anything else as it is.

    The wrapper hides what a rule is: whether it looks at gradients, whether it streams. The copy
    runs the compiled forward, and its parameters and buffers are the module's own.
    """
    inner = inside_compiled(rule) if isinstance(rule, nn.Module) else None
    if inner is None:
        return rule
    own = copy.copy(inner)
    calls_by(own, rule.__call__)
    return own
