"""The real parts: PyTorch Geometric's SchNet on real docked poses."""

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.data import Batch, Data
from torch_geometric.nn import SchNet
from torchjd.aggregation import UPGradWeighting

from examples.docked_poses.arrays import Pose, by_ligand, load, load_all
from examples.docked_poses.network import AllNeighbours, schnet
from posegrad import Boltzmann, Combination, Engine, Mean, Min
from posegrad.testing import assert_matches_autograd, peak_live_bytes
from tests.device import DEVICE
from tests.reference import rows, trainable


def _poses(count: int, *, forces: bool = False) -> list[Data]:
    ligand = by_ligand(load("tyk2", cutoff=3.0))[0]
    return [_data(pose, forces=forces) for pose in ligand[:count]]


def _data(pose: Pose, *, forces: bool = False) -> Data:
    pos = pose.xyz.to(DEVICE, copy=True).requires_grad_(forces)
    return Data(z=pose.z.to(DEVICE), pos=pos)


def _schnet() -> SchNet:
    torch.manual_seed(0)
    return SchNet(
        hidden_channels=16,
        num_filters=16,
        num_interactions=2,
        num_gaussians=10,
        cutoff=4.0,
        interaction_graph=AllNeighbours(4.0),
    )


def _score(model: nn.Module, data: Data) -> Tensor:
    batch = data.batch if isinstance(data, Batch) else None
    return model(data.z, data.pos, batch).squeeze(-1)  # [c]


@pytest.mark.parametrize(
    ("rule", "chunk_size"), [(Min(), 1), (Min(1.7), 4), (Boltzmann(0.593), 4), (Mean(), 1)]
)
def test_schnet_matches_autograd(rule: Combination, chunk_size: int) -> None:
    assert_matches_autograd(
        _schnet(),
        _poses(6),
        rule,
        predict=_score,
        collate=Batch.from_data_list,
        chunk_size=chunk_size,
        tolerance=1e-9,
    )


def test_forces_through_schnet_match_autograd() -> None:
    assert_matches_autograd(_schnet(), _poses(4, forces=True), Min(1.7), predict=_score)


@pytest.mark.parametrize("schedule", ["stream", "recompute"])
def test_peak_memory_is_that_of_one_pose(schedule: str) -> None:
    model = _schnet()
    engine = Engine(model, predict=_score)

    def peak(count: int) -> int:
        model.zero_grad()
        poses = _poses(count)
        with peak_live_bytes() as measured:
            engine.combine(poses, Min(1.7), schedule=schedule).prediction.square().backward()
        return measured.bytes

    peak(2)
    assert peak(16) <= 1.15 * peak(2)


def test_the_gramian_of_a_ragged_batch_needs_no_index() -> None:
    model, poses = _schnet().double(), _poses(16)
    for pose in poses:
        pose.pos = pose.pos.double()
    batch = Batch.from_data_list(poses)
    output = _score(model, batch)
    expected = rows(output, trainable(model))
    J = Engine(model).jacobian(output)
    torch.testing.assert_close(J.matrix(), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(J.gramian(), expected @ expected.T, rtol=1e-10, atol=1e-12)
    assert all(path.startswith("closed form") for paths in J.paths.values() for path in paths)


def test_gathering_poses_one_by_one_is_the_same() -> None:
    model, poses = _schnet(), _poses(6)
    whole = Engine(model).jacobian(_score(model, Batch.from_data_list(poses)))
    single = Engine(model, predict=_score).gather(poses)
    torch.testing.assert_close(single.gramian(), whole.gramian(), rtol=1e-4, atol=1e-6)


def test_upgrad_on_64_docked_poses_takes_little_more_memory_than_on_8() -> None:
    """The full network, four poses a chunk: a chunk's graph is most of it, 64 rows the rest."""
    poses = [pose for ligand in by_ligand(load_all()) for pose in ligand][:64]
    data = [_data(pose) for pose in poses]
    model = schnet()
    engine = Engine(model, predict=_score, collate=Batch.from_data_list, chunk_size=4)

    def peak(count: int) -> int:
        model.zero_grad()
        with peak_live_bytes() as report:
            weights = engine.gather(data[:count]).backward(UPGradWeighting())
        assert weights is not None
        assert weights.shape == (count,)
        return report.bytes

    engine.gather(data[:4]).backward(UPGradWeighting())  # the first chunk is checked, which is more
    assert peak(64) <= 1.5 * peak(8)
