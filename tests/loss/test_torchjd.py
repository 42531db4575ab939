"""A trunk in the engine and heads beside it: TorchJD's `mtl_backward`, in one line."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchjd import aggregation as theirs
from torchjd.autojac import jac_to_grad, mtl_backward

from posegrad import Engine
from tests.loss.setting import drawn, taken

TRUNKS: dict[str, Callable[[], nn.Module]] = {
    "MLP": lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh()),
    "batch norm": lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh()),
    "attention": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 5)),
        nn.Linear(5, 4),
        nn.TransformerEncoderLayer(4, 2, 8, 0.0),
        nn.Flatten(),
    ),
}
RULES: dict[str, Callable[[], theirs.Aggregator]] = {
    "UPGrad": theirs.UPGrad,
    "MGDA": theirs.MGDA,
    "ConFIG": theirs.ConFIG,
    "Mean": theirs.Mean,
    "TrimmedMean": lambda: theirs.TrimmedMean(1),
}
POSES = drawn(7, 5)
TARGETS = drawn(3, 7, seed=1)


def _network(trunk: str) -> tuple[nn.Module, nn.ModuleList]:
    torch.manual_seed(0)
    heads = nn.ModuleList(nn.Linear(4, 1) for _ in TARGETS)
    return TRUNKS[trunk]().double(), heads.double()


def _task_losses(features: Tensor, heads: nn.ModuleList) -> list[Tensor]:
    return [
        (head(features).squeeze(1) - y).square().mean()
        for head, y in zip(heads, TARGETS, strict=True)
    ]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("trunk", TRUNKS)
def test_it_is_their_mtl_backward(trunk: str, rule: str) -> None:
    body, heads = _network(trunk)
    features = body(POSES)
    mtl_backward(_task_losses(features, heads), features, parallel_chunk_size=1)
    jac_to_grad(body.parameters(), RULES[rule]())
    expected = taken([*body.parameters(), *heads.parameters()])

    engine = Engine(body)
    for _ in range(2):  # the second graph is read by what the first one taught
        task_losses = _task_losses(body(POSES), heads)
        engine.loss(torch.stack(task_losses), RULES[rule]()).backward()
        found = taken([*body.parameters(), *heads.parameters()])
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_tasks_with_poses_of_their_own() -> None:
    body, heads = _network("MLP")
    engine = Engine(body)

    def own(number: int) -> Tensor:
        return heads[number](body(POSES[2 * number : 2 * number + 3])).square().mean()

    rows = []
    for number in range(3):
        own(number).backward()
        rows.append(taken([*body.parameters(), *heads.parameters()]))
    matrix = torch.stack([torch.cat([g.flatten() for g in row[:4]]) for row in rows])
    expected = theirs.UPGrad()(matrix)
    engine.loss(torch.stack([own(0), own(1), own(2)]), theirs.UPGrad()).backward()
    found = torch.cat([g.flatten() for g in taken(body.parameters())])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    of_heads = [taken(head.parameters()) for head in heads]
    for number, gradients in enumerate(of_heads):
        plain = rows[number][4 + 2 * number : 6 + 2 * number]
        torch.testing.assert_close(gradients, plain, rtol=1e-12, atol=1e-12)


def test_a_task_without_a_graph_has_a_row_of_zeros() -> None:
    body, heads = _network("MLP")
    engine = Engine(body)

    def tasks() -> Tensor:
        one, two, _ = _task_losses(body(POSES), heads)
        return torch.stack([one, torch.tensor(3.0, dtype=torch.float64), two])

    rows = engine.jacobian(tasks()).matrix()
    assert not rows[1].any()
    for i, number in ((0, 0), (2, 1)):
        _task_losses(body(POSES), heads)[number].backward()
        plain = torch.cat([g.flatten() for g in taken(body.parameters())])
        torch.testing.assert_close(rows[i], plain, rtol=1e-12, atol=1e-12)


def test_hooks_of_the_stack_are_seen() -> None:
    body, heads = _network("MLP")
    stacked = torch.stack(_task_losses(body(POSES), heads))
    stacked.register_hook(lambda gradient: 2 * gradient)
    plain = Engine(body).jacobian(torch.stack(_task_losses(body(POSES), heads))).matrix()
    torch.testing.assert_close(Engine(body).jacobian(stacked).matrix(), 2 * plain)
