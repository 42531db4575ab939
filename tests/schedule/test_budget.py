"""Chunks by a budget of sizes: their laws, their numbers, their memory, their errors."""

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from posegrad import Boltzmann, Budget, Combination, Engine, Mean, Min, MultiPose, Plan
from posegrad.errors import NoPosesError
from posegrad.testing import assert_matches_autograd, peak_live_bytes, rules
from tests.device import seeded
from tests.schedules import SCHEDULES

Joined = tuple[Tensor, Tensor, int]
"""The atoms of several poses `[a, 3]`, whose pose each is `[a]`, and how many poses there are."""


def _join(poses: list[Tensor]) -> Joined:
    sizes = torch.tensor([len(pose) for pose in poses])
    return torch.cat(poses), torch.arange(len(poses)).repeat_interleave(sizes), len(poses)


class AtomSum(nn.Module):
    """A sum over the atoms of each pose."""

    def __init__(self, *middle: nn.Module, width: int = 5) -> None:
        super().__init__()
        self.atom = nn.Sequential(nn.Linear(3, width), *middle, nn.Tanh(), nn.Linear(width, 1))
        self.seen: list[int] = []  # the atoms of each forward

    def forward(self, joined: Joined) -> Tensor:
        atoms, owners, count = joined
        self.seen.append(len(atoms))
        energies = self.atom(atoms).squeeze(1)  # [a]
        return energies.new_zeros(count).index_add(0, owners, energies)  # [c]


def _poses(sizes: list[int], seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = seeded(seed)
    return [torch.randn(size, 3, generator=generator, dtype=dtype) for size in sizes]


def _chunks(poses: list[Tensor], budget: Budget) -> list[list[Tensor]]:
    """What an engine scores together."""
    seen: list[list[Tensor]] = []

    def collate(chunk: list[Tensor]) -> Joined:
        seen.append(chunk)
        return _join(chunk)

    with torch.no_grad():
        Engine(AtomSum().double(), collate=collate, chunk_size=budget).combine(poses, Mean())
    return seen


@given(st.lists(st.integers(0, 12), min_size=1), st.integers(1, 30))
def test_chunks_are_greedy_cover_all_poses_in_order_and_keep_the_limit(
    sizes: list[int], limit: int
) -> None:
    chunks = [[len(pose) for pose in chunk] for chunk in _chunks(_poses(sizes), Budget(limit, len))]
    assert [size for chunk in chunks for size in chunk] == sizes
    totals = [sum(chunk) for chunk in chunks]
    assert all(
        total <= limit or len(chunk) == 1 for total, chunk in zip(totals, chunks, strict=True)
    )
    following = [chunk[0] for chunk in chunks[1:]]
    assert all(total + size > limit for total, size in zip(totals, following, strict=False))


@pytest.mark.parametrize(
    "size", [len, lambda pose: torch.tensor(len(pose)), lambda pose: 0.5 * len(pose)]
)
def test_a_size_is_any_number(size: Callable[[Tensor], Any]) -> None:
    factor = size(torch.zeros(2, 3)) / 2
    budget = Budget(10 * float(factor), size)
    chunks = _chunks(_poses([4, 6, 1, 30, 5, 5, 5]), budget)
    assert [[len(pose) for pose in chunk] for chunk in chunks] == [[4, 6], [1], [30], [5, 5], [5]]


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=9),
    limit=st.integers(1, 25),
    rule=rules(),
    seed=st.integers(0, 99),
)
def test_every_schedule_gives_the_numbers_of_single_poses(
    sizes: list[int], limit: int, rule: Combination, seed: int
) -> None:
    torch.manual_seed(seed)
    model, poses = AtomSum(), _poses(sizes, seed)
    tolerance = 1e-10 * max(1, 1e-4 * 1000 * 10)  # that of law 1: a sharp rule magnifies rounding
    assert_matches_autograd(
        model, poses, rule, collate=_join, chunk_size=1, schedules=["retain"], tolerance=tolerance
    )
    budget = Budget(limit, len)
    assert_matches_autograd(
        model, poses, rule, collate=_join, chunk_size=budget, tolerance=tolerance
    )
    found = _gradients(model, poses, rule, budget, "recompute")
    torch.testing.assert_close(
        found, _gradients(model, poses, rule, 1, "retain"), rtol=tolerance, atol=tolerance
    )


