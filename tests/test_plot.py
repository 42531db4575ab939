"""Pictures hold the numbers they were given: laws on the data of the Axes."""

import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib as mpl
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor, nn

from posegrad import (
    Boltzmann,
    Engine,
    Mean,
    Median,
    Min,
    MissingExtraError,
    NonFiniteGradientError,
    NoPosesError,
    Plan,
    ShapeMismatchError,
    plot,
)
from tests.device import seeded
from tests.schedules import SCHEDULES

mpl.use("Agg")  # files, not windows


@pytest.fixture(autouse=True)
def _untouched() -> Iterator[None]:
    """A picture changes no setting of matplotlib, and leaves no figure with pyplot."""
    before = mpl.rcParams.copy()
    yield
    assert mpl.rcParams == before
    assert not plt.get_fignums()


def _gramian(m: int, seed: int = 0) -> Tensor:
    rows = torch.randn(m, 5, generator=seeded(seed))
    return rows @ rows.mT


def _weights(m: int, seed: int = 0) -> Tensor:
    return torch.randn(m, generator=seeded(seed))


def _plans(m: int) -> list[Plan]:
    engine = Engine(nn.Linear(3, 1))
    plans = [engine.plan(list(torch.zeros(m, 3)), Mean(), schedule=name) for name in SCHEDULES]
    return [plan for plan in plans if isinstance(plan, Plan)]


def _heights(ax: Axes) -> Tensor:
    return torch.tensor([bar.get_height() for bar in ax.patches], dtype=torch.float64)


def _poses(ax: Axes) -> list[int]:
    return [int(label.get_text()) for label in ax.get_xticklabels()]


PICTURES: dict[str, Callable[..., Axes]] = {
    "weights": lambda **o: plot.weights(_weights(9), **o),
    "groups": lambda **o: plot.weights(_weights(9), groups=[4, 5], **o),
    "gramian": lambda **o: plot.gramian(_gramian(9), **o),
    "large gramian": lambda **o: plot.gramian(_gramian(40), **o),
    "contributions": lambda **o: plot.contributions(_gramian(9), _weights(9), **o),
    "memory": lambda **o: plot.memory(_plans(9), **o),
}


@pytest.mark.parametrize("name", PICTURES)
def test_the_axes_given_are_those_drawn_into_and_returned(name: str) -> None:
    figure, axes = plt.subplots(1, 2)
    assert PICTURES[name](ax=axes[1]) is axes[1]
    assert not axes[0].has_data()
    assert axes[1].has_data()
    figure.canvas.draw()
    plt.close(figure)


@pytest.mark.parametrize("name", PICTURES)
def test_a_new_figure_can_be_drawn_and_is_not_kept_open(name: str) -> None:
    figure = PICTURES[name]().figure
    figure.canvas.draw()
    assert not plt.get_fignums()


@pytest.mark.parametrize("m", [1, 2, 32, 33, 200])
def test_bars_are_the_weights_heaviest_first(m: int) -> None:
    values = _weights(m)
    ax = plot.weights(values)
    torch.testing.assert_close(_heights(ax), values.double().sort(descending=True).values)
    if m <= 32:
        torch.testing.assert_close(_heights(ax), values.double()[_poses(ax)])


@pytest.mark.parametrize("groups", [[3, 4], torch.tensor([1, 0, 0, 1, 1, 0, 1])])
def test_each_group_has_its_own_heaviest_first_and_its_own_place(groups: Any) -> None:
    values, owners = _weights(7), [0] * 3 + [1] * 4
    ids = torch.tensor(owners) if isinstance(groups, list) else groups
    ax = plot.weights(values, groups=groups)
    torch.testing.assert_close(_heights(ax), values.double()[_poses(ax)])
    assert ids[_poses(ax)].tolist() == owners
    for part in _heights(ax).split([3, 4]):
        assert bool((part.diff() <= 0).all())
    gaps = torch.tensor([bar.get_x() for bar in ax.patches]).diff().round()
    assert gaps.tolist() == [1, 1, 2, 1, 1, 1]
    assert [text.get_text() for text in ax.texts] == ["group 0", "group 1"]


