"""What a kernel sees of an image at each of its positions."""

from math import prod
from typing import NamedTuple, final

from torch import Tensor
from torch.nn import functional as F  # noqa: N812, as everybody calls it

__all__ = ["Windows"]


@final
class Windows(NamedTuple):
    r"""Where a kernel lies on an image, for an image and a kernel of any dimension.

    At position p its entry a meets the place :math:`s p + d a` of the padded image. So the product
    of what is met at p and q,

    .. math:: u_p \cdot u_q = \sum_a x_{s p + d a} \cdot x_{s q + d a},

    is a sum along a diagonal of the products of all places. With places numbered one after another,
    a step along a diagonal is always the same step in memory.

    Args:
        positions: How many positions there are, along each dimension.
        kernel: The size of the kernel.
        stride: s.
        dilation: d.
        padding: Zeros in front of the image.
    """

    positions: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]

    @property
    def extent(self) -> tuple[int, ...]:
        """The size of the part of the padded image that is met."""
        sides = zip(self.positions, self.kernel, self.stride, self.dilation, strict=True)
        return tuple([(p - 1) * s + (k - 1) * d + 1 for p, k, s, d in sides])

    def unfolded(self) -> "Windows":
        """Windows of one place each, for `gathered` places, which hold all that a window meets."""
        one = (1,) * len(self.positions)
        return Windows(self.positions, one, one, one, (0,) * len(one))

    def places(self, images: Tensor) -> Tensor:
        """What is met of images `[N, C, ...]`, place by place: `[N, *extent, C]`."""
        return self._padded(images).movedim(1, -1).contiguous()

    def gathered(self, places: Tensor) -> Tensor:
        """From `places` to what each window meets: `[N, *positions, K C]`."""
        images, *steps, channels = places.stride()
        along = self._strides(steps)
        found = places.as_strided(
            (len(places), *self.positions, *self.kernel, places.shape[-1]),
            (images, *along[0], *along[1], channels),
        )
        return found.flatten(-1 - len(self.kernel))

    def patches(self, images: Tensor) -> Tensor:
        """What each window meets of images `[N, C, ...]`: `[N, C K, P]`, in a kernel's order."""
        padded = self._padded(images)
        first, channels, *steps = padded.stride()
        along = self._strides(steps)
        found = padded.as_strided(
            (*padded.shape[:2], *self.kernel, *self.positions),
            (first, channels, *along[1], *along[0]),
        )
        count, width = len(images), images.shape[1] * prod(self.kernel)
        return found.reshape(count, width, prod(self.positions))

    def summed(self, products: Tensor, left: int, right: int) -> Tensor:
        """From products of places to those of windows.

        Args:
            products: Of the places of two sets of images, `[k, left S, right S]`, contiguous.
            left: How many images the first set has.
            right: How many the second has.

        Returns:
            `[k, left, *positions, right, *positions]`.
        """
        places = prod(self.extent)
        width = right * places
        total = products.flatten(1)
        steps = _steps(self.extent)
        for size, dilation, step in zip(self.kernel, self.dilation, steps, strict=True):
            total = _run(total, size, dilation * step * (width + 1))
        across = [s * step for s, step in zip(self.stride, steps, strict=True)]
        return total.as_strided(
            (len(total), left, *self.positions, right, *self.positions),
            (total.stride(0), places * width, *(s * width for s in across), places, *across),
        )

    def _padded(self, images: Tensor) -> Tensor:
        sides = zip(images.shape[2:], self.extent, self.padding, strict=True)
        pads = [(before, extent - size - before) for size, extent, before in sides]
        if not any(map(any, pads)):
            return images
        return F.pad(images, [number for pair in reversed(pads) for number in pair])

    def _strides(self, steps: list[int]) -> tuple[list[int], list[int]]:
        """From the steps between places to those between positions, and between entries."""
        positions = [s * step for s, step in zip(self.stride, steps, strict=True)]
        return positions, [d * step for d, step in zip(self.dilation, steps, strict=True)]


def _steps(sizes: tuple[int, ...]) -> list[int]:
    """The steps between neighbours along each dimension, in places."""
    return [prod(sizes[dim + 1 :]) for dim in range(len(sizes))]


def _run(values: Tensor, count: int, step: int) -> Tensor:
    """The sums of `count` numbers, `step` apart, along the last dimension."""
    if count == 1:
        return values
    length = values.shape[-1] - (count - 1) * step
    total = values[..., :length] + values[..., step : step + length]
    for turn in range(2, count):
        total += values[..., turn * step : turn * step + length]
    return total
