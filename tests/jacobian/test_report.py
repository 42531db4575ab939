"""Tables of a Jacobian: exact where lines are folded, honest about sizes, uses and reasons."""

import re

import pytest
import torch
from torch import Tensor, nn

from posegrad import Engine, PoseJacobian
from tests import reference
from tests.models import Passed


def _jacobian(model: nn.Module, batch: Tensor, **options: object) -> PoseJacobian:
    return Engine(model, **options).jacobian(model(batch).reshape(len(batch)))


def _rows(text: str) -> dict[str, list[str]]:
    """The cells of every parameter."""
    lines = [re.split(r"  +", line) for line in text.splitlines()[3:]]
    return {name: cells for name, *cells in lines}


@pytest.mark.parametrize(
    ("count", "text"),
    [(8, "384 B"), (2**10, "48 KiB"), (5 * 2**10, "240 KiB"), (2**16, "3 MiB")],
)
def test_sizes_have_three_digits_and_a_unit(count: int, text: str) -> None:
    J = _jacobian(nn.Linear(11, 1), torch.randn(count, 11))
    assert _rows(J.report())["weight"][2] == text, "11 inputs and a cotangent in float32, each"


class Named(nn.Module):
    """Numbers under given names, each used so many times."""

    def __init__(self, uses: dict[str, int]) -> None:
        super().__init__()
        self.uses = uses
        for name in uses:
            *path, last = name.split(".")
            part: nn.Module = self
            for step in path:
                if not hasattr(part, step):
                    part.add_module(step, nn.Module())
                part = getattr(part, step)
            part.register_parameter(last, nn.Parameter(torch.ones(())))

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(())
        for name, count in self.uses.items():
            for _ in range(count):
                total = total + x * self.get_parameter(name)
        return total


def _folded(uses: dict[str, int]) -> list[str]:
    return list(_rows(_jacobian(Named(uses), torch.randn(3)).report()))


@pytest.mark.parametrize(
    ("numbers", "name"),
    [
        (range(4), "{0-3}"),
        ((0, 2, 4, 6), "{0-6 by 2}"),
        ((0, 1, 2, 4, 5, 9), "{0-2,4-5,9}"),
        ((10, 9, 8, 7), "{10,9,8,7}"),
    ],
)
def test_folded_numbers_are_those_of_the_lines(numbers: range, name: str) -> None:
    uses = {f"layers.{i}.weight": 1 for i in numbers}
    assert _folded(uses) == [f"layers.{name}.weight (x {len(numbers)})"]


