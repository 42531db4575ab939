"""The choice of a schedule: one pure function, a test for each row of its table."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from posegrad import Best, Boltzmann, Combination, Engine, Mean, Min, Plan, TopK
from posegrad.schedule._cost import Load, cheapest, costs
from tests.models import FEATURES, MODELS

ALL = 64

WALKED = Load(poses=ALL, chunks=ALL, counting=ALL, graph=1e6, gradient=10**4, walked=True)
CHUNKS = replace(WALKED, chunks=4, walked=False)
BATCH = replace(WALKED, chunks=1, walked=False)

ROWS: dict[str, tuple[Load, str]] = {
    "a list, one sum": (replace(WALKED, sums=1), "stream"),
    "a list, two sums, which one backward serves": (replace(WALKED, sums=2), "stream"),
    "a list, no sums: rows fit": (WALKED, "store"),
    "a list, no sums: rows do not fit": (replace(WALKED, budget=10**6), "recompute"),
    "a list, few count": (replace(WALKED, counting=3), "recompute"),
    "a list of several groups": (replace(WALKED, sums=1, groups=4), "store"),
    "a list, vectors": (replace(WALKED, sums=1, components=3), "recompute"),
    "a list, float16": (replace(WALKED, sums=1, early=False), "recompute"),
    "chunks, one sum": (replace(CHUNKS, sums=1), "stream"),
    "chunks, two sums": (replace(CHUNKS, sums=2), "store"),
    "chunks, two sums, poses that mix": (replace(CHUNKS, sums=2, apart=False), "recompute"),
    "chunks, two sums, rows do not fit": (replace(CHUNKS, sums=2, budget=6 * 10**5), "recompute"),
    "chunks, few count": (replace(CHUNKS, sums=1, counting=4), "recompute"),
    "chunks, few count, but with all of theirs": (
        replace(CHUNKS, sums=1, counting=4, picks=False),
        "stream",
    ),
    "chunks that fit together, one sum: none is kept for nothing": (
        replace(CHUNKS, sums=1, whole=True),
        "stream",
    ),
    "chunks that fit together, two sums": (replace(CHUNKS, sums=2, whole=True), "retain"),
    "chunks that fit together, no sums": (replace(CHUNKS, whole=True), "retain"),
    "one chunk": (replace(BATCH, sums=1), "retain"),
    "one chunk, two sums": (replace(BATCH, sums=2), "retain"),
    "one chunk, no sums": (BATCH, "retain"),
    "one chunk, few count": (replace(BATCH, counting=1), "recompute"),
    "one chunk, few count, whole again": (replace(BATCH, counting=1, picks=False), "retain"),
    "one small chunk, few count": (replace(BATCH, counting=1, extra=300.0), "retain"),
    "one pose": (Load(graph=1e6, gradient=10**4, sums=1), "retain"),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_cheapest_is_taken(name: str) -> None:
    load, schedule = ROWS[name]
    assert cheapest(load).schedule == schedule


LOADS = st.builds(
    Load,
    poses=st.integers(1, 10**4),
    counting=st.integers(1, 100),
    sums=st.integers(0, 2),
    graph=st.floats(1.0, 1e9),
    gradient=st.integers(4, 10**8),
    budget=st.integers(1, 2**34),
    components=st.integers(1, 3),
    groups=st.integers(1, 3),
    early=st.booleans(),
    apart=st.booleans(),
    picks=st.booleans(),
    walked=st.booleans(),
    extra=st.floats(0, 1000.0),
)


@given(LOADS, st.integers(1, 100))
def test_no_schedule_that_fits_takes_less(load: Load, chunks: int) -> None:
    load.chunks = min(chunks, load.poses)
    load.counting = min(load.counting, load.poses)
    chosen = cheapest(load)
    able = [cost for cost in costs(load) if cost.serves and cost.fits]
    assert chosen.time <= 1.05 * min(cost.time for cost in able)
    alike = [cost for cost in able if cost.time <= chosen.time]
    assert chosen.bytes == min(cost.bytes for cost in alike)  # type: ignore[type-var]
    assert (
        chosen.schedule in ("stream", "recompute")
        or load.chunks == 1
        or (
            chosen.bytes <= load.budget  # type: ignore[operator]
        )
    )


@given(LOADS)
def test_more_memory_never_takes_more_time(load: Load) -> None:
    less = cheapest(load)
    more = cheapest(replace(load, budget=2 * load.budget))
    assert more.time <= 1.05 * less.time


def _plan(rule: Any, poses: Any, *, calls: int = 1, **options: Any) -> Plan:
    """The plan once a few calls have been made."""
    engine = Engine(MODELS["mlp"](), **options)
    for _ in range(calls):
        engine.combine(poses, rule).prediction.backward()
    plan = engine.plan(poses, rule)
    assert isinstance(plan, Plan)
    return plan


POSES = torch.randn(64, FEATURES)


@pytest.mark.parametrize(
    ("rule", "count"),
    [
        (Best(), "1 (by the rule)"),
        (TopK(5), "5 (by the rule)"),
        (Min(1000.0), "1 (as the rule is sharp)"),
        (Mean(), "64 (until a call has shown)"),
        (lambda y: y.amin(), "64 (until a call has shown)"),
    ],
)
def test_how_many_poses_count_is_said_before(rule: Any, count: str) -> None:
    assert count in str(_plan(rule, list(POSES), calls=0))


def test_how_many_count_is_learned_from_the_last_call() -> None:
    def lowest(predictions: torch.Tensor) -> torch.Tensor:
        return predictions.topk(3, largest=False).values.sum()

    plan = _plan(lowest, list(POSES))
    assert "3 (in the last call)" in str(plan)
    assert plan.schedule == "recompute"
    assert plan.reason == "3 of 64 poses count, in the last call"


def test_a_plan_shows_all_schedules_and_marks_the_one_that_runs() -> None:
    before = str(_plan(Mean(), list(POSES), calls=0)).splitlines()[-4:]
    assert [line.split()[0] for line in before] == ["retain", "store", "stream", "recompute"]
    assert "64 graphs" in before[0]
    assert [line.endswith("chosen") for line in before] == [False, False, True, False]
    after = str(_plan(Mean(), list(POSES))).splitlines()[-4:]
    assert all("graph" not in line and "KiB" in line for line in after)


def test_a_plan_says_what_does_not_fit() -> None:
    plan = _plan(Boltzmann(1.0), torch.randn(512, FEATURES), memory="4KiB")
    assert plan.chunks > 1
    assert next(cost.schedule for cost in plan.costs if not cost.fits) == "retain"
    assert "does not fit" in str(plan)


@pytest.mark.parametrize("rule", [Mean(), Boltzmann(1.0), Best()])
def test_one_chunk_that_fits_is_plain_autograd(rule: Combination) -> None:
    assert _plan(rule, POSES).schedule == "retain"


def test_chunks_of_two_sums_keep_rows_where_these_fit() -> None:
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 1))
    engine, poses = Engine(model, memory="1MiB"), torch.randn(4096, 64)
    for _ in range(2):
        engine.combine(poses, Boltzmann(1.0)).prediction.backward()
    plan = engine.plan(poses, Boltzmann(1.0))
    assert plan.schedule == "recompute"  # 4096 rows are more than that
    wide = nn.Sequential(*[nn.Linear(64, 64) for _ in range(2)], nn.Linear(64, 1))
    engine = Engine(wide, predict=lambda model, x: model(x).sum((1, 2)), memory="4MiB")
    poses = torch.randn(64, 256, 64)
    for _ in range(2):
        engine.combine(poses, Boltzmann(1.0)).prediction.backward()
    plan = engine.plan(poses, Boltzmann(1.0))
    assert plan.chunks > 1
    assert plan.schedule == "store"
