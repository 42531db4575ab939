"""What a closed form is."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Any, ClassVar, NamedTuple, Self, final

import torch
from torch import Tensor

from posegrad._torch import version_of
from posegrad.errors import StaleFactorError
from posegrad.jacobian._layout import Layout
from posegrad.jacobian._products import Products
from posegrad.jacobian._record import record

__all__ = ["ClosedForm", "Factor", "Side"]


@final
@record
class Factor:
    """A tensor that the forward saved, and its version then.

    The user may still change it in place, which would make every gradient computed from it wrong.
    So the version is checked at each use.

    Args:
        tensor: The tensor.
        beside: The name of the parameter that it is multiplied with, for messages.
    """

    tensor: Tensor
    beside: str
    version: int

    @classmethod
    def of(cls, tensor: Tensor, beside: str) -> Self:
        """A factor as it is now."""
        return cls(tensor.detach(), beside, version_of(tensor))

    @property
    def value(self) -> Tensor:
        """The tensor.

        Raises:
            StaleFactorError: if it was changed in place.
        """
        version = version_of(self.tensor)
        if version != self.version:
            raise StaleFactorError(
                f"The input beside {self.beside}, of shape {list(self.tensor.shape)}, was changed "
                f"in place after the forward (version {version}, expected "
                f"{self.version}).\n"
                f"The per-pose gradients are products with the old values, which are gone.\n"
                f"Use the Jacobian before that change, or change a clone."
            )
        return self.tensor

    def like(self, other: Tensor) -> Tensor:
        """`value` in the dtype of another tensor."""
        value = self.value
        return value if value.dtype == other.dtype else value.to(other.dtype)

    def __copy__(self) -> Self:
        return replace(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """Gives the tensor of a deep copy a version of its own."""
        return Factor.of, (self.value, self.beside)

    def to(self, device: torch.device | str) -> "Factor":
        """The factor on another device."""
        return Factor.of(self.value.to(device), self.beside)

    def double(self) -> "Factor":
        """The factor in float64, unless it is an index."""
        value = self.value
        return Factor.of(value.double(), self.beside) if value.is_floating_point() else self


@final
class Side(NamedTuple):
    """A cotangent of a use, and the owners of its rows."""

    cotangent: Tensor
    layout: Layout


@record
class ClosedForm(ABC):
    """How a parameter enters one operator, and what follows for a cotangent.

    A form holds what the forward saved, never the graph. It states one linear map three times: from
    the cotangent of the operator's output to the gradient of the parameter, summed over all rows
    (`vjp`) or by owner (`rows`); and the adjoint, from a change of the parameter to that of the
    output (`jvp`).

    *Laws:* for any cotangent B, direction V and layout the form accepts,
    `rows(B, layout)[i] == vjp(layout.only(B, i))`, and
    `(B * jvp(V, B.shape)).sum() == (vjp(B) * V).sum()`.

    Args:
        shape: The shape of the parameter.
    """

    shape: torch.Size

    has_small_rows: ClassVar[bool] = False
    """Whether the rows of all poses cost no more time and memory than a cotangent."""

    @property
    def positions(self) -> tuple[int, ...]:
        """The dimensions that count positions in every factor and cotangent; () if none do.

        *Law:* `vjp` is a sum over positions: concatenating the factors and cotangents of several
        uses along the first of these dimensions gives the sum of these uses.
        """
        return ()

    def sums(self, cotangent: torch.Size) -> int:
        """How many products are summed in each number of `vjp`."""
        return prod(cotangent[dim] for dim in self.positions)

    def opened(
        self, cotangents: tuple[Tensor, ...], layout: Layout
    ) -> tuple["ClosedForm", tuple[Tensor, ...], Layout]:
        """The same use in a form that counts positions, if there is one."""
        return self, cotangents, layout

    def turned(self, cotangent: Tensor) -> tuple["ClosedForm", Tensor] | None:
        """The same use, with cotangent and factor in exchanged roles."""
        return None

    @property
    def fixed(self) -> tuple[Any, ...]:
        """What uses must agree in to be concatenated."""
        return tuple([value for value in vars(self).values() if not isinstance(value, Factor)])

    def of_positions(self, factors: Sequence[Tensor]) -> Self:
        """The form with other positions, along the first of their dimensions only."""
        tensors = iter(factors)
        return self._with(lambda factor: Factor.of(next(tensors), factor.beside))

    @abstractmethod
    def vjp(self, cotangent: Tensor) -> Tensor:
        """The gradient of the parameter, `[*shape]`: autograd's own formula."""

    @abstractmethod
    def jvp(self, direction: Tensor, shape: torch.Size) -> Tensor:
        """The change of the operator's output as the parameter moves along `[*self.shape]`.

        Args:
            direction: The movement.
            shape: That of the cotangent; the result broadcasts against it.
        """

    @abstractmethod
    def rows(self, cotangent: Tensor, layout: Layout) -> Tensor:
        """The gradient of each pose, `[m, *shape]`; `layout.dims` is not empty."""

    def write_rows(self, cotangent: Tensor, layout: Layout, into: Tensor) -> None:
        """Writes `rows` to a tensor `[m, *shape]`, if possible without another one of that size."""
        into.copy_(self.rows(cotangent, layout))

    def accepts(self, cotangent: torch.Size, layout: Layout) -> bool:
        """Whether `rows` serves this layout; if not, the next rung of the ladder does."""
        return True

    def prefers_pairs(self, cotangent: torch.Size, layout: Layout, components: int) -> bool:
        """Whether `inner` exists and is cheaper than products of `rows`."""
        return False

    def inner(
        self, first: Tensor, second: Tensor, layout: Layout, products: Products
    ) -> Tensor | None:
        """The inner products of the poses' gradients under two cotangents, `[m, m]`.

        *Law:* it equals `rows(first, layout)` times `rows(second, layout)` transposed, without
        forming gradients. None if the rows of a pose cancel, so that sums of products would lose
        digits.
        """
        raise NotImplementedError

    def across(self, own: "Side", other: Self, its: "Side", products: Products) -> Tensor | None:
        """The inner products of the poses' gradients with those of another use, `[m, m']`.

        *Law:* it equals `rows(*own)` times `other.rows(*its)` transposed. None if rows are cheaper,
        or if they cancel, so that sums of products would lose digits.
        """
        return None

    def projected(
        self, cotangents: tuple[Tensor, ...], left: Tensor, right: Tensor
    ) -> tuple["ClosedForm", tuple[Tensor, ...]] | None:
        """The use with its parameter, as a matrix `[p, d]`, projected from both sides.

        *Law:* under any layout the form accepts, the rows of the result are
        `left @ rows @ right.mT`.

        Args:
            cotangents: Those of all components.
            left: `[k, p]`.
            right: `[l, d]`.

        Returns:
            A form of shape `[k, l]` and its cotangents; None if rows have to be projected.
        """
        return None

    def squares(self, cotangent: Tensor, layout: Layout, products: Products) -> Tensor | None:
        """The squared norms of the poses' gradients `[m]`, without these; None if not cheaper.

        *Law:* it is `rows(cotangent, layout).flatten(1).square().sum(1)`.
        """
        return None

    def combine(self, cotangent: Tensor, layout: Layout, weights: Tensor) -> Tensor | None:
        """The sum of the poses' gradients times weights `[m]`; None if there is no shortcut.

        *Law:* it is `vjp(layout.weigh(cotangent, weights))`.
        """
        return None

    def factors(self) -> list[Factor]:
        """The tensors of the forward that this form holds."""
        return [value for value in vars(self).values() if isinstance(value, Factor)]

    def to(self, device: torch.device | str) -> Self:
        """The form on another device."""
        return self._with(lambda factor: factor.to(device))

    def double(self) -> Self:
        """The form in float64."""
        return self._with(Factor.double)

    def _with(self, change: Callable[[Factor], Factor]) -> Self:
        changed: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Factor)
        }
        return replace(self, **changed)
