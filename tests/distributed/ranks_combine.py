"""A group whose poses are spread over ranks gives what it gives in one process."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from posegrad import (
    AttentionPooling,
    Best,
    Boltzmann,
    Combination,
    Engine,
    Mean,
    Min,
)
from tests.device import seeded
from tests.distributed.setting import (
    FEATURES,
    IDS,
    M,
    gradients,
    mine,
    network,
    poses,
    same_everywhere,
)

RULES: dict[str, Callable[[], Combination]] = {
    "Mean": Mean,
    "Min(3)": lambda: Min(scale=3.0),
    "Min(1000)": lambda: Min(scale=1000.0),
    "Boltzmann": lambda: Boltzmann(kT=0.5),
    "Best": Best,
}


class Tempered(Combination):
    """A smooth maximum whose temperature is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, predictions: Tensor) -> Tensor:
        return self.temperature * torch.logsumexp(predictions / self.temperature, dim=0)


def squares(prediction: Tensor, per_pose: Tensor) -> Tensor:
    return prediction.square().sum()


def of_both(prediction: Tensor, per_pose: Tensor) -> Tensor:
    return prediction.square().sum() + (per_pose * torch.arange(M)).sum()


def check(
    rule: Combination,
    loss: Callable[[Tensor, Tensor], Tensor] = squares,
    *,
    schedule: str = "auto",
    groups: Tensor | None = None,
    model: nn.Module | None = None,
) -> None:
    model = network() if model is None else model
    X, modules = poses(), (model, rule)
    own = None if groups is None else mine(groups)

    def shared() -> None:
        engine = Engine(model, process_group=dist.group.WORLD)
        combined = engine.combine(list(mine(X)), rule, schedule=schedule, groups=own)
        results.append(combined)
        loss(*combined).backward()

    def alone() -> None:
        combined = Engine(model).combine(list(X), rule, schedule="retain", groups=groups)
        results.append(combined)
        loss(*combined).backward()

    results: list[tuple[Tensor, Tensor]] = []
    found, expected = gradients(modules, shared), gradients(modules, alone)
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert same_everywhere(found)


@pytest.mark.parametrize("schedule", ["auto", "stream", "recompute", "store"])
@pytest.mark.parametrize("groups", [None, IDS], ids=["one group", "several groups"])
@pytest.mark.parametrize("rule", RULES)
def test_it_equals_one_process(rule: str, schedule: str, groups: Tensor | None) -> None:
    if schedule == "stream" and RULES[rule]().online() is None:
        with pytest.raises(ValueError, match="cannot stream"):
            check(RULES[rule](), schedule=schedule, groups=groups)
    else:
        check(RULES[rule](), schedule=schedule, groups=groups)


@pytest.mark.parametrize("schedule", ["recompute", "store"])
def test_a_loss_may_look_at_the_poses_of_all_ranks(schedule: str) -> None:
    check(Min(scale=3.0), of_both, schedule=schedule)


@pytest.mark.parametrize("schedule", ["auto", "recompute", "store"])
def test_a_rule_that_is_trained_has_the_same_gradient_everywhere(schedule: str) -> None:
    check(Tempered(), of_both, schedule=schedule)
    check(Tempered(), schedule=schedule, groups=IDS)
    vectors = nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh()).double()
    torch.manual_seed(1)
    check(AttentionPooling(4).double(), schedule=schedule, model=vectors)


def test_chunks_and_generators() -> None:
    model, X = network(), poses()
    engine = Engine(model, chunk_size=3, collate=torch.stack, process_group=dist.group.WORLD)

    def shared() -> None:
        engine.combine(iter(mine(X)), Mean()).prediction.backward()

    def alone() -> None:
        Engine(model).combine(list(X), Mean(), schedule="retain").prediction.backward()

    torch.testing.assert_close(gradients([model], shared), gradients([model], alone))


def test_the_gradient_is_that_of_the_mean_of_the_ranks_losses() -> None:
    model, X = network(), poses()
    rank, count = dist.get_rank(), dist.get_world_size()

    def shared() -> None:
        engine = Engine(model, process_group=dist.group.WORLD)
        prediction, _ = engine.combine(list(mine(X)), Min(scale=3.0), schedule="recompute")
        (prediction * (rank + 1)).backward()

    def alone() -> None:
        prediction, _ = Engine(model).combine(list(X), Min(scale=3.0))
        (prediction * (count + 1) / 2).backward()

    torch.testing.assert_close(gradients([model], shared), gradients([model], alone))


def test_a_rule_may_draw_random_numbers_on_each_rank() -> None:
    """Then each rank's loss is a random one, and the gradient is that of their mean."""
    model, X, count = network(), poses(), dist.get_world_size()

    def masked(predictions: Tensor, seed: int) -> Tensor:
        draws = torch.rand(M, generator=seeded(seed))
        return (predictions * draws).sum()

    def shared() -> None:
        engine = Engine(model, process_group=dist.group.WORLD)
        rank = dist.get_rank()
        engine.combine(list(mine(X)), lambda y: masked(y, rank)).prediction.backward()

    def alone() -> None:
        y = Engine(model).combine(list(X), Mean(), schedule="recompute").per_pose
        sum(masked(y, rank) / count for rank in range(count)).backward()

    torch.testing.assert_close(gradients([model], shared), gradients([model], alone))


