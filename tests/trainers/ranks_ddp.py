"""`DDP(MultiPose(model, rule))` in two processes: gradients are averaged as those of any model."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from posegrad import Engine, Mean, Min, MultiPose
from posegrad.errors import PerPoseLossError, UnsupportedModuleError
from tests.distributed.setting import DDP_OPTIONS
from tests.schedules import SCHEDULES
from tests.trainers.oracle import (
    RULES,
    Compound,
    Learned,
    assert_same,
    compounds,
    network,
    plain_loss,
    plain_step,
)


def _loss(module: nn.Module, compound: Compound) -> Tensor:
    poses, target = compound
    return (module(poses).prediction - target).square()


def _both(schedule: str, rule: Any, **options: Any) -> tuple[DistributedDataParallel, MultiPose]:
    """A wrapped module, and one that plain autograd trains."""
    plain = MultiPose(network(), rule())
    return DistributedDataParallel(
        MultiPose(network(), rule(), schedule=schedule), **options
    ), plain


STEPS = [(name, "plain") for name in RULES]
STEPS += [(name, options) for name in SCHEDULES for options in DDP_OPTIONS if options != "plain"]


@pytest.mark.parametrize(("name", "options"), STEPS)
def test_steps_are_those_of_the_mean_over_ranks(name: str, options: str) -> None:
    ddp, plain = _both(*RULES[name], **DDP_OPTIONS[options])
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.05) for m in (ddp, plain)]
    batches = compounds(8)
    for step in range(4):  # buckets are built anew after the first; a static graph is known then
        batch = batches[2 * step : 2 * step + 2]  # of different sizes
        _loss(ddp, batch[dist.get_rank()]).backward()
        plain_step(plain.model, plain.rule, batch)
        assert_same(ddp.module, plain, gradients=True)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_same(ddp.module, plain)


@pytest.mark.parametrize("options", ["plain", "bucket views", "static graph"])
@pytest.mark.parametrize("name", [*SCHEDULES, "auto, trained"])
def test_gradients_accumulate_without_talking(name: str, options: str) -> None:
    ddp, plain = _both(*RULES[name], **DDP_OPTIONS[options])
    data = iter(compounds(20))
    # With a static graph, torch itself fails if the first backward is one without talking.
    for count in (1 if options == "static graph" else 3, 3, 3):
        ddp.zero_grad()
        plain.zero_grad()
        batch = [next(data) for _ in range(2 * count)]
        for i, compound in enumerate(batch[dist.get_rank() :: 2], start=1):
            with ddp.no_sync() if i < count else nullcontext():
                (_loss(ddp, compound) / count).backward()
        plain_step(plain.model, plain.rule, batch)
        assert_same(ddp.module, plain, gradients=True)


@pytest.mark.parametrize("name", RULES)
def test_several_compounds_in_one_call_of_a_rank(name: str) -> None:
    ddp, plain = _both(*RULES[name])
    batch = compounds(5)
    own = batch[dist.get_rank() :: 2]  # three and two
    poses = torch.cat([poses for poses, _ in own])
    targets = torch.stack([target for _, target in own])
    prediction, _ = ddp(poses, groups=[len(poses) for poses, _ in own])
    (prediction - targets).square().mean().backward()
    for part in (batch[0::2], batch[1::2]):
        plain_step(plain.model, plain.rule, part)
    for p in plain.parameters():
        p.grad /= 2
    assert_same(ddp.module, plain, gradients=True)


@pytest.mark.parametrize("options", ["plain", "find unused", "static graph"])
@pytest.mark.parametrize("schedule", ["recompute", "store", "retain"])
def test_losses_of_single_poses(schedule: str, options: str) -> None:
    ddp, plain = _both(schedule, Learned, **DDP_OPTIONS[options])
    batch = compounds(2)
    for _ in range(2):
        ddp.zero_grad()
        prediction, per_pose = ddp(batch[dist.get_rank()][0])
        (prediction.square() + per_pose.sin().sum()).backward()
    for poses, _ in batch:
        per_pose = plain.model(poses).squeeze(1)
        ((plain.rule(per_pose).square() + per_pose.sin().sum()) / 2).backward()
    assert_same(ddp.module, plain, gradients=True)


@pytest.mark.parametrize("options", ["plain", "find unused", "static graph"])
def test_a_loss_of_single_poses_under_stream_is_an_error_here_too(options: str) -> None:
    ddp, _ = _both("stream", Mean, **DDP_OPTIONS[options])
    _, per_pose = ddp(compounds(2)[dist.get_rank()][0])
    with pytest.raises(PerPoseLossError, match="schedule='recompute'"):
        per_pose.sum().backward()


class Experts(nn.Module):
    """Every pose goes through the expert whose number is its last number; nobody uses the third."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(network() for _ in range(3))

    def forward(self, pose: Tensor) -> Tensor:
        return self.experts[int(pose[-1])](pose)


def _routed(rank: int, step: int = 0) -> Compound:
    """Poses of one rank all go to one expert, another one in each step."""
    poses, target = compounds(2)[rank]
    poses[:, -1] = (rank + step) % 3
    return list(poses), target


