"""The handwritten digits of scikit-learn, in bags."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from examples.digits import split

__all__ = ["SOUGHT", "Bag", "Images", "bags", "load"]

SOUGHT = 9


@dataclass(frozen=True)
class Images:
    """Single digits.

    Attributes:
        pixels: From 0 to 1, `[n, 1, 8, 8]`.
        digits: What they show, `[n]`.
    """

    pixels: Tensor
    digits: Tensor

    def __len__(self) -> int:
        return len(self.digits)

    def picked(self, index: Tensor) -> "Images":
        """Some of them."""
        return Images(self.pixels[index], self.digits[index])


@dataclass(frozen=True)
class Bag:
    """Images with one label for all.

    Attributes:
        images: The instances. Their digits are looked at by the picture alone.
        label: 1 if one of them is a nine, else 0.
    """

    images: Images
    label: float


def load() -> tuple[Images, Images]:
    """Two thirds of the 1797 images, to train on, and the rest, in a seeded order."""
    known, unknown = split(1198)
    return Images(*known.tensors), Images(*unknown.tensors)


def bags(images: Images, count: int, *, sizes: Sequence[int], seed: int) -> list[Bag]:
    """Bags of images drawn at random; every second one contains exactly one nine.

    Args:
        images: To draw from.
        count: How many bags.
        sizes: The fewest and the most images of a bag.
        seed: Of the draws.
    """
    generator = np.random.default_rng(seed)
    nines = np.flatnonzero(images.digits.numpy() == SOUGHT)
    others = np.flatnonzero(images.digits.numpy() != SOUGHT)
    found = []
    for number in range(count):
        index = generator.choice(others, generator.integers(sizes[0], sizes[1] + 1))
        if number % 2:
            index[generator.integers(len(index))] = generator.choice(nines)
        found.append(Bag(images.picked(torch.from_numpy(index)), float(number % 2)))
    return found
