"""A batch is sliced, whatever holds it, and its poses stay apart; a list is walked."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torch_geometric.data import Batch, Data

from posegrad import Boltzmann, Budget, Combination, Engine, Mean, Min, PosesMixError
from posegrad.testing import assert_matches_autograd, rules
from tests.models import FEATURES, MODELS
from tests.reference import rows, trainable, untouched
from tests.schedule.batches_table import APART, CONTAINERS, MIXING, TOKENS, centred, summed
from tests.schedule.test_inputs import GraphNet
from tests.schedules import SCHEDULES

TWINS = torch.cat([TOKENS[:5], TOKENS[:1]])  # the last is the first


def _predicting(kind: str) -> Callable[[nn.Module, Any], Tensor]:
    def predict(model: nn.Module, batch: Any) -> Tensor:
        x, shift = CONTAINERS[kind][1](batch)
        return model(x * shift).squeeze(1)

    return predict


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize(
    ("chunk_size", "grad", "rule"),
    [("auto", True, Min(2.0)), (1, False, Boltzmann(0.593)), (2, True, Boltzmann(0.593))],
)
def test_every_container_matches_autograd(
    kind: str, chunk_size: Any, grad: bool, rule: Combination
) -> None:
    x, shift = torch.randn(5, FEATURES, requires_grad=grad), torch.randn(5, FEATURES)
    batch = CONTAINERS[kind][0](x, shift)
    assert_matches_autograd(
        MODELS["mlp"](), batch, rule, predict=_predicting(kind), chunk_size=chunk_size
    )


@given(
    kind=st.sampled_from(sorted(CONTAINERS)),
    rule=rules(),
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    chunk_size=st.integers(1, 9),
    dropout=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_drawn_batches_match_autograd(
    kind: str, rule: Combination, sizes: list[int], chunk_size: int, dropout: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    x, shift = torch.randn(sum(sizes), FEATURES), torch.randn(sum(sizes), FEATURES)
    assert_matches_autograd(
        MODELS["dropout" if dropout else "mlp"](),
        CONTAINERS[kind][0](x.requires_grad_(seed % 2 == 0), shift),
        rule,
        groups=sizes,
        predict=_predicting(kind),
        chunk_size=chunk_size,
        tolerance=1e-10,
    )


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_model_sees_slices_with_their_batch_dimension(kind: str, schedule: str) -> None:
    seen: list[Tensor] = []
    x, shift = torch.randn(5, FEATURES), torch.randn(5, FEATURES)

    def predict(model: nn.Module, batch: Any) -> Tensor:
        seen.append(CONTAINERS[kind][1](batch)[0])
        return model(seen[-1]).squeeze()  # a slice of one pose may come back without a dimension

    engine = Engine(nn.Linear(FEATURES, 1), predict=predict, chunk_size=2)
    engine.combine(CONTAINERS[kind][0](x, shift), Mean(), schedule=schedule)
    torch.testing.assert_close(seen, list(x.split(2)))


def test_a_list_of_the_same_poses_is_walked() -> None:
    seen: list[torch.Size] = []
    model = nn.Linear(FEATURES, 1)
    engine = Engine(model, predict=lambda model, x: seen.append(x.shape) or model(x))
    batch = torch.randn(3, FEATURES)
    found = [engine.combine(poses, Mean()).prediction for poses in (batch, list(batch))]
    assert seen[0] == (3, FEATURES)
    assert seen[-3:] == [(FEATURES,)] * 3
    torch.testing.assert_close(*found)


def test_a_dataset_is_walked() -> None:
    x, shift = torch.randn(4, FEATURES), torch.randn(4, FEATURES)
    model = nn.Linear(FEATURES, 1)
    engine = Engine(model, predict=lambda model, pose: model(pose[0] * pose[1]))
    _, per_pose = engine.combine(TensorDataset(x, shift), Mean())
    torch.testing.assert_close(per_pose, model(x * shift).squeeze(1))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_nested_tensor_is_a_batch(layout: torch.layout, schedule: str) -> None:
    model, poses = nn.Linear(4, 1), [torch.randn(atoms, 4) for atoms in (3, 2, 5)]
    batch = torch.nested.nested_tensor(poses, layout=layout)

    def predict(model: nn.Module, batch: Tensor) -> Tensor:
        return torch.stack([atoms.sum() for atoms in model(batch).unbind()])

    expected = Engine(model, predict=lambda model, x: model(x).sum()).combine(poses, Min(0.5))
    for chunk_size in ("auto", 2):
        engine = Engine(model, predict=predict, chunk_size=chunk_size)
        found = engine.combine(batch, Min(0.5), schedule=schedule)
        torch.testing.assert_close(found, expected)


def test_a_sparse_tensor_is_walked() -> None:
    model, x = nn.Linear(4, 1), torch.eye(4)
    engine = Engine(model, predict=lambda model, pose: model(pose.to_dense()))
    torch.testing.assert_close(engine.combine(x.to_sparse(), Mean()), engine.combine(x, Mean()))


def _graphs(*, grad: bool = False) -> list[Data]:
    found = []
    for atoms in (3, 5, 2, 4, 6):
        pairs = torch.combinations(torch.arange(atoms)).T
        found.append(Data(pos=torch.randn(atoms, 3, requires_grad=grad), edge_index=pairs))
    return found


@pytest.mark.parametrize("chunk_size", ["auto", 1, 2, Budget(9, lambda graph: graph.num_nodes)])
@pytest.mark.parametrize("grad", [False, True])
def test_a_batch_of_pyg_is_sliced_by_graphs(chunk_size: Any, grad: bool) -> None:
    batch = Batch.from_data_list(_graphs())
    batch.pos.requires_grad_(grad)
    for rule in (Min(2.0), Mean()):
        assert_matches_autograd(GraphNet(), batch, rule, chunk_size=chunk_size)


def test_a_list_of_pyg_needs_no_collate() -> None:
    model, graphs = GraphNet().double(), [graph.apply(_double) for graph in _graphs()]
    expected = Engine(model).combine(graphs, Min(2.0))
    found = Engine(model, chunk_size=2).combine(iter(graphs), Min(2.0))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(Engine(model).combine(Batch.from_data_list(graphs), Min(2.0)), found)


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def test_what_else_pyg_numbers_is_numbered_in_slices_too() -> None:
    graphs = [Data(x_s=torch.randn(k, 2), num_nodes=1) for k in (2, 3, 1)]
    batch = Batch.from_data_list(graphs, follow_batch=["x_s"])

    def predict(model: nn.Module, batch: Batch) -> Tensor:
        out = torch.zeros(batch.num_graphs, 1)
        return out.index_add(0, batch.x_s_batch, model(batch.x_s))[:, 0]

    model = nn.Linear(2, 1)
    found = [
        Engine(model, predict=predict, chunk_size=size).combine(batch, Mean()).per_pose
        for size in (3, 2)
    ]
    torch.testing.assert_close(*found)


def test_a_budget_asks_each_pose_of_a_batch() -> None:
    x, shift = torch.randn(5, FEATURES), torch.tensor([1.0, 2.0, 3.0, 1.0, 1.0])
    seen: list[int] = []
    engine = Engine(
        nn.Linear(FEATURES, 1),
        predict=lambda model, batch: seen.append(len(batch["x"])) or model(batch["x"]),
        chunk_size=Budget(4.0, lambda pose: pose["shift"]),
    )
    engine.combine({"x": x, "shift": shift}, Mean())
    assert seen == [2, 2, 1]


def test_few_small_poses_are_one_chunk() -> None:
    plan = Engine(MODELS["mlp"]()).plan(torch.randn(64, FEATURES), Mean())
    assert (plan.schedule, plan.chunks) == ("retain", 1)
    plan = Engine(MODELS["mlp"]()).plan({"x": torch.randn(64, 10_000)}, Mean())
    assert (plan.schedule, plan.poses, plan.chunks) == ("stream", 64, 11)


@pytest.mark.parametrize("rule", [Mean(), Min(2.0), Min(1000.0)])
def test_batches_of_many_chunks_match_autograd(rule: Combination) -> None:
    assert_matches_autograd(nn.Linear(9000, 1), torch.randn(9, 9000), rule, tolerance=1e-9)


def test_rows_are_gathered_from_a_batch() -> None:
    model = MODELS["mlp"]().double()
    x, shift = torch.randn(2, 5, FEATURES, dtype=torch.float64)
    expected = rows(model(x * shift), trainable(model))
    for chunk_size in ("auto", 2):
        engine = Engine(model, predict=_predicting("dict"), chunk_size=chunk_size)
        J = engine.gather({"x": x, "shift": shift})
        torch.testing.assert_close(J.matrix(), expected)


@pytest.mark.parametrize("name", MIXING)
@pytest.mark.parametrize("schedule", ["auto", *SCHEDULES])
def test_poses_that_mix_are_named_and_nothing_is_moved(name: str, schedule: str) -> None:
    make, predict, match = MIXING[name]
    model = make()
    engine = Engine(model, predict=predict)
    with untouched(model), pytest.raises(PosesMixError, match=match):
        engine.combine(TOKENS, Mean(), schedule=schedule)
    if "gate" not in name:
        with torch.no_grad(), pytest.raises(PosesMixError, match="depends on the poses"):
            engine.combine(TOKENS, Mean())


@pytest.mark.parametrize("name", sorted(MIXING.keys() - {"frozen"}))
def test_a_stated_chunk_size_accepts_that(name: str) -> None:
    make, predict, _ = MIXING[name]
    assert_matches_autograd(make(), TOKENS, Min(0.1), predict=predict, chunk_size=2, tolerance=1e-9)


@pytest.mark.filterwarnings("ignore:The predictions of different poses:UserWarning")
def test_gather_does_not_divide_them_either() -> None:
    make, predict, match = MIXING["an encoder"]
    model = make()
    with pytest.raises(PosesMixError, match=match):
        Engine(model, predict=predict).gather(TOKENS)
    assert Engine(model, predict=predict, chunk_size=6).gather(TOKENS).output_shape == (6,)


@pytest.mark.parametrize("poses", [TWINS, TOKENS[[0, 0, 0, 1, 0, 0]], TOKENS[:2]])
def test_two_poses_are_looked_at_that_differ(poses: Tensor) -> None:
    with pytest.raises(PosesMixError, match="together with it"):
        Engine(nn.Linear(8, 1), predict=centred).combine(poses, Mean())


@pytest.mark.parametrize("name", ["their number", "their place"])
def test_two_poses_are_enough_to_see_that_number_or_place_count(name: str) -> None:
    make, predict, match = MIXING[name]
    with pytest.raises(PosesMixError, match=match):
        Engine(make(), predict=predict).combine(TOKENS[:2], Mean())


@pytest.mark.parametrize("name", APART)
def test_to_look_changes_nothing(name: str) -> None:
    """Poses that stay apart do; random numbers, buffers and flags are those of one forward."""
    torch.manual_seed(3)
    model = APART[name]()
    torch.manual_seed(4)
    summed(model, TOKENS)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    drawn = torch.get_rng_state()

    torch.manual_seed(3)
    model = APART[name]()
    torch.manual_seed(4)
    Engine(model, predict=summed).combine(TOKENS, Mean())
    assert torch.equal(torch.get_rng_state(), drawn)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])


def test_to_look_leaves_graphs_of_the_user_alone() -> None:
    """Poses that were computed, and what predict takes from outside."""
    encoder, head = nn.Linear(3, FEATURES), MODELS["mlp"]()
    poses, shared = torch.tanh(encoder(torch.randn(5, 3))), torch.tanh(head[0].bias).sum()
    engine = Engine(encoder, head, predict=lambda encoder, head, x: head(x) * shared)
    prediction, _ = engine.combine(poses, Mean())
    parameters = [*encoder.parameters(), *head.parameters()]
    found = torch.autograd.grad(prediction, parameters, retain_graph=True)
    expected = torch.autograd.grad((head(poses) * shared).mean(), parameters)
    torch.testing.assert_close(found, expected)


def test_one_look_serves_all_batches_of_a_kind_and_mode() -> None:
    seen: list[int] = []
    model = nn.Sequential(nn.Linear(FEATURES, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).eval()
    engine = Engine(model, predict=lambda model, x: seen.append(len(x)) or model(x))
    engine.combine(torch.ones(6, FEATURES), Mean())  # poses that are alike show nothing
    assert seen == [6, 2, 2, 2, 2, 6]
    for m in (6, 1, 9):
        engine.combine(torch.randn(m, FEATURES), Mean())
    assert seen[6:] == [6, 2, 2, 2, 2, 6, 1, 9]
    model.train()
    with pytest.raises(PosesMixError, match=r"of: 0 \(at"):
        engine.combine(torch.randn(6, FEATURES), Mean())


def test_a_failure_while_looking_says_so() -> None:
    def predict(model: nn.Module, x: Tensor) -> Tensor:
        return model(x.reshape(6, -1))

    engine = Engine(nn.Linear(FEATURES, 1), predict=predict)
    with pytest.raises(RuntimeError, match="shape") as caught:
        engine.combine(torch.randn(6, FEATURES), Mean())
    assert any("while two poses were scored" in note for note in caught.value.__notes__)