def _gradients(
    model: nn.Module, poses: list[Tensor], rule: Combination, chunk_size: Any, schedule: str
) -> dict[str, Tensor]:
    model.double().zero_grad()
    engine = Engine(model, collate=_join, chunk_size=chunk_size)
    engine.combine(poses, rule, schedule=schedule).prediction.sin().backward()
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    return zeros | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_random_masks_and_batch_statistics_are_replayed_in_the_same_composition() -> None:
    sizes = [5, 3, 4, 12, 2, 2, 7, 1, 6]
    for middle in (nn.Dropout(0.4), nn.BatchNorm1d(5)):
        assert_matches_autograd(
            AtomSum(middle), _poses(sizes), Min(2.0), collate=_join, chunk_size=Budget(10, len)
        )


def test_groups_run_across_the_chunks() -> None:
    assert_matches_autograd(
        AtomSum(),
        _poses([5, 3, 4, 12, 2, 2, 7, 1]),
        Boltzmann(0.593),
        groups=[3, 1, 4],
        collate=_join,
        chunk_size=Budget(10, len),
    )


def test_pose_tensors_get_their_gradients() -> None:
    poses = [pose.requires_grad_() for pose in _poses([5, 3, 4, 12, 2])]
    assert_matches_autograd(AtomSum(), poses, Min(2.0), collate=_join, chunk_size=Budget(9, len))


def test_a_stacked_tensor_needs_no_collate() -> None:
    poses = torch.randn(7, 3)
    forwards: list[int] = []
    engine = Engine(
        nn.Linear(3, 1),
        predict=lambda model, batch: forwards.append(len(batch)) or model(batch),
        chunk_size=Budget(6, len),
    )
    engine.combine(poses, Mean())
    assert forwards == [2, 2, 2, 1]


def test_a_generator_is_divided_as_it_comes() -> None:
    model, poses = AtomSum().double(), _poses([5, 3, 4, 12, 2])
    engine = Engine(model, collate=_join, chunk_size=Budget(9, len))
    prediction, per_pose = engine.combine((pose for pose in poses), Mean())
    assert model.seen == [8, 4, 12, 2]
    torch.testing.assert_close(per_pose, Engine(model, collate=_join).combine(poses, Mean())[1])
    assert prediction.requires_grad


def test_plan_says_how_many_forwards_there_will_be() -> None:
    model, poses = AtomSum().double(), _poses([5, 3, 4, 12, 2])
    engine = Engine(model, collate=_join, chunk_size=Budget(9, len))
    for schedule in SCHEDULES:
        plan = engine.plan(poses, Mean(), schedule=schedule)
        assert isinstance(plan, Plan)
        model.seen.clear()
        engine.combine(poses, Mean(), schedule=schedule)
        assert (plan.poses, plan.chunks) == (5, len(model.seen))
    assert engine.plan(poses[:2], Mean()).schedule == "retain"
    with pytest.raises(NoPosesError, match="no poses to plan"):
        engine.plan([], Mean())


def test_gathered_rows_are_those_of_single_poses() -> None:
    model, poses = AtomSum().double(), _poses([5, 3, 4, 12, 2, 2, 7, 1])
    squares = lambda predictions, i: (predictions - i).square()  # noqa: E731
    found = Engine(model, collate=_join, chunk_size=Budget(9, len)).gather(poses, loss=squares)
    expected = Engine(model, collate=_join).gather(poses, loss=squares)
    torch.testing.assert_close(found.matrix(), expected.matrix(), rtol=1e-12, atol=1e-12)


def test_a_module_of_both_takes_it_and_pickles() -> None:
    module = MultiPose(AtomSum(), Mean(), collate=_join, chunk_size=Budget(9, len)).double()
    poses = _poses([5, 3, 4, 12, 2])
    twin = pickle.loads(pickle.dumps(module))
    torch.testing.assert_close(twin(poses).prediction, module(poses).prediction)
    assert twin.model.seen == module.model.seen == [8, 4, 12, 2]


