"""The handwritten digits of scikit-learn, to train on and held out."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

__all__ = ["split"]


def split(count: int) -> tuple[TensorDataset, TensorDataset]:
    """So many of the 1797 images, to train on, and the rest, in a seeded order.

    Each set has images from 0 to 1, `[n, 1, 8, 8]`, and what they show, `[n]`.
    """
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images = torch.tensor(data.images[order] / 16, dtype=torch.float32).unsqueeze(1)
    digits = torch.tensor(data.target[order])
    known, unknown = slice(count), slice(count, None)
    return (
        TensorDataset(images[known], digits[known]),
        TensorDataset(images[unknown], digits[unknown]),
    )
