"""A network of PyTorch Geometric on molecules of different sizes."""

import torch
from torch import Tensor, nn

from benchmarks.ordinary.problem import Problem
from examples.docked_poses.network import schnet as network

__all__ = ["atoms", "schnet"]


def atoms(m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers, places and the molecule of random atoms, 12 to 20 a molecule."""
    sizes = torch.randint(12, 21, (m,))
    molecule = torch.arange(m).repeat_interleave(sizes)
    z = torch.tensor([1, 6, 7, 8])[torch.randint(4, (len(molecule),))]
    return z, 3.0 * torch.randn(len(molecule), 3), molecule


def _squared(network: nn.Module, z: Tensor, xyz: Tensor, molecule: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(network(z, xyz, molecule).squeeze(1), y, reduction="none")


def schnet() -> Problem:
    """SchNet, 64 channels, 3 interactions, a squared error for each molecule."""
    inputs = (*atoms(8), torch.randn(8))
    made = network(channels=64, interactions=3, gaussians=32)
    return Problem(made, _squared, inputs, 8, is_sliced=False)
