"""PyTorch Geometric's SchNet as a scorer of docked poses."""

from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn import SchNet

from examples.docked_poses.arrays import Pose

__all__ = ["AllNeighbours", "schnet", "score"]


class AllNeighbours(nn.Module):
    """Every ordered pair of atoms of one pose within the cutoff, in plain torch.

    SchNet's own neighbour search needs `pyg-lib`, which PyPI does not carry.

    Args:
        cutoff: Largest distance of a pair, Å.
    """

    def __init__(self, cutoff: float) -> None:
        super().__init__()
        self.cutoff = cutoff

    def forward(self, xyz: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Edges `[2, e]` and their lengths `[e]` of the atoms `xyz` `[a, 3]`."""
        # Without the matrix-product shortcut, which loses digits at coordinates far from 0.
        distance = torch.cdist(xyz, xyz, compute_mode="donot_use_mm_for_euclid_dist")  # [a, a]
        near = (distance <= self.cutoff) & (batch[:, None] == batch)
        near.fill_diagonal_(False)
        edges = near.nonzero().T  # [2, e]
        return edges, distance[edges[0], edges[1]]


def schnet(
    *,
    channels: int = 128,
    interactions: int = 6,
    gaussians: int = 50,
    cutoff: float = 5.0,
    **options: Any,
) -> nn.Module:
    """Untrained SchNet over all neighbours within the cutoff.

    Args:
        channels: Width of atom embeddings and filters.
        interactions: Number of interaction blocks.
        gaussians: Number of Gaussians a distance is expanded in.
        cutoff: Largest distance of a pair, Å.
        **options: Passed on to `torch_geometric.nn.SchNet`.
    """
    network: nn.Module = SchNet(
        hidden_channels=channels,
        num_filters=channels,
        num_interactions=interactions,
        num_gaussians=gaussians,
        cutoff=cutoff,
        interaction_graph=AllNeighbours(cutoff),
        **options,
    )
    return network


def score(model: nn.Module, pose: Pose) -> Tensor:
    """Predicted binding free energy of one pose `[]`."""
    output: Tensor = model(pose.z, pose.xyz)  # [1, 1]
    return output.squeeze()