def test_gradients_accumulate_and_poses_have_their_own() -> None:
    model, X = network(), poses()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    own = [pose.clone().requires_grad_() for pose in mine(X)]
    engine = Engine(model, process_group=dist.group.WORLD)
    engine.combine(own, Boltzmann(kT=0.5)).prediction.backward()
    found = {name: p.grad - 1 for name, p in model.named_parameters()}
    model.zero_grad()
    whole = X.clone().requires_grad_()
    Engine(model).combine(whole, Boltzmann(kT=0.5)).prediction.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(found, expected)
    forces = [torch.zeros(0, FEATURES, dtype=torch.float64), *(p.grad[None] for p in own)]
    torch.testing.assert_close(torch.cat(forces), mine(whole.grad))


class Routed(nn.Module):
    """The first pose of a rank alone goes through the first expert; nothing uses the third."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(FEATURES, 1).double() for _ in range(3)])

    def forward(self, pose: Tensor) -> Tensor:
        return self.experts[int(pose[0] > 0)](pose)


@pytest.mark.parametrize("schedule", ["stream", "recompute", "store"])
def test_a_parameter_that_some_ranks_do_not_use(schedule: str) -> None:
    torch.manual_seed(0)
    X = poses()
    X[:, 0] = torch.where(torch.arange(M) == 0, 1.0, -1.0)
    model = Routed()

    def shared() -> None:
        engine = Engine(model, process_group=dist.group.WORLD)
        engine.combine(list(mine(X)), Mean(), schedule=schedule).prediction.backward()

    def alone() -> None:
        Engine(model).combine(list(X), Mean(), schedule=schedule).prediction.backward()

    found, expected = gradients([model], shared), gradients([model], alone)
    torch.testing.assert_close(found, expected)
    assert found["0.experts.1.weight"] is not None
    assert found["0.experts.2.weight"] is None


def test_bfloat16_is_summed_in_float32() -> None:
    model = network().to(torch.bfloat16)
    own = list(mine(poses().to(torch.bfloat16)))

    def shared() -> None:
        engine = Engine(model, process_group=dist.group.WORLD)
        engine.combine(own, Mean()).prediction.backward()

    found = gradients([model], shared)

    def alone() -> None:
        everyone = list(poses().to(torch.bfloat16))
        Engine(model).combine(everyone, Mean(), schedule="stream").prediction.backward()

    expected = gradients([model], alone)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-3)
    assert same_everywhere(found)


def test_weights_are_summed_in_float32() -> None:
    model = nn.Linear(1, 1, bias=False).to(torch.float16)
    engine = Engine(model, process_group=dist.group.WORLD)
    own = [torch.ones(1, dtype=torch.float16)] if dist.get_rank() == 0 else []
    _, per_pose = engine.combine(own, Mean(), schedule="recompute")
    (per_pose.sum() * 60000).backward()  # twice that is infinite in float16
    assert model.weight.grad.item() == 60000


@pytest.mark.parametrize("chunk_size", ["auto", 2])
def test_a_stacked_leaf_gets_its_gradient(chunk_size: Any) -> None:
    model, X = network(), poses()
    own = mine(X).clone().requires_grad_()
    engine = Engine(model, chunk_size=chunk_size, process_group=dist.group.WORLD)
    engine.combine(own, Boltzmann(kT=0.5)).prediction.backward()
    whole = X.clone().requires_grad_()
    Engine(model).combine(whole, Boltzmann(kT=0.5)).prediction.backward()
    if len(own):
        torch.testing.assert_close(own.grad, mine(whole.grad))


def test_plan_knows_that_the_group_is_shared() -> None:
    engine = Engine(network(), chunk_size=20, collate=torch.stack, process_group=dist.group.WORLD)
    assert engine.plan(poses(), Mean()).schedule == "stream"
    with pytest.raises(ValueError, match="would stay on each rank"):
        engine.plan(poses(), Mean(), schedule="retain")


def test_sizes_of_groups_are_those_of_this_rank() -> None:
    model, X = network(), poses()
    sizes = torch.bincount(mine(IDS), minlength=3).tolist()
    order = torch.argsort(mine(IDS), stable=True)
    engine = Engine(model, process_group=dist.group.WORLD)
    prediction, _ = engine.combine(list(mine(X)[order]), Mean(), groups=sizes)
    expected, _ = Engine(model).combine(list(X), Mean(), groups=IDS)
    torch.testing.assert_close(prediction, expected)


def test_without_gradients() -> None:
    model, X = network(), poses()
    engine = Engine(model, process_group=dist.group.WORLD)
    with torch.no_grad():
        found = engine.combine(list(mine(X)), Best(), groups=mine(IDS))
        expected = Engine(model).combine(list(X), Best(), groups=IDS)
    torch.testing.assert_close(found, expected)
    assert not found.prediction.requires_grad


def test_steps_do_not_drift_apart() -> None:
    model, X = network(), poses()
    engine = Engine(model, process_group=dist.group.WORLD)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        engine.combine(list(mine(X)), Min(scale=3.0)).prediction.square().backward()
        optimizer.step()
    assert same_everywhere(dict(model.named_parameters()))
