"""Published networks that score one docked pose, and distinct docked poses for them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.data import Batch, Data
from torch_geometric.nn import ViSNet

from benchmarks.peers import Predict
from examples.docked_poses.arrays import Pose, by_ligand, load_all
from examples.docked_poses.network import AllNeighbours, schnet, score

__all__ = ["MODELS", "Model", "distinct_poses"]


@dataclass(frozen=True)
class Model:
    """A network and what it scores.

    Attributes:
        text: What it is, in words.
        make: The network, always the same one.
        predict: From the network and a pose to its score.
        poses: That many poses, never one twice.
        to: A pose on a device, in a dtype.
        sizes: The numbers of poses it is run on.
        joined: Whether its poses are handed to it as one batch.
    """

    text: str
    make: Callable[[], nn.Module]
    predict: Predict
    poses: Callable[[int], Sequence[Any]]
    to: Callable[[Any, str, torch.dtype], Any]
    sizes: tuple[int, ...]
    joined: bool = False

    def group(self, poses: Sequence[Any]) -> Any:
        """Poses as a training loop has them."""
        return Batch.from_data_list(list(poses)) if self.joined else poses


def distinct_poses(m: int) -> list[Pose]:
    """The first `m` poses of the largest ligand groups, target by target in turn: never one twice.

    Raises:
        ValueError: if the data hold fewer poses.
    """
    rank: dict[str, int] = {}
    turns = []
    for group in sorted(by_ligand(load_all()), key=len, reverse=True):
        target = group[0].target
        rank[target] = rank.get(target, -1) + 1
        turns.append((-len(group), rank[target], group))
    turns.sort(key=lambda turn: turn[:2])
    pooled = [pose for _, _, group in turns for pose in group]
    if m > len(pooled):
        raise ValueError(f"{m} distinct poses asked for, the data hold {len(pooled)}")
    return pooled[:m]


def _atoms_to(pose: Pose, device: str, dtype: torch.dtype) -> Pose:
    return replace(pose, z=pose.z.to(device), xyz=pose.xyz.to(device, dtype))


def _schnet() -> nn.Module:
    torch.manual_seed(0)
    return schnet()


class _WithinEach(nn.Module):
    """The neighbours of a batch, pose by pose: all pairs of all its atoms would be too many."""

    def __init__(self, near: AllNeighbours) -> None:
        super().__init__()
        self.near = near

    def forward(self, xyz: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Edges `[2, e]` and their lengths `[e]` of the atoms `xyz` `[a, 3]`."""
        sizes = batch.bincount().tolist()
        starts = [0, *accumulate(sizes)]
        own = [self.near(x, b) for x, b in zip(xyz.split(sizes), batch.split(sizes), strict=True)]
        edges = torch.cat(
            [pairs + start for (pairs, _), start in zip(own, starts, strict=False)], 1
        )
        return edges, torch.cat([lengths for _, lengths in own])


def _schnet_joined() -> nn.Module:
    network = _schnet()
    network.interaction_graph = _WithinEach(network.interaction_graph)
    return network


def _score_joined(network: nn.Module, batch: Batch) -> Tensor:
    energies: Tensor = network(batch.z, batch.pos, batch.batch)
    return energies[:, 0]


def _graphs(m: int) -> list[Data]:
    return [Data(z=pose.z, pos=pose.xyz) for pose in distinct_poses(m)]


class _Surroundings(nn.Module):
    """ViSNet's neighbour search in plain torch: its own needs `pyg-lib`, which PyPI lacks."""

    def __init__(self, cutoff: float) -> None:
        super().__init__()
        self.near = AllNeighbours(cutoff)

    def forward(self, xyz: Tensor, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Edges `[2, e]`, an atom's own among them, their lengths `[e]` and vectors `[e, 3]`."""
        edges, lengths = self.near(xyz, batch)
        own = torch.arange(len(xyz), device=xyz.device).expand(2, -1)
        edges = torch.cat([edges, own], dim=1)
        lengths = torch.cat([lengths, lengths.new_zeros(len(xyz))])
        return edges, lengths, xyz[edges[0]] - xyz[edges[1]]


def _visnet() -> nn.Module:
    torch.manual_seed(0)
    network = ViSNet(hidden_channels=64, num_layers=3, cutoff=5.0)
    network.representation_model.distance = _Surroundings(5.0)
    return network


def _score_visnet(network: nn.Module, pose: Pose) -> Tensor:
    energies: Tensor = network(pose.z, pose.xyz, torch.zeros_like(pose.z))[0]
    return energies.squeeze()


def _pignet() -> nn.Module:
    from examples.docked_poses.pignet import pretrained

    network: nn.Module = pretrained()
    return network


def _score_pignet(network: nn.Module, pose: Data) -> Tensor:
    from examples.docked_poses.pignet import binding_energy

    return binding_energy(network, pose).squeeze()


def _complexes(m: int) -> list[Data]:
    """Graphs of the first `m` docked poses of TYK2, the target whose molecules the data hold.

    Raises:
        ValueError: if the data hold fewer poses.
    """
    from examples.docked_poses.compounds import graphs

    found = [graph for _, graph in islice(graphs("tyk2"), m)]
    if len(found) < m:
        raise ValueError(f"{m} distinct poses asked for, the data of TYK2 hold {len(found)}")
    return found


def _graph_to(graph: Data, device: str, dtype: torch.dtype) -> Data:
    def placed(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)

    return graph.clone().apply(placed)


MODELS: dict[str, Model] = {
    "SchNet": Model(
        "PyG SchNet, 128 channels, 6 interactions, 50 Gaussians, 5 Å",
        _schnet, score, distinct_poses, _atoms_to, (4, 16, 64, 256),
    ),
    "PIGNet2": Model(
        "PIGNet2, pretrained", _pignet, _score_pignet, _complexes, _graph_to, (4, 16, 64, 255)
    ),
    "ViSNet": Model(
        "PyG ViSNet, 64 channels, 3 layers, 5 Å",
        _visnet, _score_visnet, distinct_poses, _atoms_to, (4, 16, 64, 256),
    ),
    "SchNet, joined": Model(
        "the same SchNet, poses as one batch", _schnet_joined, _score_joined, _graphs, _graph_to,
        (64,), joined=True,
    ),
}  # fmt: skip
