"""Networks of PyTorch Geometric, e3nn and EGNN on ragged poses, in chunks by atoms."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle, product
from typing import Any

import e3nn
import pytest
import torch
from e3nn.nn.models.v2106.gate_points_networks import SimpleNetwork
from egnn_pytorch import EGNN, EGNN_Sparse
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch_geometric.data import Batch, Data
from torch_geometric.nn.models import ViSNet

from examples.docked_poses.network import AllNeighbours, schnet
from posegrad import Boltzmann, Budget, Engine, Min
from posegrad.testing import assert_matches_autograd
from tests.device import seeded
from tests.reference import rows, trainable

# Scripted modules are still in use, in older releases of e3nn too.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning"),  # from torch 2.15 on
]

SIZES = [5, 9, 3, 12, 7, 4, 20, 2]
BY_ATOMS = Budget(16, lambda pose: pose.num_nodes)


def _poses(sizes: list[int] = SIZES, dtype: torch.dtype = torch.float64) -> list[Data]:
    generator = seeded(0)
    kinds = [torch.randint(1, 10, (size,), generator=generator) for size in sizes]
    xyz = [1.5 * torch.randn(size, 3, generator=generator, dtype=dtype) for size in sizes]
    return [Data(z=z, pos=x, x=_features(z).to(dtype)) for z, x in zip(kinds, xyz, strict=True)]


def _features(z: Tensor) -> Tensor:
    return torch.stack([torch.sin(z), torch.cos(z), z / 5], dim=1)  # [a, 3]


def _trained(model: nn.Module) -> nn.Module:
    """Away from the start, where e3nn's convolutions multiply some of their weights by zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def _of_atoms(model: nn.Module, data: Data) -> Any:
    """For models called as model(z, pos, batch)."""
    return model(data.z, data.pos, data.batch if isinstance(data, Batch) else None)


class Neighbours(nn.Module):
    """What ViSNet wants of a neighbour search: edges, with loops, their lengths and vectors."""

    def __init__(self, cutoff: float) -> None:
        super().__init__()
        self.search = AllNeighbours(cutoff)

    def forward(self, pos: Tensor, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        edges, lengths = self.search(pos, batch)
        loops = torch.arange(len(pos)).expand(2, -1)
        vectors = torch.cat([pos[edges[0]] - pos[edges[1]], torch.zeros_like(pos)])
        lengths = torch.cat([lengths, torch.zeros_like(pos[:, 0])])
        return torch.cat([edges, loops], dim=1), lengths, vectors


def _visnet() -> nn.Module:
    model = ViSNet(
        lmax=1, num_heads=2, num_layers=2, hidden_channels=8, num_rbf=8, max_z=10, cutoff=4.0
    )
    model.representation_model.distance = Neighbours(4.0)
    return model


def _e3nn() -> nn.Module:
    return SimpleNetwork(
        irreps_in="3x0e", irreps_out="0e", max_radius=3.0, num_neighbors=4.0, num_nodes=8.0,
        mul=2, layers=1, lmax=1,
    )  # fmt: skip


class Egnn(nn.Module):
    """Two layers of egnn_pytorch on all neighbours; they move the atoms too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.search = AllNeighbours(4.0)
        self.layers = nn.ModuleList(EGNN_Sparse(8, m_dim=6, norm_coors=True) for _ in range(2))
        self.head = nn.Linear(8, 1)

    def forward(self, z: Tensor, pos: Tensor, batch: Tensor | None) -> Tensor:
        batch = torch.zeros_like(z) if batch is None else batch
        edges, _ = self.search(pos, batch)
        state = torch.cat([pos, self.embed(z)], dim=1)
        for layer in self.layers:
            state = layer(state, edges, batch=batch)
        energies = self.head(state[:, 3:]).squeeze(1)  # [a]
        return energies.new_zeros(int(batch[-1]) + 1).index_add(0, batch, energies)  # [c]


class DenseEgnn(nn.Module):
    """egnn_pytorch's layers on padded poses and a mask, which its library leaves to the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8, padding_idx=0)
        self.layers = nn.ModuleList(EGNN(dim=8, m_dim=6) for _ in range(2))
        self.head = nn.Linear(8, 1)

    def forward(self, joined: tuple[Tensor, Tensor]) -> Tensor:
        z, pos = joined  # [c, a], [c, a, 3]
        mask, features = z > 0, self.embed(z)
        for layer in self.layers:
            features, pos = layer(features, pos, mask=mask)
        return (self.head(features).squeeze(-1) * mask).sum(dim=1)  # [c]


def _padded(poses: list[Data]) -> tuple[Tensor, Tensor]:
    kinds, xyz = [pose.z for pose in poses], [pose.pos for pose in poses]
    return pad_sequence(kinds, batch_first=True), pad_sequence(xyz, batch_first=True)


@contextmanager
def _compiled_by(mode: str) -> Iterator[None]:
    """e3nn before 0.6 scripts its tensor products; now that is a choice."""
    before = e3nn.get_optimization_defaults()["jit_mode"]
    e3nn.set_optimization_defaults(jit_mode=mode)
    try:
        yield
    finally:
        e3nn.set_optimization_defaults(jit_mode=before)


def _scripted() -> nn.Module:
    with _compiled_by("script"):
        return _e3nn()


# name: how to make it, how to call it, how to join poses
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any] | None, Any]] = {
    "SchNet": (
        lambda: schnet(channels=8, interactions=2, gaussians=6, cutoff=4.0),
        _of_atoms,
        Batch.from_data_list,
    ),
    "ViSNet": (_visnet, lambda model, data: _of_atoms(model, data)[0], Batch.from_data_list),
    "e3nn": (_e3nn, None, Batch.from_data_list),
    "e3nn, scripted": (_scripted, None, Batch.from_data_list),
    "EGNN": (Egnn, _of_atoms, Batch.from_data_list),
    "EGNN, padded": (DenseEgnn, None, _padded),
}


