"""The images of the example: how many are trained on, and which are held out."""

from torch.utils.data import TensorDataset

from examples.digits import split

__all__ = ["TRAINED_ON", "load"]

TRAINED_ON = 1200


def load() -> tuple[TensorDataset, TensorDataset]:
    """1200 of the 1797 images, to train on, and the rest; as of `split`."""
    return split(TRAINED_ON)
