"""A table of words that is the weight behind them too: products of rows that are not formed."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812, as everybody calls it

from posegrad import Engine, PoseJacobian
from posegrad.jacobian import Block
from tests.reference import rows, trainable

F64 = torch.float64


class Tied(nn.Module):
    """Words to numbers for each word, `[m, T]` to `[m, T, V]`, by one table."""

    def __init__(self, words: int, width: int, padding: int | None) -> None:
        super().__init__()
        self.table = nn.Embedding(words, width, padding_idx=padding)
        self.inner = nn.Linear(width, width)

    def forward(self, words: Tensor) -> Tensor:
        return F.linear(self.inner(self.table(words)).tanh(), self.table.weight)


def _regular(model: Tied, m: int, length: int) -> Tensor:
    words = torch.randint(model.table.num_embeddings, (m, length))
    scores = model(words)
    losses = F.cross_entropy(scores.mT, words.roll(1, 1), reduction="none")
    return losses.sum(1)


def _ragged(model: Tied, m: int, length: int) -> Tensor:
    """Each pose has as many words as it likes; some have none."""
    owner = torch.randint(m, (m * length,))
    words = torch.randint(model.table.num_embeddings, owner.shape)
    losses = F.cross_entropy(model(words), words.flip(0), reduction="none")
    return losses.new_zeros(m).index_add(0, owner, losses)


def _transposed(model: Tied, m: int, length: int) -> Tensor:
    """The same table, by a product from the other side."""
    words = torch.randint(model.table.num_embeddings, (m, length))
    inner = model.inner(model.table(words))
    return ((inner @ model.table.weight.T).tanh() @ model.table.weight).square().sum((1, 2))


DRAFTS: dict[str, Callable[[Tied, int, int], Tensor]] = {
    "regular": _regular,
    "ragged": _ragged,
    "both sides": _transposed,
}


@pytest.fixture
def no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuses to form the rows of a table."""
    formed = Block.rows

    def refused(block: Block) -> Tensor:
        assert block.uses < 2, "the rows of the table were formed"
        return formed(block)

    monkeypatch.setattr(Block, "rows", refused)


def _jacobian(draft: str, model: Tied, m: int, length: int) -> tuple[PoseJacobian, Tensor]:
    output = DRAFTS[draft](model, m, length)
    expected = rows(output, trainable(model))
    return Engine(model).jacobian(output), expected


@pytest.mark.parametrize("draft", DRAFTS)
@given(
    seed=st.integers(0, 2**16),
    m=st.integers(2, 4),
    length=st.integers(1, 4),
    words=st.integers(2, 40),
    padding=st.sampled_from([None, 0]),
)
def test_a_tied_table_is_the_sum_of_its_uses(
    draft: str, seed: int, m: int, length: int, words: int, padding: int | None
) -> None:
    torch.manual_seed(seed)
    model = Tied(words, 3, padding).double()
    J, expected = _jacobian(draft, model, m, length)
    gram = expected @ expected.T
    torch.testing.assert_close(J.gramian(), gram, rtol=1e-9, atol=1e-12)
    J, expected = _jacobian(draft, model, m, length)
    torch.testing.assert_close(J.norms(), expected.norm(dim=1), rtol=1e-9, atol=1e-12)
    w = torch.randn(m, dtype=F64)
    found = torch.cat([one.reshape(-1) for one in J.combine(w).values()])
    torch.testing.assert_close(found, w @ expected, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("no_rows")
@pytest.mark.parametrize("draft", ["regular", "ragged"])
@pytest.mark.parametrize("ask", [PoseJacobian.norms, PoseJacobian.gramian])
def test_rows_of_a_tied_table_are_not_formed(
    draft: str, ask: Callable[[PoseJacobian], Tensor]
) -> None:
    torch.manual_seed(0)
    model = Tied(3000, 16, None).double()
    J, expected = _jacobian(draft, model, 12, 3)
    gram = expected @ expected.T
    norms = gram.diagonal().sqrt()
    torch.testing.assert_close(ask(J), norms if ask is PoseJacobian.norms else gram)


def test_uses_that_cancel_are_summed_in_float64() -> None:
    """What comes in by the table goes out by the weight: rows all but vanish."""
    torch.manual_seed(0)
    table = nn.Parameter(torch.randn(300, 8))
    model = nn.ParameterDict({"table": table})
    words, ways = torch.randint(300, (4, 2)), torch.randn(4, 2, 8)

    def output(table: Tensor) -> Tensor:
        ones = F.one_hot(words, 300).to(table)
        by_weight = (F.linear(ways.to(table), table) * ones).sum((1, 2))
        by_table = (F.embedding(words, table) * ways.to(table)).sum((1, 2))
        return by_table - (1 + 1e-3) * by_weight

    doubled = table.detach().double().requires_grad_()
    expected = rows(output(doubled), {"table": doubled})
    for _ in range(2):
        J = Engine(model).jacobian(output(table))
        torch.testing.assert_close(J.norms().double(), expected.norm(dim=1), rtol=1e-3, atol=0)
        J = Engine(model).jacobian(output(table))
        gram = (expected @ expected.T).diagonal()
        torch.testing.assert_close(J.gramian().diagonal().double(), gram, rtol=1e-3, atol=0)
