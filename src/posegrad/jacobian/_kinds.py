r"""A parameter used in two ways, such as an embedding table tied to the output layer's weight.

Its rows are sums over two kinds of use, so their inner products have four terms:

.. math::
    \langle E_i + L_i, E_j + L_j \rangle = \langle E_i, E_j \rangle + \langle L_i, L_j \rangle
        + \langle E_i, L_j \rangle + \langle L_i, E_j \rangle .

The first two are those of each kind by itself. Let :math:`e_s` be the cotangent of what was looked
up in row :math:`v_s` of the table, and :math:`b_r a_r^\top` the products of the weight. Then the
others are

.. math::
    \langle E_i, L_j \rangle = \sum_{s \in S_i} \sum_{r \in R_j} b_r[v_s] \, (a_r \cdot e_s) ,

and no row is formed. If the sum is far smaller than its terms, it is taken in float64.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import permutations
from typing import Self, final

import torch
from torch import Tensor

from posegrad.jacobian._layout import Layout
from posegrad.jacobian._parts import Factors
from posegrad.jacobian._precision import wide
from posegrad.jacobian.layers import Embedding, Linear

__all__ = ["Kinds"]

Single = Callable[[Factors], Tensor | None]
"""From one part to a product of its rows; None if that is cheaper with rows."""


@final
class Kinds:
    """Rows that are sums of a lookup in a table and of products with the same weight.

    Args:
        table: The part read at the lookup.
        weight: The part read at the product.
    """

    def __init__(self, table: Factors, weight: Factors) -> None:
        self._parts = table, weight

    @classmethod
    def of(cls, parts: Sequence[Factors]) -> Self | None:
        """The parts of a block as such a sum; None if they are anything else."""
        for table, weight in permutations(parts) if len(parts) == 2 else ():
            met = isinstance(table.form, Embedding) and isinstance(weight.form, Linear)
            alone = all(p.layout.dims and p.arrangement.dim is None for p in parts)
            plain = alone and table.pull is None and weight.pull is None
            if met and plain and weight.form.positions:
                return cls(table, weight)
        return None

    def pairs(self, single: Single) -> Tensor | None:
        """The Gramian `[m, m]` without rows; `single` gives that of each part."""
        total = self._own(single)
        if total is None:
            return None
        size = total.diagonal().clone()
        indices, entries, layout = self._looked_up()
        for pose, (a, b) in enumerate(self._products()):
            terms = (a @ entries.mT) * b[:, indices]  # [T, S]
            crossed = layout.sum(terms.sum(0))  # [m]
            size[pose] += 2 * terms[:, layout.owners == pose].abs().sum()
            total[pose] += crossed
            total[:, pose] += crossed
        return self._sure(total, total.diagonal(), size, lambda kinds: kinds.pairs(single))

    def squares(self, single: Single) -> Tensor | None:
        """The squared norms `[m]` without rows; `single` gives those of each part."""
        total = self._own(single)
        if total is None:
            return None
        size = total.clone()
        indices, entries, layout = self._looked_up()
        own = zip(layout.segments(indices), layout.segments(entries), self._products(), strict=True)
        for pose, (rows, e, (a, b)) in enumerate(own):
            terms = (a @ e.mT) * b[:, rows]
            total[pose] += 2 * terms.sum()
            size[pose] += 2 * terms.abs().sum()
        return self._sure(total, total, size, lambda kinds: kinds.squares(single))

    def _own(self, single: Single) -> Tensor | None:
        """The sum of what each part gives by itself."""
        found = [single(part) for part in self._parts]
        return None if found[0] is None or found[1] is None else found[0] + found[1]

    def _sure(
        self, found: Tensor, squares: Tensor, size: Tensor, again: Callable[[Self], Tensor | None]
    ) -> Tensor | None:
        """The result, recomputed in float64 if a row is far smaller than its terms."""
        if not bool((size * torch.finfo(size.dtype).eps ** 0.25 > squares).any()):
            return found
        if found.dtype == torch.float64:
            return None
        table, weight = (part.double() for part in self._parts)
        exact = again(type(self)(table, weight))
        return None if exact is None else exact.to(found.dtype)

    def _looked_up(self) -> tuple[Tensor, Tensor, Layout]:
        """The looked-up rows of the table `[S]`, their cotangents `[S, d]`, and their owners."""
        part, (cotangent,) = self._parts[0], self._parts[0].cotangents
        form = part.form
        assert isinstance(form, Embedding)
        indices, owners = form.looked_up(part.layout)
        entries = wide(part.layout.front(cotangent)).reshape(len(indices), -1)
        if form.padding is not None:
            entries = entries.masked_fill((indices == form.padding).unsqueeze(1), 0)
        return indices % form.shape[0], entries, Layout.along(part.layout.count, 0, owners)

    def _products(self) -> Iterator[tuple[Tensor, Tensor]]:
        """For each pose, the factors `[T, d]` and `[T, V]` of the weight's gradient."""
        part, (cotangent,) = self._parts[1], self._parts[1].cotangents
        form = part.form
        assert isinstance(form, Linear)
        b = wide(cotangent)
        sides = (part.layout.segments(side) for side in (form.input.like(b), b))
        for a, b in zip(*sides, strict=True):
            narrow, tall = a.flatten(0, -2), b.flatten(0, -2)
            narrow, tall = (tall, narrow) if form.flipped else (narrow, tall)
            yield narrow if form.scale == 1 else narrow * form.scale, tall
