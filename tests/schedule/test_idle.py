"""What plain autograd does not touch is not touched; what it touches has its hooks run once."""

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from posegrad import Engine, Min

SCHEDULES = ["store", "stream", "recompute"]
KINDS = ["before", "after", "both"]
FAR, IDLE = 2, 3  # the expert of poses that carry no weight, and that of none


class Experts(nn.Module):
    """Each pose goes through the expert whose number is its first."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(3, 4)
        self.experts = nn.ModuleList(nn.Linear(4, 1) for _ in range(4))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, pose: Tensor) -> Tensor:
        number = int(pose[0])
        return self.experts[number](torch.tanh(self.trunk(pose))) + (100 if number == FAR else 0)


RULE = Min(20.0)  # a pose 100 above another weighs exactly zero
Event = tuple[str, str, Tensor | None]


def _poses(numbers: list[int], seed: int = 0) -> list[Tensor]:
    poses = torch.randn(len(numbers), 3, generator=torch.Generator("cpu").manual_seed(seed))
    poses[:, 0] = torch.tensor(numbers)
    return list(poses.double())


def _watch(model: nn.Module, kinds: dict[str, str]) -> list[Event]:
    """Registers hooks on parameters by name; returns the list that they write to."""
    events: list[Event] = []

    def before(name: str) -> Callable[[Tensor], Tensor]:
        def hook(gradient: Tensor) -> Tensor:
            events.append((name, "before", gradient.clone()))
            return gradient.clamp(-0.1, 0.1)

        return hook

    def after(name: str) -> Callable[[Tensor], None]:
        def hook(p: Tensor) -> None:
            events.append((name, "after", None if p.grad is None else p.grad.clone()))

        return hook

    for name, p in model.named_parameters():
        if kinds.get(name) in ("before", "both"):
            p.register_hook(before(name))
        if kinds.get(name) in ("after", "both"):
            p.register_post_accumulate_grad_hook(after(name))
    return events


def _run(
    model: nn.Module, kinds: dict[str, str], poses: Tensor, schedule: str, **options: int
) -> tuple[list[Event], dict[str, Tensor | None]]:
    """Two groups, one after the other: the calls of hooks, and every `.grad`."""
    model = copy.deepcopy(model)
    for name, p in model.named_parameters():
        p.grad = None if name.startswith("trunk") else torch.ones_like(p)
    events = _watch(model, kinds)
    engine = Engine(model, **options)
    for _ in range(2):
        engine.combine(poses, RULE, schedule=schedule).prediction.square().backward()
    events.sort(key=lambda event: event[:2])  # of one parameter, in the order of calls
    return events, {name: p.grad for name, p in model.named_parameters()}


def _assert_same_events(found: list[Event], expected: list[Event]) -> None:
    assert [event[:2] for event in found] == [event[:2] for event in expected]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a[2], b[2], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_hooks_run_as_under_plain_autograd(schedule: str, kind: str) -> None:
    model, poses = Experts().double(), _poses([0, 1, FAR, 0, 1])
    kinds = {name: kind for name, _ in model.named_parameters()}
    found, expected = (_run(model, kinds, poses, s) for s in (schedule, "retain"))
    _assert_same_events(found[0], expected[0])
    assert not any(name.startswith((f"experts.{IDLE}", "unused")) for name, *_ in found[0])
    for name, gradient in found[1].items():
        torch.testing.assert_close(gradient, expected[1][name], rtol=1e-10, atol=1e-12)


@given(
    numbers=st.lists(st.integers(0, 3), min_size=1, max_size=5),
    hooked=st.lists(st.sampled_from(["", *KINDS]), min_size=11, max_size=11),
    schedule=st.sampled_from(SCHEDULES),
    seed=st.integers(0, 2**20),
)
def test_drawn_hooks_run_as_under_plain_autograd(
    numbers: list[int], hooked: list[str], schedule: str, seed: int
) -> None:
    torch.manual_seed(seed)
    model, poses = Experts().double(), _poses(numbers, seed)
    kinds = dict(zip(dict(model.named_parameters()), hooked, strict=True))
    found, expected = (_run(model, kinds, poses, s) for s in (schedule, "retain"))
    _assert_same_events(found[0], expected[0])
    for name, gradient in found[1].items():
        torch.testing.assert_close(gradient, expected[1][name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_optimizer_in_the_backward_moves_what_it_would_move(schedule: str) -> None:
    poses, first = _poses([0, 1, FAR, 0, 1]), Experts().double()
    models = {s: copy.deepcopy(first) for s in (schedule, "retain")}
    for name, model in models.items():
        steps = {p: torch.optim.Adam([p], weight_decay=0.1) for p in model.parameters()}

        def step(p: Tensor, steps: dict[Tensor, torch.optim.Adam] = steps) -> None:
            steps[p].step()
            p.grad = None

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(step)
        engine = Engine(model)
        for _ in range(3):
            engine.combine(poses, RULE, schedule=name).prediction.square().backward()
    for name, p in models[schedule].named_parameters():
        torch.testing.assert_close(p, models["retain"].get_parameter(name), rtol=1e-8, atol=1e-10)
    assert torch.equal(models[schedule].experts[IDLE].weight, first.experts[IDLE].weight)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_hooks_gradients_of_weightless_poses_stay_none(schedule: str) -> None:
    model = Experts().double()
    engine = Engine(model)
    for _ in range(2):
        engine.combine(_poses([0, FAR, 1]), RULE, schedule=schedule).prediction.backward()
    assert model.experts[FAR].weight.grad is None
    assert model.experts[IDLE].weight.grad is None
    assert model.experts[0].weight.grad is not None


def test_hooks_that_come_after_combine_take_zeros() -> None:
    """`recompute` scored later groups without graphs, and cannot know who is idle."""
    model, poses = Experts().double(), _poses([0, 1, 0])
    engine = Engine(model, chunk_size=1)
    engine.combine(poses, RULE, schedule="recompute")
    prediction, _ = engine.combine(poses, RULE, schedule="recompute")
    events = _watch(model, {name: "both" for name, _ in model.named_parameters()})
    prediction.backward()
    assert [n for n, when, _ in events if when == "before"].count(f"experts.{IDLE}.weight") == 1
    assert torch.equal(model.experts[IDLE].weight.grad, torch.zeros(1, 4).double())


@pytest.mark.parametrize("schedule", ["retain", *SCHEDULES])
def test_a_pose_tensor_that_nothing_uses_is_not_touched(schedule: str) -> None:
    model, seen = nn.Linear(3, 1), []
    stacked, ignored = torch.randn(4, 3, requires_grad=True), torch.randn(3, requires_grad=True)
    for tensor in (stacked, ignored):
        tensor.register_hook(lambda gradient: seen.append(gradient.clone()))
    poses = [(row, ignored) for row in stacked]
    engine = Engine(model, predict=lambda model, pose: model(pose[0]))
    for _ in range(2):
        stacked.grad = None
        engine.combine(poses, Min(), schedule=schedule).prediction.backward(retain_graph=True)
    assert len(seen) == 2
    assert torch.equal(seen[1], stacked.grad)
    assert ignored.grad is None


@pytest.mark.parametrize("schedule", ["retain", *SCHEDULES])
def test_an_idle_parameter_has_no_gradient_to_ask_for(schedule: str) -> None:
    model = Experts().double()
    prediction, _ = Engine(model).combine(_poses([0, 1]), RULE, schedule=schedule)
    sources = [model.experts[0].weight, model.experts[IDLE].weight, model.unused]
    used, *idle = torch.autograd.grad(prediction, sources, allow_unused=True)
    assert used is not None
    assert idle == [None, None]


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_jacobian_is_delivered_as_by_a_plain_backward(kind: str, chunked: bool) -> None:
    model, poses = Experts().double(), _poses([0, 1, FAR, 0, 1])
    kinds = {name: kind for name, _ in model.named_parameters()}

    def run(step: Callable[[nn.Module], object]) -> tuple[list[Event], nn.Module]:
        twin = copy.deepcopy(model)
        for name, p in twin.named_parameters():
            p.grad = None if name.startswith("trunk") else torch.ones_like(p)
        events = _watch(twin, kinds)
        step(twin)
        return sorted(events, key=lambda event: event[:2]), twin

    def plainly(model: nn.Module) -> None:
        RULE(torch.cat([model(pose) for pose in poses])).backward()

    def by_rows(model: nn.Module) -> None:
        engine = Engine(model)
        if chunked:
            engine.gather(poses).backward(RULE)
        else:
            engine.backward(torch.cat([model(pose) for pose in poses]), RULE)

    (expected, plain), (found, ours) = run(plainly), run(by_rows)
    _assert_same_events(found, expected)
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)