def test_lines_that_differ_are_not_folded() -> None:
    uses = {f"layers.{i}.weight": 1 + i // 4 for i in range(7)}
    assert _folded(uses) == [
        "layers.{0-3}.weight (x 4)",
        *(f"layers.{i}.weight" for i in (4, 5, 6)),
    ]


def test_folds_within_folds() -> None:
    uses = {f"a.{i}.b.{j}": 1 for i in range(5) for j in range(6)}
    assert _folded(uses) == ["a.{0-4}.b.{0-5} (x 30)"]


def test_a_deep_model_takes_a_line_for_each_kind_of_parameter() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(
        nn.TransformerEncoder(layer, 20, enable_nested_tensor=False), nn.Flatten(), nn.Linear(24, 1)
    )
    rows = _rows(_jacobian(model, torch.randn(3, 3, 8)).report())
    assert len(rows) == 12 + 2
    assert "0.layers.{0-19}.linear1.weight (x 20)" in rows


def test_what_parameters_share_is_held_once() -> None:
    model, batch = nn.Linear(8, 4), torch.randn(16, 8)
    J = Engine(model).jacobian(model(batch).square().sum(1))
    own = "768 B"  # 16 (8 + 4) 4: the inputs, and the cotangents that weight and bias share
    assert J.report().startswith(f"16 rows of 36 numbers, held in {own}; as a matrix")
    assert _rows(J.report())["weight"][2] == own


class Tied(nn.Module):
    """A weight with two uses, one behind an operator without a closed form, and one unused."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.centre = nn.Parameter(torch.ones(1, 1, 3))
        self.unused = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.table(x)
        far = torch.cdist(rows.flatten(0, 1)[None], self.centre).reshape(*x.shape, 1)
        return ((rows * far) @ self.table.weight.T).sum((1, 2))


def test_uses_and_reasons_are_told() -> None:
    rows = _rows(_jacobian(Tied(), torch.randint(5, (4, 6))).report())
    assert rows["table.weight"][0] == "2"
    assert rows["table.weight"][3] == "closed form (Embedding) + closed form (Linear)"
    assert rows["centre"] == [
        "1",
        "rows",
        "48 B",
        "operator vjp (Cdist): no closed form of this use",
    ]
    assert rows["unused.weight"] == ["0", "unused"]


@pytest.mark.parametrize("form", ["factors", "dense", "auto"])
def test_uses_do_not_grow_with_chunks_nor_shrink_with_the_form(form: str) -> None:
    J = Engine(Tied(), chunk_size=2).gather(torch.randint(5, (6, 6)), form=form)
    J.gramian()
    rows = _rows(J.report())
    assert (rows["table.weight"][0], rows["centre"][0], rows["unused.bias"][0]) == ("2", "1", "0")
    assert rows["centre"][1] == "rows"


@pytest.mark.filterwarnings("ignore:The predictions of different poses depend")
def test_poses_that_mix_are_the_reason() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1))
    rows = _rows(_jacobian(model, torch.randn(6, 4)).report())
    assert rows["0.weight"][-1] == "operator vjp (NativeBatchNorm): poses mix"
    centred = nn.Linear(4, 1)
    output = centred(torch.randn(6, 4)).squeeze(1)
    rows = _rows(Engine(centred).jacobian(output - output.mean()).report())
    assert rows["weight"][-1].endswith(": poses mix")


class Gated(nn.Module):
    """Parameters behind a gate: of a closed form in batches, of none, computed first."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(()))
        self.mixed = nn.Parameter(torch.rand(4, 4))
        self.centre = nn.Parameter(torch.rand(1, 1, 4))
        self.raw = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum("bi,ij->bj", Passed.apply(x), self.mixed)
        h = torch.cdist(h[None], self.centre)[0] * nn.functional.softplus(self.raw)
        return (x + self.gate * Passed.apply(h)).sum(1)


def test_a_closed_gate_is_no_lack_of_a_form() -> None:
    model, x = Gated().double(), torch.randn(5, 4, dtype=torch.float64)
    engine = Engine(model)
    J = engine.jacobian(model(x))
    rows = _rows(J.report())
    assert rows["mixed"][-1].startswith("closed form")
    assert rows["centre"][-1] == "operator vjp (Cdist): no gradient flows"
    assert rows["raw"][-1].startswith("closed form")
    w = torch.randn(5, dtype=torch.float64)
    for name in ("mixed", "centre", "raw"):
        parameter = model.get_parameter(name)
        torch.testing.assert_close(J.block(name), torch.zeros(5, *parameter.shape).double())
        torch.testing.assert_close(J.combine(w)[name], torch.zeros_like(parameter))

    nn.init.ones_(model.gate)
    output = model(x)
    J = engine.jacobian(output, retain_graph=True)
    torch.testing.assert_close(J.matrix(), reference.rows(output, reference.trainable(model)))
    rows = _rows(J.report())
    assert rows["centre"][-1] == "operator vjp (Cdist): no closed form of this use"
    assert rows["raw"][-1] == "closed form (Elementwise) of a computed weight"


def test_rows_that_were_asked_for_say_so() -> None:
    rows = _rows(_jacobian(nn.Linear(4, 1), torch.randn(6, 4), batch_dim=None).report())
    assert rows["weight"] == ["all", "rows", "96 B", "rows of the whole graph: batch_dim=None"]


@pytest.mark.filterwarnings("ignore:The per-pose gradients read off the graph")
def test_a_path_that_disagreed_says_so() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    hidden = model[1](model[0](torch.randn(4, 3)))
    hidden.register_hook(lambda cotangent: cotangent.flip(0))
    rows = _rows(Engine(model).jacobian(model[2](hidden).squeeze(1)).report())
    assert rows["0.weight"][-1] == "rows of the whole graph: disagreed with autograd"
    assert rows["2.weight"][-1] == "closed form (Linear)"


def test_a_plan_of_a_reading_folds_too() -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(30)), nn.Linear(3, 1))
    plan = str(Engine(model).plan(model(torch.randn(5, 3)).squeeze(1), lambda p: p.mean(0)))
    assert len(plan.splitlines()) == 2 + 2
    assert "{0-30}.weight (x 31)  1     closed form (Addmm)" in plan