@pytest.mark.parametrize("options", ["plain", "bucket views", "find unused", "static graph"])
@pytest.mark.parametrize("schedule", ["stream", "recompute", "store"])
def test_parameters_that_one_rank_does_not_use(schedule: str, options: str) -> None:
    ddp = DistributedDataParallel(
        MultiPose(Experts(), Mean(), schedule=schedule), **DDP_OPTIONS[options]
    )
    for step in range(4):
        plain = Experts()
        plain_step(plain, Mean(), [_routed(0, step), _routed(1, step)])
        ddp.zero_grad()
        _loss(ddp, _routed(dist.get_rank(), step)).backward()
        for p, q in zip(ddp.module.parameters(), plain.parameters(), strict=True):
            if q.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-10)
            elif options == "find unused":
                assert p.grad is None  # no rank used it
            else:
                assert p.grad is None or not p.grad.any()


@pytest.mark.parametrize("options", ["plain", "find unused", "static graph"])
@pytest.mark.parametrize("schedule", ["stream", "recompute", "store"])
def test_hooks_of_parameters_that_one_rank_does_not_use(schedule: str, options: str) -> None:
    model, seen = Experts(), []
    for p in model.parameters():
        p.register_hook(lambda gradient: seen.append(gradient) or gradient.clamp(-9, 9))
        p.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    ddp = DistributedDataParallel(
        MultiPose(model, Mean(), schedule=schedule), **DDP_OPTIONS[options]
    )
    for step in range(4):
        plain = Experts()
        plain_step(plain, Mean(), [_routed(0, step), _routed(1, step)])
        ddp.zero_grad()
        _loss(ddp, _routed(dist.get_rank(), step)).backward()
        for p, q in zip(ddp.module.model.parameters(), plain.parameters(), strict=True):
            expected = torch.zeros_like(q) if q.grad is None else q.grad
            found = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(found, expected.clamp(-9, 9), rtol=1e-10, atol=1e-10)
    assert seen


def test_retain_asks_for_what_plain_autograd_asks_for() -> None:
    ddp = DistributedDataParallel(MultiPose(Experts(), Mean(), schedule="retain"))
    _loss(ddp, _routed(dist.get_rank())).backward()
    with pytest.raises(RuntimeError, match="find_unused_parameters=True"):
        ddp(_routed(dist.get_rank())[0])

    ddp, plain = DistributedDataParallel(ddp.module, find_unused_parameters=True), Experts()
    ddp.zero_grad()
    plain_step(plain, Mean(), [_routed(0), _routed(1)])
    _loss(ddp, _routed(dist.get_rank())).backward()
    for p, q in zip(ddp.module.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_rank_draws_its_own_random_numbers(schedule: str) -> None:
    model = nn.Sequential(nn.Dropout(0.4), *network())
    ddp = DistributedDataParallel(MultiPose(model, Mean(), schedule=schedule))
    plain, batch = nn.Sequential(nn.Dropout(0.4), *network()), compounds(2)
    torch.manual_seed(dist.get_rank())
    _loss(ddp, batch[dist.get_rank()]).backward()
    for rank, compound in enumerate(batch):
        torch.manual_seed(rank)
        (plain_loss(plain, Mean(), compound) / 2).backward()
    assert_same(ddp.module.model, plain, gradients=True)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_poses_that_require_grad_get_that_of_their_own_rank(schedule: str) -> None:
    ddp, plain = _both(schedule, Mean)
    own = compounds(2)[dist.get_rank()]
    mine, theirs = (own[0].clone().requires_grad_() for _ in range(2))
    _loss(ddp, (mine, own[1])).backward()
    plain_loss(plain.model, plain.rule, (theirs, own[1])).backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ranks_with_fewer_compounds_join_early(schedule: str) -> None:
    ddp, plain = _both(schedule, Mean)
    batch = compounds(5)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (ddp, plain)]
    with ddp.join(divide_by_initial_world_size=False):
        for compound in batch[dist.get_rank() :: 2]:  # three and two
            optimizers[0].zero_grad()
            _loss(ddp, compound).backward()
            optimizers[0].step()
    for step in (batch[:2], batch[2:4], batch[4:]):
        optimizers[1].zero_grad()
        plain_step(plain.model, plain.rule, step)
        optimizers[1].step()
    assert_same(ddp.module, plain)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_evaluation_needs_no_other_rank(schedule: str) -> None:
    ddp, plain = _both(schedule, Mean)
    poses, _ = compounds(1)[0]
    if dist.get_rank() == 0:
        with torch.no_grad():
            found = ddp.module.eval()(poses).prediction
        torch.testing.assert_close(found, plain.model(poses).mean())


def test_a_wrapped_model_inside_is_refused_and_told_the_way() -> None:
    part = nn.Sequential(DistributedDataParallel(network()))
    for make in (lambda: Engine(part), lambda: MultiPose(part, Min())):
        with pytest.raises(UnsupportedModuleError, match=r"DistributedDataParallel\(MultiPose\("):
            make()


@pytest.mark.parametrize("schedule", ["stream", "recompute", "store"])
def test_forwards_in_which_ranks_talk_are_refused(schedule: str) -> None:
    model = nn.Sequential(nn.SyncBatchNorm(6, dtype=torch.float64), *network())
    module = MultiPose(model, Mean(), schedule=schedule, chunk_size=2)  # torch has it on GPUs only
    with pytest.raises(UnsupportedModuleError, match=r"(?s)0 is a SyncBatchNorm.*\.eval\(\)"):
        module(torch.randn(6, 6, dtype=torch.float64))
