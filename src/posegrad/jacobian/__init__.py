"""The Jacobian of a group of poses, held in the cheapest form that is exact."""

from posegrad.jacobian._arrangement import Arrangement
from posegrad.jacobian._backwards import ONE, TOGETHER, Backwards, Purpose
from posegrad.jacobian._batches import step_of_batches
from posegrad.jacobian._block import Block
from posegrad.jacobian._deliver import Gradient, owned
from posegrad.jacobian._exchange import agreed
from posegrad.jacobian._form import ClosedForm, Factor
from posegrad.jacobian._layout import NOBODY, WHOLE, Layout, single
from posegrad.jacobian._parts import Factors, Part, Rows, Weights
from posegrad.jacobian._precision import is_cast, wide
from posegrad.jacobian._pull import Pull
from posegrad.jacobian._unweighted import Unweighted
from posegrad.jacobian.base import Jacobian, Transposed
from posegrad.jacobian.local import PoseJacobian
from posegrad.jacobian.shared import SharedJacobian, check_whole, of_all

__all__ = [
    "NOBODY",
    "ONE",
    "TOGETHER",
    "WHOLE",
    "Arrangement",
    "Backwards",
    "Block",
    "ClosedForm",
    "Factor",
    "Factors",
    "Gradient",
    "Jacobian",
    "Layout",
    "Part",
    "PoseJacobian",
    "Pull",
    "Purpose",
    "Rows",
    "SharedJacobian",
    "Transposed",
    "Unweighted",
    "Weights",
    "agreed",
    "check_whole",
    "is_cast",
    "of_all",
    "owned",
    "single",
    "step_of_batches",
    "wide",
]
