"""Reading autograd's graph: the only code that touches autograd's internals."""

from posegrad.capture._compat import add_each, leaf_hooks_off
from posegrad.capture._edges import EdgeRegistry
from posegrad.capture._gather import Gatherer
from posegrad.capture._guard import failures_named, grad_set_aside
from posegrad.capture._modules import Roster, check_modules
from posegrad.capture._tracked import check_tracked, graph_clock

__all__ = [
    "EdgeRegistry",
    "Gatherer",
    "Roster",
    "add_each",
    "check_modules",
    "check_tracked",
    "failures_named",
    "grad_set_aside",
    "graph_clock",
    "leaf_hooks_off",
]
