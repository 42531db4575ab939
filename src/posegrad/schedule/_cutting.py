"""Cuts poses off the graphs that their tensors come from."""

from collections.abc import Sequence

from torch import Tensor

from posegrad.errors import UntrackedTensorError
from posegrad.graph import is_slice_of_leaf
from posegrad.schedule._inputs import Inputs
from posegrad.schedule._poses import Pose, map_tensors

__all__ = ["cut"]


def cut(poses: Sequence[Pose], inputs: Inputs, leaves: dict[int, Tensor]) -> list[Pose]:
    """Poses with detached leaves for their tensors that require grad.

    The pose is scored on detached copies of these tensors (coordinates, the output of an encoder
    upstream). A copy's gradient is delivered to the original, whose own graph runs once,
    afterwards.

    Args:
        poses: The poses.
        inputs: What gradients flow to. A tensor joins when its pose is met, until inputs are
            closed.
        leaves: The leaves by the number of the tensor they stand for; new ones are added. A tensor
            shared by several poses has one leaf.

    Raises:
        UntrackedTensorError: if ranks share the poses and such a tensor is no leaf: the parameters
            of an encoder upstream would get the gradient of this rank alone.
    """

    def leaf_of(tensor: Tensor) -> Tensor:
        if not tensor.requires_grad or id(tensor) in inputs.parameters:
            return tensor
        if inputs.ranks is not None and not (tensor.is_leaf or is_slice_of_leaf(tensor)):
            raise UntrackedTensorError(_upstream_message(tensor))
        number = inputs.number_of(tensor)
        if number is None:
            return tensor.detach()
        if number not in leaves:
            leaves[number] = tensor.detach().requires_grad_()
        # The model may write in place to what is no leaf to the user.
        return leaves[number] if tensor.is_leaf else leaves[number].clone()

    return [map_tensors(leaf_of, pose) for pose in poses]


def _upstream_message(tensor: Tensor) -> str:
    return (
        f"A pose holds a tensor of shape {list(tensor.shape)} that was computed with a graph, and "
        f"the poses of its group are spread over ranks.\n"
        f"What computed it would get the gradient of this rank's poses alone, in silence.\n"
        f"Make that module one of the engine's, Engine(encoder, model, predict=...), or detach the "
        f"tensor."
    )
