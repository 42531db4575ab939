"""Random numbers that depend on a seed alone."""

import torch

__all__ = ["seeded"]


def seeded(seed: int) -> torch.Generator:
    """A generator of its own, for tensors on the default device."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)
