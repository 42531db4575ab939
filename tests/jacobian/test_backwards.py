"""A Jacobian says how many backwards it took, a plan how many it will take: those that are run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from posegrad import Engine, Mean
from posegrad.graph import _pulled, _reading, _verify, _vjp
from posegrad.graph._operators import OPERATORS
from tests import reference
from tests.models import Passed

M = 6


def _network(middle: Callable[[Tensor], Tensor], width: int = 1) -> nn.Module:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, width)

        def forward(self, x: Tensor) -> Tensor:
            made = self.last(middle(self.first(x)))
            return made.squeeze(1) if width == 1 else made

    return Network().double()


class Weighed(nn.Module):
    """A weight that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.rand(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.cumprod(self.raw, 0)


def _mixed(h: Tensor) -> Tensor:
    return h.tanh() - h.mean(0)


LOST = "poses cannot be followed through"
KINDS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "inferred": (lambda: _network(torch.tanh), "1 backward to the activations"),
    "components": (
        lambda: _network(torch.tanh, 2),
        "2 backwards for the components of the output",
    ),
    "lost": (
        lambda: _network(Passed.apply),
        f"3 backwards: 1 to the activations, 2 to find whose rows are whose; {LOST} Passed",
    ),
    "lost components": (
        lambda: _network(Passed.apply, 2),
        "9 backwards: 1 to the activations, 2 for the components of the output, 6 to find whose "
        f"rows are whose; {LOST} Passed",
    ),
    "mixing": (
        lambda: _network(_mixed),
        f"7 backwards: 1 to the activations, 6 for rows behind computed tensors; {LOST} Sub",
    ),
    "computed": (
        Weighed,
        f"7 backwards: 1 to the activations, 6 for rows behind computed tensors; {LOST} Mv",
    ),
}


@contextmanager
def _counted() -> Iterator[list[int]]:
    """The backwards that are run; a row is one."""
    counts: list[int] = []

    def counting(function: Any, count: Callable[..., int]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            counts.append(count(*args))
            return function(*args, **kwargs)

        return counted

    backward, rows = _vjp.backward_to, counting(_vjp.rows_of_graph, lambda *args: args[3])
    with (
        patch.object(_vjp, "backward_to", counting(backward, lambda *_: 1)),
        patch.object(_reading, "rows_of_graph", rows),
        patch.object(_pulled, "rows_of_graph", rows),
        patch.object(_verify.Reference, "of", counting(_verify.Reference.of, lambda *_: 1)),
    ):
        yield counts


@pytest.mark.filterwarnings("ignore:The predictions of different poses depend")
@pytest.mark.parametrize("check", ["first", "always", "never"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_report_and_a_plan_count_what_is_run(kind: str, check: str) -> None:
    torch.manual_seed(0)
    make, text = KINDS[kind]
    model = make()
    engine = Engine(model, check=check)
    for call in range(4):
        output = model(torch.randn(M, 3, dtype=torch.float64))
        expected = reference.rows(output, reference.trainable(model))
        plan = str(engine.plan(output, torch.ones_like(output))).splitlines()[0]
        with _counted() as counts:
            J = engine.jacobian(output)
            told = J.report().splitlines()[1]
        torch.testing.assert_close(J.matrix(), expected)
        assert told.startswith(f"{sum(counts)} backward")
        if call:
            assert plan.removeprefix(f"{output.numel()} rows, ") == told
            assert (told == text) == (check != "always")


@pytest.mark.parametrize("kind", ["inferred", "components", "lost", "lost components"])
def test_a_plan_tells_what_later_calls_take_before_there_was_one(kind: str) -> None:
    make, text = KINDS[kind]
    model = make()
    output = model(torch.randn(M, 3, dtype=torch.float64))
    plan = str(Engine(model).plan(output, torch.ones_like(output))).splitlines()[0]
    first = f"{output.numel()} rows, {text}; more in a first call, which compares"
    mixing = f"; {output.numel()} more where poses mix" if kind.startswith("lost") else ""
    assert plan == first + mixing


def test_an_operator_that_was_probed_alone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    row = OPERATORS["SoftmaxBackward0"]
    monkeypatch.setitem(OPERATORS, "SoftmaxBackward0", row._replace(told=("no_such_name",)))
    model = _network(lambda h: h.softmax(1))
    output = model(torch.randn(M, 3, dtype=torch.float64))
    assert "1 backward to the activations; probed alone: Softmax" in str(
        Engine(model).plan(output, Mean())
    )
    told = Engine(model, check="never").jacobian(output).report().splitlines()[1]
    assert told == "1 backward to the activations; probed alone: Softmax"


def test_chunks_add_up() -> None:
    model = _network(torch.tanh)
    J = Engine(model, chunk_size=2, check="never").gather(torch.randn(M, 3).double())
    assert J.report().splitlines()[1] == "3 backwards to the activations"


def test_float16_counts_what_finding_a_scale_takes() -> None:
    model = _network(torch.tanh).half()
    engine = Engine(model)
    for count in ("1 ", "1 ", "1 "):
        told = engine.jacobian(model(torch.randn(M, 3).half())).report().splitlines()[1]
        assert told.startswith(count) or "to find a scale for float16" in told
    assert told == "1 backward to the activations"


def test_the_whole_graph_counts_by_rows() -> None:
    model = _network(torch.tanh)
    output = model(torch.randn(M, 3, dtype=torch.float64))
    engine = Engine(model, batch_dim=None, check="never")
    assert "6 backwards for rows of the whole graph" in str(engine.plan(output, Mean()))
    assert engine.jacobian(output).report().splitlines()[1].startswith("6 backwards for rows")


def test_a_few_losses_put_together_count_by_rows() -> None:
    model = _network(torch.tanh)
    scores = model(torch.randn(M, 3, dtype=torch.float64))
    output = torch.stack([scores.square().mean(), scores.abs().mean()])
    plan = str(Engine(model).plan(output, Mean())).splitlines()[0]
    J = Engine(model, check="never").jacobian(output)
    assert (
        plan
        == f"2 rows, {J.report().splitlines()[1]}"
        == "2 rows, " + ("2 backwards for rows of the whole graph")
    )