def test_weights_of_a_backward_and_of_a_rule_are_one_picture() -> None:
    model, poses = nn.Linear(3, 1), torch.randn(6, 3)
    predictions = model(poses).squeeze(1)
    J = Engine(model).jacobian(predictions)
    first = plot.weights(J.backward(Boltzmann(kT=1.0)))
    second = plot.weights(Boltzmann(kT=1.0).weights(predictions))
    torch.testing.assert_close(_heights(first), _heights(second))


def test_the_title_counts_weights_that_are_not_zero() -> None:
    ax = plot.weights(Min(scale=1000.0).weights(torch.tensor([-9.0, -7.0, -8.0])))
    assert ax.get_title(loc="left") == "1 of 3 poses carry weight"


@pytest.mark.parametrize("m", [1, 2, 12, 13, 40])
def test_the_map_is_the_cosines(m: int) -> None:
    rows = torch.randn(m, 6, dtype=torch.float64)
    ax = plot.gramian(rows @ rows.mT)
    shown = torch.tensor(ax.images[0].get_array().filled())
    expected = torch.cosine_similarity(rows[:, None], rows[None], dim=2)
    torch.testing.assert_close(shown, expected)
    assert ax.images[0].norm.vmin == -ax.images[0].norm.vmax == -1.0  # centred on zero
    norms = [bar.get_width() for bar in ax.child_axes[0].patches]
    torch.testing.assert_close(torch.tensor(norms, dtype=rows.dtype), rows.norm(dim=1))


def test_cells_below_zero_are_marked_where_no_number_is_written() -> None:
    G = _gramian(20)
    (marks,) = plot.gramian(G).collections
    found = {(int(row), int(column)) for column, row in marks.get_offsets()}
    assert found == {(int(row), int(column)) for row, column in (G < 0).nonzero()}
    assert len(plot.gramian(_gramian(5)).texts) == 25


def test_a_gradient_of_zero_has_no_direction() -> None:
    ax = plot.gramian(torch.tensor([[4.0, 0.0], [0.0, 0.0]]))
    assert ax.images[0].get_array().mask.tolist() == [[False, True], [True, True]]
    assert [text.get_text() for text in ax.texts] == ["1.0"]


@pytest.mark.parametrize("seed", range(5))
def test_contributions_are_lengths_along_the_step_and_sum_to_one(seed: int) -> None:
    rows, w = torch.randn(11, 6, dtype=torch.float64), _weights(11, seed).double()
    step = w @ rows
    expected = w * (rows @ step) / step.square().sum()
    ax = plot.contributions(rows @ rows.mT, w)
    torch.testing.assert_close(_heights(ax), expected[_poses(ax)])
    torch.testing.assert_close(_heights(ax).sum(), torch.ones((), dtype=torch.float64))
    assert bool((_heights(ax).diff() <= 0).all())
    hatched = [bar.get_hatch() is not None for bar in ax.patches]
    assert hatched == (_heights(ax) < 0).tolist()


def test_a_share_below_zero_moves_the_wrong_way() -> None:
    """The derivation in the docstring: w_i y_i changes by -eta c_i |g|^2."""
    rows = torch.tensor([[1.0, 0.2], [-0.4, 0.1]], dtype=torch.float64)
    w, eta = torch.tensor([1.0, 0.5], dtype=torch.float64), 1e-3
    step = w @ rows
    ax = plot.contributions(rows @ rows.mT, w)
    change = w * (rows @ (-eta * step))
    shares = torch.empty(2, dtype=torch.float64)
    shares[_poses(ax)] = _heights(ax)
    torch.testing.assert_close(change, -eta * shares * step.square().sum())
    assert float(shares[1]) < 0 < float(change[1])