def _peak(sizes: list[int], schedule: str) -> int:
    torch.manual_seed(0)
    model = AtomSum(nn.Tanh(), nn.Linear(64, 64), width=64)
    engine = Engine(model, collate=_join, chunk_size=Budget(128, len))
    poses = _poses(sizes, dtype=torch.float32)
    engine.combine(poses, Mean(), schedule=schedule)  # the first group is looked at closer
    with peak_live_bytes() as peak:
        engine.combine(poses, Mean(), schedule=schedule).prediction.square().backward()
    return peak.bytes


@pytest.mark.parametrize("schedule", ["stream", "recompute"])
def test_peak_memory_is_that_of_the_budget(schedule: str) -> None:
    """However many poses there are, and be they few large ones or many small ones."""
    _peak([32] * 8, schedule)  # first use of an operator may allocate its own
    few, many = _peak([32] * 8, schedule), _peak([32] * 64, schedule)
    large, small = _peak([128] * 16, schedule), _peak([4] * 256, schedule)
    mixed = _peak([4, 128, 32, 60, 60, 8] * 10, schedule)
    assert max(many, large, small, mixed) <= 1.1 * few


def test_a_pose_beyond_the_limit_is_scored_alone() -> None:
    model = AtomSum().double()
    engine = Engine(model, collate=_join, chunk_size=Budget(9, len))
    engine.combine(_poses([3, 50, 3, 3, 60]), Mean())
    assert model.seen == [3, 50, 6, 60]


def test_the_score_of_a_pose_alone_may_be_squeezed() -> None:
    poses = _poses([5, 3, 4, 12])
    assert_matches_autograd(
        AtomSum(),
        poses,
        Min(2.0),
        predict=lambda model, joined: model(joined).reshape(-1),
        collate=_join,
        chunk_size=Budget(9, len),
    )
    squeezing = Engine(
        AtomSum().double(),
        predict=lambda model, joined: model(joined).squeeze(),
        collate=_join,
        chunk_size=Budget(9, len),
    )
    assert squeezing.combine(poses, Mean()).per_pose.shape == (4,)


@pytest.mark.parametrize("limit", [0, -3, float("nan")])
def test_a_limit_that_no_pose_fits_into(limit: float) -> None:
    with pytest.raises(ValueError, match="no pose fits into a chunk of that size"):
        Budget(limit, len)


@pytest.mark.parametrize("limit", ["many", None, True])
def test_a_limit_that_is_no_number(limit: Any) -> None:
    with pytest.raises(TypeError, match="it must be a number"):
        Budget(limit, len)


def test_a_size_that_cannot_be_asked() -> None:
    with pytest.raises(TypeError, match="must be a function from a pose to its size"):
        Budget(64, 8)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sizes", "error", "match"),
    [
        ([3, -1, 2], ValueError, "size of pose 1 is -1, but sizes are added up"),
        ([3, 1, float("nan")], ValueError, "size of pose 2 is nan"),
        ([3, "large"], TypeError, "size of pose 1 is a str, but a Budget adds up numbers"),
        ([None], TypeError, "size of pose 0 is a NoneType"),
    ],
)
def test_a_size_that_does_not_add_up_names_its_pose(
    sizes: list[Any], error: type[Exception], match: str
) -> None:
    poses = torch.randn(len(sizes), 3)
    values = iter(sizes)
    engine = Engine(nn.Linear(3, 1), chunk_size=Budget(8, lambda pose: next(values)))
    with pytest.raises(error, match=match):
        engine.combine(poses, Mean())
    assert engine.modules[0].weight.grad is None


def test_an_error_inside_the_size_names_the_pose() -> None:
    poses = [torch.zeros(2, 3), "no pose", torch.zeros(2, 3)]
    engine = Engine(
        nn.Linear(3, 1), collate=torch.stack, chunk_size=Budget(8, lambda pose: pose.numel())
    )
    with pytest.raises(AttributeError, match="numel") as caught:
        engine.combine(poses, Mean())
    assert caught.value.__notes__ == ["This was raised by the size of a Budget for pose 1."]


def test_a_list_needs_a_collate() -> None:
    with pytest.raises(ValueError, match="must know how to join them"):
        Engine(nn.Linear(3, 1), chunk_size=Budget(8, len)).combine([torch.zeros(3)], Mean())
