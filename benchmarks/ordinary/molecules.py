"""Networks of PyTorch Geometric on molecules of different sizes."""

import torch
from torch import Tensor, nn

from benchmarks.ordinary.problem import Problem
from examples.docked_poses.network import AllNeighbours
from examples.docked_poses.network import schnet as network

__all__ = ["atoms", "dimenet", "network", "schnet", "squared"]


def atoms(m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers, places and the molecule of random atoms, 12 to 20 a molecule."""
    sizes = torch.randint(12, 21, (m,))
    molecule = torch.arange(m).repeat_interleave(sizes)
    z = torch.tensor([1, 6, 7, 8])[torch.randint(4, (len(molecule),))]
    return z, 3.0 * torch.randn(len(molecule), 3), molecule


def squared(network: nn.Module, z: Tensor, xyz: Tensor, molecule: Tensor, y: Tensor) -> Tensor:
    """The squared error of each molecule."""
    return nn.functional.mse_loss(network(z, xyz, molecule).squeeze(1), y, reduction="none")


def schnet() -> Problem:
    """SchNet, 64 channels, 3 interactions."""
    inputs = (*atoms(8), torch.randn(8))
    made = network(channels=64, interactions=3, gaussians=32)
    return Problem(made, squared, inputs, 8, is_sliced=False)


def dimenet(width: int, layers: int) -> nn.Module:
    """DimeNet++ whose neighbours and triplets are found in plain torch.

    Its own need `pyg-lib` and `torch-sparse`, which PyPI lacks.
    """
    from torch_geometric.nn import DimeNetPlusPlus

    class Plain(DimeNetPlusPlus):  # type: ignore[misc]
        def forward(self, z: Tensor, xyz: Tensor, molecule: Tensor) -> Tensor:
            (j, i), distance = AllNeighbours(self.cutoff)(xyz, molecule)
            first, second = ((i[:, None] == j) & (j[:, None] != i)).nonzero().T  # k to j, j to i
            back, forth = xyz[j[second]] - xyz[i[second]], xyz[j[first]] - xyz[i[first]]
            angle = torch.atan2(torch.linalg.cross(back, forth).norm(dim=1), (back * forth).sum(1))
            rbf, sbf = self.rbf(distance), self.sbf(distance, angle, first)
            x = self.emb(z, rbf, i, j)
            p: Tensor = self.output_blocks[0](x, rbf, i, len(xyz))
            for block, output in zip(self.interaction_blocks, self.output_blocks[1:], strict=True):
                x = block(x, rbf, sbf, first, second)
                p = p + output(x, rbf, i, len(xyz))
            y: Tensor = p.new_zeros(int(molecule.max()) + 1, 1).index_add(0, molecule, p)
            return y

    made: nn.Module = Plain(
        hidden_channels=width, out_channels=1, num_blocks=layers, int_emb_size=width // 2,
        basis_emb_size=8, out_emb_channels=width, num_spherical=3, num_radial=4, cutoff=4.0,
        output_initializer="glorot_orthogonal",
    )  # fmt: skip
    return made