def test_widths_are_the_bytes_of_the_plans() -> None:
    plans = _plans(64)
    ax = plot.memory(plans)
    assert [bar.get_width() for bar in ax.patches] == [plan.bytes_held or 0 for plan in plans]
    assert [label.get_text() for label in ax.get_yticklabels()] == list(SCHEDULES)
    said = [text.get_text() for text in ax.texts]
    assert said[0].startswith("64 graphs;")  # whose size a plan does not know
    assert said[1].startswith("1 KiB + 1 graph;")
    assert len(plot.memory(plans[2]).patches) == 1


NAN = torch.tensor([1.0, torch.nan, 2.0])
BAD: dict[str, tuple[Callable[[], Axes], type[Exception], str]] = {
    "no weights": (lambda: plot.weights(None), TypeError, "An Aggregation such as Median"),
    "vectors": (lambda: plot.weights(torch.ones(3, 2)), ShapeMismatchError, r"3, 2\].*\n.*\[:, 0"),
    "none": (lambda: plot.weights(torch.ones(0)), NoPosesError, "no weights"),
    "nan": (lambda: plot.weights(NAN), NonFiniteGradientError, "1 of 3 weights .* numbers 1"),
    "groups": (lambda: plot.weights(torch.ones(3), groups=[2, 2]), ShapeMismatchError, "4 poses"),
    "an empty group": (lambda: plot.weights(torch.ones(3), groups=[3, 0]), NoPosesError, "1"),
    "no square": (lambda: plot.gramian(torch.ones(2, 3)), ShapeMismatchError, r"shape \[2, 3\]"),
    "blocks": (lambda: plot.gramian(torch.ones(2, 2, 2, 2)), ShapeMismatchError, r"\[m, m\]"),
    "empty": (lambda: plot.gramian(torch.ones(0, 0)), NoPosesError, "empty"),
    "nan rows": (
        lambda: plot.gramian(torch.full((2, 2), torch.nan)), NonFiniteGradientError, "numbers 0, 1",
    ),
    "no symmetry": (
        lambda: plot.gramian(torch.tensor([[1.0, 2.0], [0.0, 1.0]])), ValueError, "no symmetry",
    ),
    "negative": (lambda: plot.gramian(-torch.eye(3)), ValueError, "squares for poses 0, 1, 2"),
    "lengths": (
        lambda: plot.contributions(torch.eye(3), torch.ones(2)), ShapeMismatchError, "2 weights",
    ),
    "no step": (lambda: plot.contributions(torch.eye(3), torch.zeros(3)), ValueError, "is zero"),
    "cancelling": (
        lambda: plot.contributions(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), torch.ones(2)),
        ValueError,
        "poses cancel",
    ),
    "no plans": (lambda: plot.memory([]), NoPosesError, "no plans"),
    "a Jacobian": (lambda: plot.gramian(_jacobian()), TypeError, r"Pass J\.gramian\(\)"),
    "a reading alone": (lambda: plot.memory(_reading()), TypeError, "is a ReadingPlan"),
    "a reading": (lambda: plot.memory([_reading()]), TypeError, "is a ReadingPlan"),
}  # fmt: skip


def _jacobian() -> Any:
    model = nn.Linear(3, 1)
    return Engine(model).jacobian(model(torch.ones(2, 3)).squeeze(1))


def _reading() -> Any:
    model = nn.Linear(3, 1)
    return Engine(model).plan(model(torch.ones(2, 3)), Mean())


@pytest.mark.parametrize("name", BAD)
def test_errors_say_what_was_found(name: str) -> None:
    draw, error, match = BAD[name]
    with pytest.raises(error, match=match):
        draw()


def test_an_aggregation_has_no_weights_to_draw() -> None:
    model = nn.Linear(3, 1)
    J = Engine(model).jacobian(model(torch.randn(5, 3)).squeeze(1))
    with pytest.raises(TypeError, match="backward returns None"):
        plot.weights(J.backward(Median()))


def test_without_matplotlib_the_pip_line_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "posegrad.plot")
    with pytest.raises(MissingExtraError, match=r"Run: pip install 'posegrad\[plot\]'"):
        importlib.import_module("posegrad.plot")
