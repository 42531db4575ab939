"""Running sums of gradients."""

from collections.abc import Mapping, Sequence
from typing import Self, final

from torch import Tensor

from posegrad._torch import add_each
from posegrad.jacobian import wide

__all__ = ["GradientSum"]


@final
class GradientSum:
    """Sums of gradients by number of input; inputs without gradient are absent.

    A first gradient is not copied: autograd may hand out one tensor for two inputs, or a view that
    must not be written. So only sums made here are changed in place. Half precisions are summed in
    float32.
    """

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self._owned: set[int] = set()

    def add(self, gradients: Mapping[int, Tensor] | Self, factor: float = 1.0) -> None:
        """Adds `factor` times the gradients."""
        items = gradients._sums if isinstance(gradients, GradientSum) else gradients
        totals: list[Tensor] = []
        terms: list[Tensor] = []
        for number, term in items.items():
            gradient = wide(term)
            if number in self._owned and not (gradient.is_sparse or self._sums[number].is_sparse):
                totals.append(self._sums[number])
                terms.append(gradient)
            else:
                self._add_one(number, gradient, factor)
        if totals:
            add_each(totals, terms, factor)

    def scale(self, factor: float) -> None:
        """Multiplies the sums; a factor of zero drops them, whatever they hold."""
        if factor == 0:
            self._sums.clear()
            self._owned.clear()
        elif factor != 1:
            for number, total in self._sums.items():
                self._sums[number] = total.mul_(factor) if number in self._owned else total * factor
            self._owned.update(self._sums)

    def get(self, number: int) -> Tensor | None:
        """The sum of one input, or None if it has no gradient."""
        return self._sums.get(number)

    def delivered(self, inputs: Sequence[Tensor]) -> list[Tensor | None]:
        """The sums in the order and dtypes of the inputs; None for those without gradient."""
        return [
            None if (total := self.get(i)) is None else total.to(tensor.dtype)
            for i, tensor in enumerate(inputs)
        ]

    def _add_one(self, number: int, gradient: Tensor, factor: float) -> None:
        total = self._sums.get(number)
        if total is not None and total.is_sparse != gradient.is_sparse:
            total, gradient = (t.to_dense() if t.is_sparse else t for t in (total, gradient))
            self._owned.discard(number)
        if total is not None and number in self._owned:
            total.add_(gradient, alpha=factor)
            return
        if total is None and factor == 1:
            self._sums[number] = gradient
            return
        self._sums[number] = (
            gradient * factor if total is None else total.add(gradient, alpha=factor)
        )
        self._owned.add(number)
