"""Pictures of a group of poses: its weights, its Gramian, what moves the step, what is held.

Each function draws into the Axes it is given, or into those of a new figure, and returns them. No
backend is chosen, no setting changed and no window opened: a new figure is not one of pyplot's.
`ax.figure.savefig(path)` writes it, and in a notebook the last line `ax.figure` shows it.

Not imported by `import posegrad`: it needs matplotlib, `pip install 'posegrad[plot]'`.
"""

from posegrad.errors import MissingExtraError

try:
    import matplotlib as _  # noqa: F401  so that what is missing is named here, with its pip line
except ImportError as error:
    raise MissingExtraError(
        "posegrad.plot needs matplotlib, which is not installed.\nRun: pip install 'posegrad[plot]'"
    ) from error

from posegrad.plot._contributions import contributions
from posegrad.plot._gramian import gramian
from posegrad.plot._memory import memory
from posegrad.plot._weights import weights

__all__ = ["contributions", "gramian", "memory", "weights"]
