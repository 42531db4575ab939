"""Networks on ragged graphs, and their batches."""

import torch
from torch import Tensor, nn
from torch_geometric.data import Batch, Data
from torch_geometric.nn import SchNet

from examples.docked_poses.network import AllNeighbours
from tests.architectures.models import WIDTH
from tests.architectures.row import M, draw, tokens


def edges(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A ragged batch: of 2 to 4 atoms per pose, the owners, senders and receivers."""
    sizes = tokens(seed, M, below=3) + 2
    owner = torch.arange(M).repeat_interleave(sizes)
    near = (owner[:, None] == owner).fill_diagonal_(False)
    sender, receiver = near.nonzero().T
    return owner, sender, receiver


class Messages(nn.Module):
    """A network on ragged graphs: edges to atoms to poses."""

    def __init__(self) -> None:
        super().__init__()
        self.edge, self.node, self.out = nn.Linear(2 * WIDTH, 3), nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor, owner: Tensor, sender: Tensor, receiver: Tensor) -> Tensor:
        message = torch.tanh(self.edge(torch.cat([x[sender], x[receiver]], dim=1)))
        atoms = message.new_zeros(len(x), 3).index_add(0, receiver, message)
        energy = self.out(torch.tanh(self.node(atoms)))[:, 0]
        return energy.new_zeros(M).scatter_add(0, owner, energy)


class Egnn(nn.Module):
    """Two layers of an equivariant graph network."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.edge = nn.ModuleList(nn.Linear(7, 3) for _ in range(2))
        self.shift = nn.ModuleList(nn.Linear(3, 1, bias=False) for _ in range(2))
        self.node = nn.ModuleList(nn.Linear(6, 3) for _ in range(2))
        self.out = nn.Linear(3, 1)

    def forward(
        self, z: Tensor, xyz: Tensor, owner: Tensor, sender: Tensor, receiver: Tensor
    ) -> Tensor:
        h = self.embedding(z)
        for edge, shift, node in zip(self.edge, self.shift, self.node, strict=True):
            apart = xyz[sender] - xyz[receiver]
            squared = apart.square().sum(1, keepdim=True)
            message = nn.functional.silu(edge(torch.cat([h[sender], h[receiver], squared], dim=1)))
            xyz = xyz.index_add(0, receiver, apart * torch.tanh(shift(message)))
            gathered = torch.zeros_like(h).index_add(0, receiver, message)
            h = h + nn.functional.silu(node(torch.cat([h, gathered], dim=1)))
        return torch.zeros(M, dtype=h.dtype).index_add(0, owner, self.out(h)[:, 0])


def message_passing(model: nn.Module, seed: int) -> Tensor:
    owner, sender, receiver = edges(seed)
    return model(draw(seed, len(owner), WIDTH), owner, sender, receiver)


def equivariant(model: nn.Module, seed: int) -> Tensor:
    owner, sender, receiver = edges(seed)
    atoms = len(owner)
    return model(tokens(seed, atoms, below=5), draw(seed, atoms, 3), owner, sender, receiver)


def schnet() -> nn.Module:
    return SchNet(
        hidden_channels=6,
        num_filters=5,
        num_interactions=2,
        num_gaussians=4,
        cutoff=4.0,
        interaction_graph=AllNeighbours(4.0),
    )


def molecules(model: nn.Module, seed: int) -> Tensor:
    owner, _, _ = edges(seed)
    z, xyz = tokens(seed, len(owner), below=9) + 1, draw(seed, len(owner), 3)
    poses = [Data(z=z[owner == i], pos=xyz[owner == i]) for i in range(M)]
    data = Batch.from_data_list(poses)
    return model(data.z, data.pos, data.batch).squeeze(1)
