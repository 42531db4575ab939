"""Gradients that reach parameters past the output are noticed, wherever they enter."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from posegrad import CotangentBypassError, Engine
from posegrad.graph import _hearing
from tests import reference


class Residual(nn.Module):
    """Blocks with a skip, so that cotangents of two and of three consumers meet."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.last = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        hidden = [self.first(x)]
        for block in self.blocks:
            before = hidden[-1]
            hidden.append(before + torch.tanh(block(before)) * torch.sigmoid(before))
        return self.last(hidden[-1]).squeeze(1).square(), hidden


def _made() -> tuple[nn.Module, Tensor, list[Tensor]]:
    model = Residual().double()
    return (model, *model(torch.randn(6, 3, dtype=torch.float64)))


ENTRIES: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "the last layer's input": lambda hidden: hidden[-1].square().mean(),
    "a fork": lambda hidden: hidden[1].square().mean(),
    "the first layer's result": lambda hidden: hidden[0].sum(),
    "a single number": lambda hidden: hidden[2][3, 1],
    "broadcast": lambda hidden: hidden[1].mean(),
    "several at once": lambda hidden: sum(one.exp().sum() for one in hidden),
    "a view": lambda hidden: hidden[1].T[0].sum(),
}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("size", [1.0, 1e-9])
@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize("entry", ENTRIES)
def test_an_auxiliary_loss_is_noticed(
    entry: str, counts: bool, size: float, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not counts:  # as by a torch that adds up otherwise
        monkeypatch.setattr("posegrad.graph._listening.versions_count", lambda: False)
    model, losses, hidden = _made()
    heard = Engine(model).listen(losses)
    # Of two branches autograd takes the one first that was made last.
    side = size * ENTRIES[entry](hidden) if order == "before" else None
    total = losses.mean()
    total = total + (size * ENTRIES[entry](hidden) if side is None else side)
    total.backward(retain_graph=True)
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    with heard:
        total.backward()
    for p, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.equal(p.grad, gradient)
    with pytest.raises(CotangentBypassError, match=r"past the output.*\n.*auxiliary loss"):
        _ = heard.jacobian


def test_a_loss_of_another_output_of_the_same_operator_is_noticed() -> None:
    model = nn.Linear(3, 2).double()
    first, second = model(torch.randn(6, 3, dtype=torch.float64)).unbind(1)
    with Engine(model).listen(first) as heard:
        (first.sum() + second.sum()).backward()
    with pytest.raises(CotangentBypassError, match="Unbind"):
        _ = heard.jacobian


def test_the_state_of_an_lstm_is_noticed() -> None:
    model = nn.LSTM(3, 4, batch_first=True).double()
    states, (_, cell) = model(torch.randn(6, 5, 3, dtype=torch.float64))
    losses = states.square().sum((1, 2))
    with Engine(model).listen(losses) as heard:
        (losses.mean() + cell.sum()).backward()
    with pytest.raises(CotangentBypassError, match="past the output"):
        _ = heard.jacobian


WITHOUT: dict[str, Callable[[nn.Module, Tensor, list[Tensor]], None]] = {
    "weight decay": lambda model, losses, hidden: (
        losses.mean() + sum(p.square().sum() for p in model.parameters())
    ).backward(),
    "a backward of its own before": lambda model, losses, hidden: (
        hidden[1].sum().backward(retain_graph=True),
        losses.mean().backward(),
    ),
    "a backward of its own after": lambda model, losses, hidden: (
        losses.mean().backward(retain_graph=True),
        hidden[1].sum().backward(),
    ),
    "the output twice": lambda model, losses, hidden: (losses.mean() + losses[2] ** 2).backward(),
    "values alone": lambda model, losses, hidden: (
        losses.mean() + hidden[1].detach().sum()
    ).backward(),
}


@pytest.mark.parametrize("way", WITHOUT)
def test_what_does_not_pass_by_is_no_error(way: str) -> None:
    model, losses, hidden = _made()
    matrix = reference.rows(losses, reference.trainable(model))
    with Engine(model).listen(losses) as heard:
        WITHOUT[way](model, losses, hidden)
    torch.testing.assert_close(heard.jacobian.matrix(), matrix)


def test_a_part_of_a_backward_is_not_filled_up_by_another() -> None:
    model, losses, hidden = _made()
    with Engine(model).listen(losses) as heard:
        losses.mean().backward(retain_graph=True, inputs=[model.last.weight])
        hidden[1].sum().backward()
    with pytest.raises(CotangentBypassError, match="past the output"):
        _ = heard.jacobian


def test_an_auxiliary_loss_that_is_a_part_of_the_output_is_heard() -> None:
    model, losses, hidden = _made()
    both = losses + hidden[1].square().sum(1)
    matrix = reference.rows(both, reference.trainable(model))
    with Engine(model).listen(both) as heard:
        both.mean().backward()
    torch.testing.assert_close(heard.jacobian.matrix(), matrix)


def test_hooks_that_only_look_are_no_error() -> None:
    model, losses, hidden = _made()
    seen = []
    hidden[1].register_hook(seen.append)
    hidden[2].retain_grad()
    matrix = reference.rows(losses, reference.trainable(model))
    with Engine(model).listen(losses) as heard:
        losses.sum().backward()
    hidden[2].grad.zero_()
    torch.testing.assert_close(heard.jacobian.matrix(), matrix)
    assert seen


def test_this_torch_counts_gradients_by_versions() -> None:
    assert _hearing.versions_count()
