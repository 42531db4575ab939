"""Reading autograd's graph: the only code that touches autograd's internals."""

from posegrad.graph._beside import Beside, leaves_beside
from posegrad.graph._edges import EdgeRegistry
from posegrad.graph._footprint import footprint, storages
from posegrad.graph._gatherer import Gatherer
from posegrad.graph._guard import alone, failures_named, grad_set_aside
from posegrad.graph._listening import Listening
from posegrad.graph._mixing import keep_apart, mixing_modules
from posegrad.graph._outlook import Outlook
from posegrad.graph._release import KeptGraph
from posegrad.graph._sinks import Sinks
from posegrad.graph._tracked import check_tracked, graph_clock, is_slice_of_leaf, leaf_of_slice

__all__ = [
    "Beside",
    "EdgeRegistry",
    "Gatherer",
    "KeptGraph",
    "Listening",
    "Outlook",
    "Sinks",
    "alone",
    "check_tracked",
    "failures_named",
    "footprint",
    "grad_set_aside",
    "graph_clock",
    "is_slice_of_leaf",
    "keep_apart",
    "leaf_of_slice",
    "leaves_beside",
    "mixing_modules",
    "storages",
]
