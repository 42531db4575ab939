"""Hooks of parameters that some ranks' poses use, or none: they run as in one process."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from posegrad import AttentionPooling, Combination, Engine, Min
from tests.distributed.setting import FEATURES, M, gradients, mine, poses, same_everywhere

SCHEDULES = ["stream", "recompute", "store"]


class Experts(nn.Module):
    """Two experts, each for poses of one end of the group, and one for none."""

    def __init__(self, out: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(FEATURES, out) for _ in range(3))

    def forward(self, pose: Tensor) -> Tensor:
        return self.experts[int(pose[0] > 0)](pose)


def routed() -> Tensor:
    everyone = poses()
    everyone[:, 0] = torch.linspace(-1, 1, M)
    return everyone


def watched(modules: tuple[nn.Module, ...]) -> list[tuple[str, Tensor]]:
    """Registers both kinds of hooks on every parameter; returns what they see."""
    seen: list[tuple[str, Tensor]] = []

    def on(name: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], None]]:
        def before(gradient: Tensor) -> Tensor:
            seen.append((f"{name} before", gradient.clone()))
            return gradient.clamp(-0.1, 0.1)

        def after(p: Tensor) -> None:
            assert p.grad is not None
            seen.append((f"{name} after", p.grad.clone()))

        return before, after

    for i, module in enumerate(modules):
        for name, p in module.named_parameters():
            before, after = on(f"{i}.{name}")
            p.register_hook(before)
            p.register_post_accumulate_grad_hook(after)
    return seen


def check(model: nn.Module, rule: Combination, schedule: str) -> None:
    X, seen = routed(), watched((model, rule))
    engine = Engine(model, process_group=dist.group.WORLD)
    for _ in range(2):  # the second group is scored without graphs where nobody has hooks

        def shared() -> None:
            engine.combine(list(mine(X)), rule, schedule=schedule).prediction.sum().backward()

        def alone() -> None:
            Engine(model).combine(list(X), rule, schedule="retain").prediction.sum().backward()

        found = gradients((model, rule), shared)
        events = sorted(seen, key=lambda event: event[0])
        seen.clear()
        expected = gradients((model, rule), alone)
        plain = sorted(seen, key=lambda event: event[0])
        seen.clear()
        assert [name for name, _ in events] == [name for name, _ in plain]
        for (_, a), (_, b) in zip(events, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
        assert same_everywhere(found)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_hooks_run_on_every_rank_if_one_uses_the_parameter(schedule: str) -> None:
    check(Experts().double(), Min(scale=3.0), schedule)


@pytest.mark.parametrize("schedule", ["recompute", "store"])
def test_hooks_of_a_trained_rule_run_once(schedule: str) -> None:
    torch.manual_seed(1)
    check(Experts(4).double(), AttentionPooling(4).double(), schedule)


def test_hooks_on_one_rank_alone_run_there() -> None:
    model, X = Experts().double(), routed()
    engine = Engine(model, process_group=dist.group.WORLD)
    engine.combine(list(mine(X)), Min(), schedule="recompute")
    seen: list[str] = []
    if dist.get_rank() == 0:
        for name, p in model.named_parameters():
            p.register_hook(lambda gradient, name=name: seen.append(name))
    engine.combine(list(mine(X)), Min(scale=3.0), schedule="recompute").prediction.backward()
    used = [name for name, _ in model.named_parameters() if not name.startswith("experts.2")]
    assert sorted(seen) == (sorted(used) if dist.get_rank() == 0 else [])
    assert model.experts[2].weight.grad is None
