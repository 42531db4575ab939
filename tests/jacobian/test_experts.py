"""Mixtures of experts: one operator for the rows of all experts, weights in a transpose."""

import pytest
import torch
from torch import Tensor, nn

from posegrad import Clip, Engine
from tests.reference import gramian, rows, trainable


class Experts(nn.Module):
    """Tokens sorted by their expert, as transformers does it.

    Args:
        flipped: Whether the weights are held transposed.
        tail: How many rows belong to no expert.
    """

    def __init__(self, *, flipped: bool, tail: int = 0) -> None:
        super().__init__()
        shape = (3, 8, 4) if flipped else (3, 4, 8)
        self.weight = nn.Parameter(torch.randn(shape))
        self.first, self.last = nn.Linear(2, 4), nn.Linear(8, 1)
        self.flipped, self.tail = flipped, tail

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        tokens = self.first(x).tanh().reshape(-1, 4)
        order = expert.argsort()[: len(expert) - self.tail]
        ends = torch.bincount(expert[order], minlength=3).cumsum(0).to(torch.int32)
        weight = self.weight.mT if self.flipped else self.weight
        found = torch.nn.functional.grouped_mm(tokens[order], weight, offs=ends)
        mixed = torch.zeros(len(tokens), 8).index_add(0, order, found)
        scores: Tensor = self.last(mixed.tanh()).reshape(len(x), -1).sum(1)
        return scores


@pytest.mark.parametrize("flipped", [True, False])
@pytest.mark.parametrize("tokens", [1, 4, 40])
def test_rows_of_experts(tokens: int, *, flipped: bool) -> None:
    model = Experts(flipped=flipped)
    engine = Engine(model)
    for _ in range(3):
        expert = torch.randint(3, (6 * tokens,)).clamp(max=2)
        output = model(torch.randn(6, tokens, 2), expert)
        expected = rows(output, trainable(model))
        J = engine.jacobian(output)
        torch.testing.assert_close(J.norms(), expected.norm(dim=1), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            J.gramian(), gramian(expected, output.shape), atol=1e-3, rtol=1e-3
        )
        torch.testing.assert_close(J.matrix(), expected, atol=1e-5, rtol=1e-4)
    assert J.paths["weight"] == ("closed form (GroupedLinear)",)


def test_an_expert_without_tokens_and_poses_without_experts() -> None:
    model = Experts(flipped=True, tail=5)
    expert = torch.tensor([0, 0, 2, 0, 2, 0, 2, 2, 0, 0, 0, 2])
    output = model(torch.randn(6, 2, 2), expert)
    expected = rows(output, trainable(model))
    J = Engine(model).jacobian(output)
    torch.testing.assert_close(J.norms(), expected.norm(dim=1))
    torch.testing.assert_close(J.matrix(), expected)


def test_clipping_experts() -> None:
    model = Experts(flipped=True)
    output = model(torch.randn(6, 4, 2), torch.randint(3, (24,)))
    matrix = rows(output, trainable(model))
    weights = (0.1 / matrix.norm(dim=1)).clamp(max=1)
    Engine(model).backward(output, Clip(0.1))
    found = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(found, weights @ matrix)
