"""Convolutions, transposed ones included."""

from collections.abc import Sequence
from math import prod
from typing import Any, Self, final

import torch
from torch import Tensor

from posegrad.jacobian._form import ClosedForm, Factor, Side
from posegrad.jacobian._layout import Layout
from posegrad.jacobian._precision import wide
from posegrad.jacobian._products import Products, cancel, summed_pairs
from posegrad.jacobian._record import record
from posegrad.jacobian.layers._image_products import Images, Way
from posegrad.jacobian.layers._windows import Windows
from posegrad.jacobian.layers.linear import Linear

__all__ = ["Convolution"]

_AS_LONG_AS = 32  # so many multiplications take as long as to write and read a number of a gradient


@final
@record
class Convolution(ClosedForm):
    r"""The kernel of a convolution of any kind over `[N, C, ...]`.

    With :math:`u_p` what the kernel meets at position p of an image and :math:`b_p` the cotangent
    there,

    .. math::
        \frac{\partial \hat y_i}{\partial W} = \sum_{p} b_p u_p^\top, \qquad
        \langle g_i, g_j \rangle = \sum_{p, q} (u_p \cdot u_q)(b_p \cdot b_q)

    with p over the positions of pose i and q over those of pose j. The second needs no gradient,
    and is the cheaper where kernels are large and positions few. A transposed convolution is the
    same with images and cotangents exchanged.

    The gradients of all images come from one convolution in which every image is a group of
    channels: `[1, N C, ...]`. On a CPU, it takes 1.1 to 1.4 times as long as the one call of a
    plain backward. Where positions are few, gradients are products of matrices instead.

    Args:
        input: The images.
        options: stride, padding, dilation, transposed, output padding and groups, as torch's
            operator takes them.
    """

    input: Factor
    options: tuple[Any, ...]

    def accepts(self, cotangent: torch.Size, layout: Layout) -> bool:
        return layout.dims == (0,)

    @property
    def positions(self) -> tuple[int, ...]:
        return (0,)

    def sums(self, cotangent: torch.Size) -> int:
        return cotangent[0] * prod(self.windows(cotangent).positions)

    def windows(self, cotangent: torch.Size) -> Windows:
        """Where the kernel lies."""
        under = self.input.tensor.shape if self._is_transposed else cotangent
        return _windows(self.shape[2:], under[2:], *self.options[:3])

    def vjp(self, cotangent: Tensor) -> Tensor:
        return self._summed(self.input.value, cotangent)

    def jvp(self, direction: Tensor, shape: torch.Size) -> Tensor:
        change: Tensor = torch.convolution(
            self.input.like(direction), direction, None, *self.options
        )
        return change

    def rows(self, cotangent: Tensor, layout: Layout) -> Tensor:
        images = self.input.value
        if layout.is_regular():
            pairs = zip(
                layout.by_pose(images).unbind(1), layout.by_pose(cotangent).unbind(1), strict=True
            )  # T of [m, C, ...]
            if layout.size <= layout.count**2:  # T <= m
                first, *others = [self._apart(*pair) for pair in pairs]
                for other in others:
                    first += other
                return first
        gradients = cotangent.new_empty(layout.count, *self.shape)
        segments = layout.segments(images), layout.segments(cotangent)  # [T, C, ...] each
        for row, own, b in zip(gradients, *segments, strict=True):
            row.copy_(self._summed(own, b))  # while it is in the cache
        return gradients

    def write_rows(self, cotangent: Tensor, layout: Layout, into: Tensor) -> None:
        fits = layout.is_one_each and into.dtype == cotangent.dtype
        if fits and self._is_product(cotangent.shape):
            images = self.input.like(cotangent)
            left, right = self._matrices(images, cotangent)
            torch.bmm(left, right, out=into.view(len(into), self.shape[0], -1))
        else:
            super().write_rows(cotangent, layout, into)

    def prefers_pairs(self, cotangent: torch.Size, layout: Layout, components: int) -> bool:
        if self._groups > 1:
            return False
        numbers, size = components * layout.count, self.shape.numel()
        rows = self._cost_of_rows(cotangent, numbers, components) + numbers**2 * size
        work, held = self._way(cotangent).of_gramian(layout.size, components)
        return work <= rows and held <= numbers * size

    def inner(
        self, first: Tensor, second: Tensor, layout: Layout, products: Products
    ) -> Tensor | None:
        alike, left = first is second, self._images(first)
        right = left if alike else self._images(second)
        pairs, sizes = left.gramian(right)
        if sizes is not None and bool(cancel(sizes, pairs.diagonal()).any()):
            if pairs.dtype == torch.float64:
                return None
            exact = left.double()
            pairs = exact.gramian(exact)[0].to(pairs.dtype)

        def in_double() -> Tensor:
            return left.double().gramian(right.double())[0]

        return summed_pairs(pairs, layout, alike=alike, in_double=in_double)

    def across(self, own: Side, other: Self, its: Side, products: Products) -> Tensor | None:
        sides = (self, own), (other, its)
        if max(form._groups for form, _ in sides) > 1:
            return None
        if not all(side.layout.is_one_each for _, side in sides):
            return None
        way, its_way = (form._way(side.cotangent.shape) for form, side in sides)
        images = own.layout.count, its.layout.count
        if way != its_way or not self._pays_across(way, images, sides):
            return None
        left, right = (form._images(side.cotangent) for form, side in sides)
        pairs, sizes = left.crossed(right)
        squares = [form.squares(*side, products) for form, side in sides]
        if squares[0] is None or squares[1] is None:
            return None
        if not bool(cancel(sizes, torch.outer(squares[0].sqrt(), squares[1].sqrt())).any()):
            return pairs
        if pairs.dtype == torch.float64:
            return None
        return left.double().crossed(right.double())[0].to(pairs.dtype)

    def projected(
        self, cotangents: tuple[Tensor, ...], left: Tensor, right: Tensor
    ) -> tuple[ClosedForm, tuple[Tensor, ...]] | None:
        """As the weight of a linear layer on what windows meet; a convolution projects that."""
        if self._groups > 1 or self._is_transposed:
            return None
        kernels = right.reshape(len(right), *self.shape[1:])
        seen = torch.convolution(self.input.like(right), kernels, None, *self.options)
        shape = torch.Size([len(left), len(right)])
        input = Factor.of(seen.movedim(1, -1), self.input.beside)
        under = tuple([b.movedim(1, -1).to(left.dtype) @ left.mT for b in cotangents])
        return Linear(shape, input, flipped=False, on_left=False, scale=1.0), under

    def _pays_across(
        self, way: Way, images: tuple[int, int], sides: Sequence[tuple[Self, Side]]
    ) -> bool:
        """Whether products of positions are cheaper than those of rows, and hold less."""
        size = self.shape.numel()
        pairs = zip(sides, images, strict=True)
        rows = sum(form._cost_of_rows(side.cotangent.shape, n, 1) for (form, side), n in pairs)
        work, held = way.of_crossed(*images)
        return work <= rows + images[0] * images[1] * size and held <= sum(images) * size

    def squares(self, cotangent: Tensor, layout: Layout, products: Products) -> Tensor | None:
        if self._groups > 1 or not layout.is_regular():
            return None
        each, numbers = layout.size // layout.count, layout.count * self.shape.numel()
        work, held = self._way(cotangent.shape).of_norms(layout.count, each)
        if work > self._cost_of_rows(cotangent.shape, layout.count, 1) or held > numbers:
            return None
        return self._images(cotangent, layout).squares(each)

    def _cost_of_rows(self, cotangent: torch.Size, numbers: int, components: int) -> int:
        """The multiplications that rows take.

        Rows that are not far larger than their factors are kept. That saves the weighted sum, which
        takes as long as forming them, so forming them counts as free.
        """
        size, images = self.shape.numel(), self.input.tensor.numel()
        kept = numbers * size <= 2 * (images + components * cotangent.numel())
        work = components * cotangent[0] * prod(self.windows(cotangent).positions) * size
        return _AS_LONG_AS * numbers * size + (0 if kept else work)

    def _way(self, cotangent: torch.Size) -> Way:
        height, width = self.shape[:2]
        return Way.of(self.windows(cotangent), width, height)

    def _images(self, cotangent: Tensor, layout: Layout | None = None) -> Images:
        """What products need; with a layout, the images of each pose come one after another."""
        b = wide(cotangent)
        images = self.input.like(b)
        if layout is not None:
            images, b = (layout.by_pose(tensor).flatten(0, 1) for tensor in (images, b))
        windows, way = self.windows(cotangent.shape), self._way(cotangent.shape)
        return Images.of(way, windows, *self._sides(images, b))

    def _sides(self, images: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """What the kernel moves over, and what has one place for each of its positions."""
        return (cotangent, images) if self._is_transposed else (images, cotangent)

    def _matrices(self, images: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of each image's gradient, `[N, O, P]` and `[N, P, C K]`."""
        seen, under = self._sides(images, cotangent)
        return under.flatten(2), self.windows(cotangent.shape).patches(seen).mT

    @property
    def _is_transposed(self) -> bool:
        return bool(self.options[3])

    @property
    def _groups(self) -> int:
        groups: int = self.options[-1]
        return groups

    def _summed(self, images: Tensor, cotangent: Tensor) -> Tensor:
        """The gradient of all images together, `[*shape]`."""
        if len(images) == 0:
            return cotangent.new_zeros(self.shape)
        return self._of(images, cotangent, 1)

    def _apart(self, images: Tensor, cotangent: Tensor) -> Tensor:
        """The gradient of each image, `[N, *shape]`."""
        if self._is_product(cotangent.shape):
            left, right = self._matrices(images.to(cotangent.dtype), cotangent)
            return (left @ right).reshape(len(images), *self.shape)
        if self._is_slow_at_once(cotangent.shape):
            pairs = zip(torch.split(images, 1), torch.split(cotangent, 1), strict=True)
            return torch.stack([self._of(_last(own), _last(b), 1) for own, b in pairs])
        one = images.flatten(0, 1).unsqueeze(0), cotangent.flatten(0, 1).unsqueeze(0)
        return self._of(*one, len(images)).reshape(len(images), *self.shape)

    def _is_product(self, cotangent: torch.Size) -> bool:
        """Whether rows are computed as products of matrices.

        That is for kernels of size one, and where positions are so few that what windows meet takes
        at most half the memory of the rows.
        """
        windows = self.windows(cotangent)
        few = prod(windows.kernel) == 1 or 2 * prod(windows.positions) <= self.shape[0]
        return self._groups == 1 and few

    def _is_slow_at_once(self, cotangent: torch.Size) -> bool:
        """Whether it is faster to take images one by one, with channels last.

        For large kernels of single channels, a CPU's library has no other fast way: this one is 2
        to 3 times as fast as taking all images as groups.
        """
        on_cpu = self.input.tensor.device.type == "cpu"
        single = self._groups > 1 and self.shape[:2] == (self._groups, 1)
        large = len(self.shape) == 4 and prod(self.shape[2:]) >= 25
        return on_cpu and single and large and prod(cotangent[2:]) >= 128

    def _of(self, images: Tensor, cotangent: Tensor, copies: int) -> Tensor:
        shape = copies * self.shape[0], *self.shape[1:]
        shape_only = cotangent.new_zeros(()).expand(shape)
        *options, groups = self.options
        images = images.to(cotangent.dtype)
        if images.shape[2:].numel() == 1:  # else torch may take it for channels last, and fail
            images, cotangent = _in_order(images), _in_order(cotangent)
        gradient: Tensor
        _, gradient, _ = torch.ops.aten.convolution_backward(
            cotangent, images, shape_only, None, *options, copies * groups, [False, True, False]
        )
        return gradient


def _windows(
    kernel: torch.Size,
    positions: torch.Size,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Windows:
    """Where a kernel lies; options may be one number for all dimensions."""
    each = [own * (len(kernel) // len(own)) for own in (stride, dilation, padding)]
    return Windows(tuple(positions), tuple(kernel), *each)


def _last(tensor: Tensor) -> Tensor:
    """The images with their channels last in memory."""
    return tensor.contiguous(memory_format=torch.channels_last)


def _in_order(tensor: Tensor) -> Tensor:
    """The tensor with the strides of its shape, also along dimensions of size one."""
    return tensor.reshape(-1).view(tensor.shape)
