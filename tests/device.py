"""The device that the tests are on: that of conftest.py, or of the process that a test started."""

import torch

__all__ = ["DEVICE"]

DEVICE = torch.get_default_device()
