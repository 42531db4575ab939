"""Reading autograd's graph: the only code that touches autograd's internals."""

from posegrad.capture._compat import leaf_hooks_off, no_autocast
from posegrad.capture._tracked import check_tracked, graph_clock

__all__ = ["check_tracked", "graph_clock", "leaf_hooks_off", "no_autocast"]