SCHEDULES = ["stream", "recompute", "store"]


@pytest.mark.parametrize(
    ("name", "schedule"),
    [*product(["SchNet"], SCHEDULES), *zip(list(NETWORKS)[1:], cycle(SCHEDULES), strict=False)],
)
def test_chunks_by_atoms_match_autograd(name: str, schedule: str) -> None:
    make, predict, collate = NETWORKS[name]
    assert_matches_autograd(
        _trained(make()),
        _poses(),
        Min(1.7),
        predict=predict,
        collate=collate,
        chunk_size=BY_ATOMS,
        schedules=[schedule],
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_chunks_by_atoms_are_single_poses(name: str) -> None:
    make, predict, collate = NETWORKS[name]
    model = _trained(make()).double()
    found = []
    for size in (1, BY_ATOMS):
        model.zero_grad()
        engine = Engine(model, predict=predict, collate=collate, chunk_size=size)
        prediction, per_pose = engine.combine(_poses(), Boltzmann(0.593))
        prediction.backward()
        found.append((per_pose, [p.grad for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("trained", [False, True], ids=["at the start", "trained"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_jacobian_of_a_ragged_batch_is_autograds(name: str, trained: bool) -> None:
    make, predict, collate = NETWORKS[name]
    model = (_trained(make()) if trained else make()).double()
    score = predict or nn.Module.__call__
    output = score(model, collate(_poses()))
    expected = rows(output, trainable(model))
    J = Engine(model).jacobian(output)
    torch.testing.assert_close(J.matrix(), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(J.gramian().flatten(), (expected @ expected.T).flatten())


def test_the_networks_on_the_edges_are_read_in_closed_form() -> None:
    """Their weights are scaled before use, and there are far more edges than weights."""
    model = _trained(_e3nn()).double()
    J = Engine(model).jacobian(model(Batch.from_data_list(_poses([20] * 12))))
    assert all(path.startswith("closed form") for paths in J.paths.values() for path in paths)
