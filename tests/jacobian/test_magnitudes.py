"""Every row is right beside its own size, however much larger those of other poses are."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from posegrad import Clip, Engine
from tests.drawing import times
from tests.reference import rows, trainable

COUNT = 6


class Scored(nn.Module):
    """Poses in dimension 1, through an operator that is not followed; a score scaled by pose."""

    def __init__(self, mixed: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.lift, self.head = nn.Linear(4, 5), nn.Linear(5, 1)
        self.shift = nn.Parameter(torch.randn(3, 1, 5))
        self.mixed = mixed

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        hidden = (self.lift(x) + self.shift).tanh()
        return self.head(self.mixed(hidden).sum(0)).squeeze(1) * scale


MIXED: dict[str, Callable[[Tensor], Tensor]] = {
    "turned over": lambda x: torch.flip(x, [0]),
    "permuted": lambda x: torch.flip(x, [1]),
    "centred": lambda x: x - x.mean(1, keepdim=True),
    "sorted": lambda x: x.sort(1).values,
    "shared": lambda x: x.softmax(1),
    "cumulated": lambda x: x.cumsum(1),
}
exponents = st.sampled_from([-30, -17, -8, 0, 0, 0, 8, 17, 30])


def _assert_each_row(found: Tensor, expected: Tensor, tolerance: float) -> None:
    errors = (found.double() - expected.double()).norm(dim=1)
    sizes = expected.double().norm(dim=1)
    assert bool((errors <= tolerance * sizes).all()), errors / sizes


@pytest.mark.filterwarnings("ignore:The predictions of different poses depend")
@pytest.mark.parametrize("check", ["first", "never"])
@pytest.mark.parametrize("name", MIXED)
@times(0.5)
@given(
    powers=st.lists(exponents, min_size=COUNT, max_size=COUNT), masked=st.sets(st.integers(0, 5))
)
def test_a_row_is_right_beside_rows_of_any_size(
    name: str, check: str, powers: list[int], masked: set[int]
) -> None:
    torch.manual_seed(0)
    model = Scored(MIXED[name]).double()
    scale = torch.tensor([0.0 if i in masked else 10.0**p for i, p in enumerate(powers)])
    output = model(torch.randn(3, COUNT, 4).double(), scale.double())
    expected = rows(output, trainable(model))
    J = Engine(model, check=check).jacobian(output)
    # What all poses add up to is larger than a mixed row by as much as scores differ.
    _assert_each_row(J.matrix(), expected, 1e-9)
    torch.testing.assert_close(J.norms(), expected.norm(dim=1), rtol=1e-9, atol=0)


def test_one_clash_does_not_erase_the_other_poses_in_float32() -> None:
    model = Scored(MIXED["turned over"])
    scale = torch.ones(COUNT)
    scale[0] = 1e17
    output = model(torch.randn(3, COUNT, 4), scale)
    expected = rows(output, trainable(model)).double()
    weights = 1 / expected.norm(dim=1).clamp(min=0.5)
    Engine(model).backward(output, Clip(0.5))
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(found.double(), 0.5 * weights @ expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("power", [-35, -22, 19, 30])
def test_norms_hold_where_float32_cannot_hold_their_squares(power: int) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    scale = torch.tensor([10.0**power, 1.0, 0.0, -1.0, 1.0])
    output = model(torch.randn(5, 4)).squeeze(1) * scale
    expected = rows(output, trainable(model)).double().norm(dim=1)
    found = Engine(model).jacobian(output).norms()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


class Distances(nn.Module):
    """Distances to parameters: torch's rule for this backward under vmap is wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x, self.centres).sum((1, 2))


@pytest.mark.parametrize("check", ["first", "never"])
@pytest.mark.parametrize("batch_dim", ["auto", None])
@given(
    masked=st.sets(st.integers(0, 4)),
    copies=st.dictionaries(st.integers(1, 4), st.just(0), max_size=4),
    power=exponents,
)
def test_rows_of_a_wrong_vmap_rule_are_not_believed(
    check: str, batch_dim: str | None, masked: set[int], copies: dict[int, int], power: int
) -> None:
    torch.manual_seed(0)
    model = Distances().double()
    x = torch.randn(5, 2, 4).double()
    for copy, original in copies.items():
        x[copy] = x[original]
    scale = torch.tensor([float(i not in masked) for i in range(5)])
    scale[2] *= 10.0**power
    output = model(x) * scale
    expected = rows(output, trainable(model))
    _assert_each_row(
        Engine(model, check=check, batch_dim=batch_dim).jacobian(output).matrix(), expected, 1e-9
    )


@pytest.mark.filterwarnings("ignore:The predictions of different poses depend")
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("huge", [0, 4])
def test_rounding_of_one_pose_is_not_given_to_another(seed: int, huge: int) -> None:
    """Equal tokens: attention does not matter, and what is left of its gradient is rounding."""
    torch.manual_seed(seed)
    model = nn.ParameterDict(
        {"q": torch.randn(2, 2), "k": torch.randn(1, 2), "norm": torch.randn(2, 2)}
        | {"head": torch.randn(2, 3)}
    ).double()
    x, scale = torch.ones(5, 3, 2).double(), torch.ones(5).double()
    scale[huge] = 1e30
    query = x @ (model["q"] / (1 + torch.linalg.svdvals(torch.eye(2) + model["norm"])[0]))
    attention = torch.bmm(query, (x @ model["k"].repeat(2, 1)).mT).softmax(-1)
    hidden = nn.functional.silu(torch.einsum("mst,mtd->msd", attention, x)).amax(1)
    output = (hidden @ model["head"]).T * scale  # [3, m]
    expected = rows(output, dict(model.items()))
    _assert_each_row(Engine(model, check="never").jacobian(output).matrix(), expected, 1e-9)
