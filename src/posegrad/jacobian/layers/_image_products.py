"""Inner products of the gradients of convolution kernels, from products of positions."""

from functools import lru_cache
from math import prod
from typing import NamedTuple, Self, final

import torch
from torch import Tensor

from posegrad.jacobian._products import cancel
from posegrad.jacobian._record import record
from posegrad.jacobian.layers._windows import Windows

__all__ = ["Images", "Way"]

_PANEL = 128  # rows of a panel of products
_AT_ONCE = 2**17  # products taken at once for squared norms: half a MiB

# Costs in multiplications: of adding, multiplying and copying a number, and of a call.
_ADDED, _MULTIPLIED, _COPIED, _CALLED = 5, 32, 32, 2**22


@final
class Way(NamedTuple):
    """How products of positions are taken.

    Args:
        windows: The windows over which products of places are summed.
        gathers: Whether all that a window meets is first copied together, into a place of its own.
        once: Multiplications for each image.
        each: Multiplications for each pair of images.
        held: Numbers of each image that are held.
    """

    windows: Windows
    gathers: bool
    once: int
    each: int
    held: int

    @classmethod
    @lru_cache(maxsize=1024)
    def of(cls, windows: Windows, width: int, height: int) -> "Way":
        """The cheaper way for a kernel `[height, width, ...]`.

        At a stride of one, neighbouring windows share most of their places, so it is cheaper to
        multiply places. At larger strides, it is cheaper to gather what each window meets.
        """
        ways = [cls.by(windows, False, width, height), cls.by(windows, True, width, height)]
        return min(ways, key=lambda way: way.once + way.each)

    @classmethod
    def by(cls, windows: Windows, gathers: bool, width: int, height: int) -> Self:
        """The way that gathers, or the one that does not, with its costs."""
        positions, once = prod(windows.positions), 0
        if gathers:
            width *= prod(windows.kernel)
            once = _COPIED * positions * width
            windows = windows.unfolded()
        places, sums = prod(windows.extent), sum(windows.kernel) - len(windows.kernel)
        each = places**2 * (width + _ADDED * sums) + positions**2 * (height + _MULTIPLIED)
        return cls(windows, gathers, once, each, places * width + positions * height)

    @property
    def places(self) -> int:
        """How many places of an image there are."""
        return prod(self.windows.extent)

    def of_norms(self, count: int, images: int) -> tuple[int, int]:
        """Squared norms of poses with so many images each: multiplications, and numbers held."""
        squares = (images * self.places) ** 2
        work = _CALLED + count * images * (self.once + images * self.each)
        products = min(count, max(1, _AT_ONCE // squares)) * squares
        return work, count * images * self.held + 3 * products

    def of_gramian(self, images: int, components: int) -> tuple[int, int]:
        """The same for products of all images, with so many components of the output."""
        rows, panel = images * self.places, max(_PANEL, self.places)
        pairs = images * (images + 1) // 2 if components == 1 else images**2 * components**2
        calls = components**2 * (1 + rows // panel)
        work = images * self.once + pairs * self.each + calls * _CALLED
        return work, images * self.held + 3 * min(rows, panel) * rows

    def of_crossed(self, left: int, right: int) -> tuple[int, int]:
        """The same for products of two sets of so many images."""
        rows, others, panel = left * self.places, right * self.places, max(_PANEL, self.places)
        calls = 1 + rows // panel
        work = (left + right) * self.once + left * right * self.each + calls * _CALLED
        return work, (left + right) * self.held + 3 * min(rows, panel) * others


@final
@record
class Images:
    """What products of N images need.

    Args:
        windows: Where the kernel lies.
        places: The places that it meets, `[N, S, F]`: S of them, with F numbers each.
        cotangents: The cotangents of its positions, `[N, P, O]`.
    """

    windows: Windows
    places: Tensor
    cotangents: Tensor

    @classmethod
    def of(cls, way: Way, windows: Windows, images: Tensor, cotangents: Tensor) -> Self:
        """Made of images `[N, C, ...]` and cotangents `[N, O, ...]`."""
        places = windows.places(images)
        if way.gathers:
            places = windows.gathered(places)
        return cls(way.windows, places.flatten(1, -2), cotangents.flatten(2).mT)

    def double(self) -> Self:
        """The same in float64."""
        return type(self)(self.windows, self.places.double(), self.cotangents.double())

    def squares(self, images: int) -> Tensor | None:
        """The squared norms of poses that have so many images each, one after another.

        Returns:
            `[m]`; None if products cancel and are in float64 already.
        """
        places, cotangents = (
            tensor.reshape(len(tensor) // images, -1, tensor.shape[-1])
            for tensor in (self.places, self.cotangents)
        )
        squares, sizes = self._squares(places, cotangents, images)
        unsure = cancel(sizes, squares)
        if not bool(unsure.any()):
            return squares
        if squares.dtype == torch.float64:
            return None
        exact, _ = self._squares(places[unsure].double(), cotangents[unsure].double(), images)
        return squares.index_put_((unsure,), exact.clamp(min=0).to(squares.dtype))

    def gramian(self, other: "Images") -> tuple[Tensor, Tensor | None]:
        """The inner products of all images with others, `[N, N]`.

        Returns:
            The products; and, if the others are the same images, the sum of the magnitudes of the
            terms in each squared norm.
        """
        alike, count = other is self, len(self.places)
        gram = self.cotangents.new_zeros(count, count)
        sizes = gram.new_empty(count) if alike else None
        left = self._in_order()  # once, not for every panel
        right = left if alike else other._in_order()
        step = max(1, _PANEL // self.places.shape[1])
        for start in range(0, count, step):
            end = min(start + step, count)
            upto = end if alike else count
            pairs = left._cut(start, end)._pairs(right._cut(0, upto))  # [k, P, n, P]
            gram[start:end, :upto] = pairs.sum((1, 3))
            if sizes is not None:
                own = pairs.diagonal(start, dim1=0, dim2=2)  # [P, P, k]
                sizes[start:end] = own.abs().sum((0, 1))
        return (gram.tril() + gram.tril(-1).mT if alike else gram), sizes

    def crossed(self, other: "Images") -> tuple[Tensor, Tensor]:
        """As `gramian`, `[N, N']`; and the sum of the magnitudes of the terms in each product."""
        gram = self.cotangents.new_zeros(len(self.places), len(other.places))
        sizes = torch.empty_like(gram)
        left, right = self._in_order(), other._in_order()
        step = max(1, _PANEL // self.places.shape[1])
        for start in range(0, len(gram), step):
            pairs = left._cut(start, start + step)._pairs(right)  # [k, P, N', P]
            gram[start : start + step] = pairs.sum((1, 3))
            sizes[start : start + step] = pairs.abs_().sum((1, 3))
        return gram, sizes

    def _in_order(self) -> Self:
        return type(self)(self.windows, self.places, self.cotangents.contiguous())

    def _cut(self, start: int, end: int) -> Self:
        cut = self.places[start:end], self.cotangents[start:end]
        return type(self)(self.windows, *cut)

    def _pairs(self, other: "Images") -> Tensor:
        """The products of all positions with those of others, `[N, P, N', P]`."""
        left, right = len(self.places), len(other.places)
        products = _all_rows(self.places) @ _all_rows(other.places).mT
        found = self.windows.summed(products.unsqueeze(0), left, right).squeeze(0)
        of_cotangents = _all_rows(self.cotangents) @ _all_rows(other.cotangents).mT
        positions = prod(self.windows.positions)
        pairs = found * of_cotangents.view(found.shape)
        return pairs.view(left, positions, right, positions)

    def _squares(self, places: Tensor, cotangents: Tensor, images: int) -> tuple[Tensor, Tensor]:
        """The squared norms of poses, and the sums of the magnitudes of their terms."""
        found = []
        step = max(1, _AT_ONCE // places.shape[1] ** 2)
        for a, b in zip(torch.split(places, step), torch.split(cotangents, step), strict=True):
            products = self.windows.summed(a @ a.mT, images, images)
            pairs = (products * (b @ b.mT).view(products.shape)).flatten(1)
            found.append((pairs.sum(1), pairs.abs().sum(1)))
        squares, sizes = zip(*found, strict=True)
        return torch.cat(squares), torch.cat(sizes)


def _all_rows(tensor: Tensor) -> Tensor:
    return tensor.flatten(0, 1)
