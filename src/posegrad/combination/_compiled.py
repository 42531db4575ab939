"""Rules that went through `torch.compile`."""

import copy
from typing import Any

from torch import nn

__all__ = ["uncovered"]


def uncovered(rule: Any) -> Any:
    """A module that `torch.compile` wrapped, as one of its own class; anything else as it is.

    The wrapper hides what a rule is: whether it looks at gradients, whether it streams. The copy
    runs the compiled forward, and its parameters and buffers are the module's own.
    """
    inner = getattr(rule, "_orig_mod", None) if isinstance(rule, nn.Module) else None
    if not isinstance(inner, nn.Module):
        return rule
    own = copy.copy(inner)
    own._compiled_call_impl = rule.__call__  # what Module.compile() sets
    return own
