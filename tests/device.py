"""The device that the tests are on, that of conftest.py or of the process that a test started."""

import torch

__all__ = ["DEVICE", "seeded"]

DEVICE = torch.get_default_device()


def seeded(seed: int) -> torch.Generator:
    """Random numbers on that device that depend on a seed alone."""
    return torch.Generator(DEVICE).manual_seed(seed)
