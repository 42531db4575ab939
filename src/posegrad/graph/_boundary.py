"""What is refused before anything is read."""

from collections.abc import Sequence

from torch import Tensor

from posegrad.errors import NoPosesError, NotDifferentiableError, ShapeMismatchError

__all__ = ["check_dimension", "check_index", "check_output", "unrelated_message"]


def check_output(output: Tensor) -> None:
    """Refuses what is not a tensor, an empty tensor and a complex one."""
    if not isinstance(output, Tensor):
        raise TypeError(
            f"The output is a {type(output).__name__}, but a Jacobian has the rows of one tensor. "
            f"Pass the predictions or losses themselves."
        )
    if output.numel() == 0:
        raise NoPosesError(
            f"The output has shape {list(output.shape)}: there is no prediction to differentiate.\n"
            f"Leave empty batches out of the loop."
        )
    if output.is_complex():
        raise NotDifferentiableError(
            f"The output is {output.dtype} {list(output.shape)}: the gradient of a complex number "
            f"is no row of a real Jacobian.\n"
            f"Take its .real, its .abs(), or both parts by torch.view_as_real(output)."
        )


def check_index(pose_index: Sequence[Tensor]) -> None:
    """Refuses an index that is not one number for each row."""
    for index in pose_index:
        if index.ndim != 1 or index.is_floating_point():
            raise ShapeMismatchError(
                f"A pose_index is {index.dtype} {list(index.shape)}, but it must hold integers, "
                f"[R]: for each row of a kind, the number of its pose.\n"
                f"Pass batch.batch, or a list of such tensors."
            )


def check_dimension(output: Tensor, dim: int | None) -> None:
    """Refuses a dimension that the output does not have."""
    if dim is not None and dim >= output.ndim:
        raise ShapeMismatchError(
            f"The engine has batch_dim={dim}, but the output has shape {list(output.shape)}.\n"
            f"Leave batch_dim out: the engine finds out by itself."
        )


def unrelated_message(output: Tensor, count: int) -> str:
    """Why an output has no Jacobian by the engine's parameters."""
    if not output.requires_grad:
        return (
            f"The output ({output.dtype}, {list(output.shape)}) carries no graph.\n"
            f"Compute it without no_grad() and detach(), from parameters that require grad."
        )
    return (
        f"The output depends on none of the {count} trainable parameters of this engine: it was "
        f"computed by another model (a copy?), or every parameter it uses is frozen.\n"
        f"Make the engine from the model that computed it: Engine(model)."
    )
