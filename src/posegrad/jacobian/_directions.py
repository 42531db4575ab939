"""Directions in parameter space, as users state them."""

from collections.abc import Mapping
from typing import NamedTuple, Self, final

import torch
from torch import Tensor

from posegrad.errors import ShapeMismatchError, listed

__all__ = ["Directions"]


@final
class Directions(NamedTuple):
    """Several directions in which all parameters move.

    Args:
        by_name: `[k, *shape]` by parameter.
        columns: The number of directions, k.
        is_one: Whether the user stated a single one, without a dimension for k.
    """

    by_name: dict[str, Tensor]
    columns: int
    is_one: bool

    @classmethod
    def of(cls, stated: object, shapes: Mapping[str, torch.Size]) -> Self:
        """The directions in a tensor `[n]` or `[n, k]`, or in a dict of tensors by parameter.

        Raises:
            TypeError: if it is neither, if it is complex, or if the dict holds other than tensors.
            ShapeMismatchError: if it does not fit the parameters.
            KeyError: if it names an unknown parameter.
        """
        if isinstance(stated, Mapping):
            return cls(_of_mapping(stated, shapes), 1, True)
        if isinstance(stated, Tensor):
            by_name = _of_tensor(stated, shapes)
            return cls(by_name, stated.shape[1] if stated.ndim == 2 else 1, stated.ndim == 1)
        raise TypeError(
            f"J @ v takes a tensor [n] or [n, k], a dict of tensors by parameter, or K.T of "
            f"another Jacobian, but v is a {type(stated).__name__}."
        )


def _of_tensor(stated: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    widths = [shape.numel() for shape in shapes.values()]
    if stated.ndim not in (1, 2) or len(stated) != sum(widths):
        raise ShapeMismatchError(
            f"v has shape {list(stated.shape)}, but J has {sum(widths)} columns: v must be "
            f"[{sum(widths)}] or [{sum(widths)}, k].\n"
            f"The columns are the parameters of J.shapes, one after another, also those that are "
            f"not used; a dict of tensors by parameter will do as well."
        )
    _check_real(stated)
    columns = stated.detach().mT if stated.ndim == 2 else stated.detach().unsqueeze(0)  # [k, n]
    pieces = torch.split(columns, widths, dim=1) if widths else ()
    return {
        name: piece.reshape(len(columns), *shape)
        for (name, shape), piece in zip(shapes.items(), pieces, strict=True)
    }


def _of_mapping(
    stated: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    unknown = [repr(name) for name in stated if name not in shapes]
    if unknown:
        raise KeyError(
            f"v names {listed(unknown)}, but J has the parameters {listed(list(shapes))}."
        )
    other = [f"{n} a {type(v).__name__}" for n, v in stated.items() if not isinstance(v, Tensor)]
    if other:
        raise TypeError(
            f"A direction holds a tensor for each parameter that moves, but v holds for "
            f"{listed(other)}.\n"
            f"Pass tensors of the parameters' shapes, such as torch.full_like(parameter, 3.0)."
        )
    wrong = [
        f"{name} {list(value.shape)} for {list(shapes[name])}"
        for name, value in stated.items()
        if value.shape != shapes[name]
    ]
    if wrong:
        raise ShapeMismatchError(
            f"A direction has the shapes of the parameters, but v holds {listed(wrong)}.\n"
            f"Parameters that are left out stay where they are; for several directions pass a "
            f"tensor [n, k]."
        )
    for value in stated.values():
        _check_real(value)
    return {name: value.detach().unsqueeze(0) for name, value in stated.items()}


def _check_real(value: Tensor) -> None:
    if value.is_complex():
        raise TypeError(
            f"v is {value.dtype}, but J is real.\nMultiply J with v.real and v.imag, one after the "
            f"other."
        )
