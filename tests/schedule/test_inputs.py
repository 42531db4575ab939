"""Whatever a pose depends on gets its gradient: coordinates, shared encoders, any container."""

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.data import Batch, Data

from posegrad import Engine, Mean, Min
from posegrad.testing import assert_matches_autograd
from tests.models import FEATURES, MODELS
from tests.schedules import SCHEDULES

Named = namedtuple("Named", ["x", "tag"])


@dataclass(frozen=True)
class Frozen:
    x: Tensor
    tag: str


# How to wrap a tensor into a pose, and how the model gets it out.
CONTAINERS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tensor": (lambda x: x, lambda pose: pose),
    "tuple": (lambda x: (x, "tag"), lambda pose: pose[0]),
    "named tuple": (lambda x: Named(x, "tag"), lambda pose: pose.x),
    "nested": (lambda x: {"a": [None, (x,)]}, lambda pose: pose["a"][1][0]),
    "dataclass": (lambda x: Frozen(x, "tag"), lambda pose: pose.x),
    "PyG Data": (lambda x: Data(x=x, tag="tag"), lambda pose: pose.x),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_coordinates_get_their_gradient_in_any_container(kind: str) -> None:
    wrap, unwrap = CONTAINERS[kind]
    poses = [wrap(torch.randn(FEATURES, requires_grad=i != 1)) for i in range(5)]
    assert_matches_autograd(
        MODELS["mlp"](), poses, Min(2.0), predict=lambda model, pose: model(unwrap(pose))
    )


@pytest.mark.parametrize("chunk_size", [1, 2, 8])
def test_stacked_poses_get_their_gradient(chunk_size: int) -> None:
    model = MODELS["mlp"]().double()
    batch = torch.randn(5, FEATURES, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(Min(2.0)(model(batch)[:, 0]), batch)
    for schedule in SCHEDULES:
        prediction, _ = Engine(model, chunk_size=chunk_size).combine(
            batch, Min(2.0), schedule=schedule
        )
        (found,) = torch.autograd.grad(prediction, batch)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_encoder_upstream_is_trained_by_one_outer_backward(schedule: str) -> None:
    encoder, head = nn.Linear(3, FEATURES).double(), MODELS["mlp"]().double()
    atoms, pocket = torch.randn(5, 3).double(), torch.randn(3).double()

    def loss(combine: Callable[[list[tuple[Tensor, Tensor]]], Tensor]) -> list[Tensor]:
        shared = torch.tanh(encoder(pocket))  # one tensor, in every pose
        poses = [(torch.tanh(encoder(x)), shared) for x in atoms]
        parameters = [*encoder.parameters(), *head.parameters()]
        return list(torch.autograd.grad(combine(poses).square(), parameters))

    def predict(model: nn.Module, pose: tuple[Tensor, Tensor]) -> Tensor:
        return model(pose[0] * pose[1])

    expected = loss(lambda poses: Min(2.0)(torch.cat([predict(head, pose) for pose in poses])))
    engine = Engine(head, predict=predict)
    found = loss(lambda poses: engine.combine(poses, Min(2.0), schedule=schedule).prediction)
    torch.testing.assert_close(found, expected)


def test_collated_poses_that_share_a_tensor() -> None:
    shared = torch.randn(FEATURES, requires_grad=True)
    poses = [(torch.randn(FEATURES, requires_grad=True), shared) for _ in range(5)]

    def collate(poses: list[tuple[Tensor, Tensor]]) -> Tensor:
        return torch.stack([x * y for x, y in poses])

    assert_matches_autograd(MODELS["mlp"](), poses, Mean(), collate=collate, chunk_size=2)


class Forces(nn.Module):
    """Scores a pose by its energy minus the size of its forces, as force fields are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = MODELS["mlp"]()

    def forward(self, pose: Tensor) -> Tensor:
        with torch.enable_grad():
            pose.requires_grad_()
            energy = self.energy(pose).sum()
            (force,) = torch.autograd.grad(energy, pose, create_graph=True)
        return energy - force.square().sum()


def test_a_model_that_differentiates_by_its_pose() -> None:
    poses = [torch.randn(FEATURES) for _ in range(4)]
    assert_matches_autograd(Forces(), poses, Min(2.0))
    assert_matches_autograd(Forces(), [pose.clone().requires_grad_() for pose in poses], Min(2.0))

    Engine(Forces()).combine(poses, Min(2.0), schedule="recompute").prediction.backward()
    assert not any(pose.requires_grad for pose in poses)


def test_the_users_pose_is_not_written_to() -> None:
    poses = [Data(x=torch.randn(FEATURES, requires_grad=True)) for _ in range(3)]
    tensors = [pose.x for pose in poses]
    engine = Engine(MODELS["mlp"](), predict=lambda model, pose: model(pose.x))
    engine.combine(poses, Mean()).prediction.backward()
    assert all(pose.x is x for pose, x in zip(poses, tensors, strict=True))


class GraphNet(nn.Module):
    """Sums messages over edges; one score per graph of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.message = nn.Linear(3, 4)
        self.readout = nn.Linear(4, 1)

    def forward(self, data: Data) -> Tensor:
        source, target = data.edge_index
        messages = torch.tanh(self.message(data.pos[source] - data.pos[target]))
        atoms = torch.zeros(len(data.pos), 4).to(messages).index_add(0, target, messages)
        owner = data.batch if isinstance(data, Batch) else torch.zeros(len(atoms), dtype=torch.long)
        count = data.num_graphs if isinstance(data, Batch) else 1
        return (
            torch.zeros(count, 1).to(atoms).index_add(0, owner, self.readout(atoms).square())[:, 0]
        )


@pytest.mark.parametrize("chunk_size", [1, 2, 5])
@pytest.mark.parametrize("forces", [False, True])
def test_ragged_graphs_of_pyg(chunk_size: int, forces: bool) -> None:
    poses = []
    for atoms in (3, 5, 2, 4, 6):
        edges = torch.combinations(torch.arange(atoms)).T
        poses.append(Data(pos=torch.randn(atoms, 3, requires_grad=forces), edge_index=edges))
    assert_matches_autograd(
        GraphNet(), poses, Min(2.0), collate=Batch.from_data_list, chunk_size=chunk_size
    )
