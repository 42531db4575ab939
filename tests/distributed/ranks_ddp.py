"""A model that is wrapped by DistributedDataParallel."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from posegrad import Engine, ListeningError, Mean, Min, MultiPose, UnsupportedModuleError
from tests.device import seeded
from tests.distributed.setting import gradients, mine, network, poses, same_everywhere

OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "bucket views": {"gradient_as_bucket_view": True},
    "unused parameters": {"find_unused_parameters": True},
    "static graph": {"static_graph": True},
}


def alone(model: nn.Module, loss: Callable[[Tensor], Tensor] = torch.square) -> dict[str, Any]:
    def step() -> None:
        loss(Engine(model).combine(list(poses()), Min(scale=3.0)).prediction).backward()

    return gradients([model], step)


@pytest.mark.parametrize("schedule", ["auto", "stream", "recompute", "store"])
@pytest.mark.parametrize("options", OPTIONS)
def test_the_group_is_shared_by_the_wrappers_processes(options: str, schedule: str) -> None:
    model = network()
    engine = Engine(DistributedDataParallel(model, **OPTIONS[options]))

    def step() -> None:
        prediction, _ = engine.combine(list(mine(poses())), Min(scale=3.0), schedule=schedule)
        prediction.square().backward()

    for _ in range(2):
        found = gradients([model], step)
        torch.testing.assert_close(found, alone(model), rtol=1e-9, atol=1e-11)
        assert same_everywhere(found)


def test_jacobians_of_a_wrapped_model_are_shared() -> None:
    model = network()
    wrapped = DistributedDataParallel(model)
    shared = Engine(wrapped).jacobian(model(mine(poses())).squeeze(1))
    expected = Engine(model).jacobian(model(poses()).squeeze(1))
    torch.testing.assert_close(shared.gramian(), expected.gramian())
    assert list(shared.shapes) == list(expected.shapes)


def test_a_static_graph_is_not_listened_to() -> None:
    wrapped = DistributedDataParallel(network(), static_graph=True)
    losses = wrapped(poses()).squeeze(1)
    with pytest.raises(ListeningError, match=r"static_graph=True.*\n.*Leave"):
        Engine(wrapped).listen(losses)
    losses.sum().backward()


@pytest.mark.parametrize("options", [name for name in OPTIONS if name != "static graph"])
def test_what_a_wrapped_models_backward_tells_is_shared(options: str) -> None:
    model, other = network(), network()
    wrapped = DistributedDataParallel(model, **OPTIONS[options])
    plain = DistributedDataParallel(other, **OPTIONS[options])
    engine, alone_model = Engine(wrapped), network()
    expected = Engine(alone_model).jacobian(alone_model(poses()).squeeze(1))
    for _ in range(2):
        outputs = wrapped(mine(poses())).squeeze(1), plain(mine(poses())).squeeze(1)
        with engine.listen(outputs[0]) as heard:
            found = gradients([model], outputs[0].sum().backward)
        for name, gradient in gradients([other], outputs[1].sum().backward).items():
            assert torch.equal(found[name], gradient)
        torch.testing.assert_close(heard.jacobian.gramian(), expected.gramian())


@pytest.mark.parametrize("view", [False, True])
def test_it_accumulates_beside_the_wrappers_own_steps(view: bool) -> None:
    """Under no_sync the wrapper's gradients are local until its next step; ours are global."""
    model, X = network(), poses()
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=view)
    engine = Engine(wrapped)
    rank, count = dist.get_rank(), dist.get_world_size()
    batches = [torch.randn(4, 5, generator=seeded(i)).double()
               for i in range(2 * count)]  # fmt: skip

    def steps() -> None:
        for number, synced in enumerate((False, True)):
            with nullcontext() if synced else wrapped.no_sync():
                engine.combine(list(mine(X)), Min(scale=3.0)).prediction.square().backward()
                wrapped(batches[2 * rank + number]).square().sum().backward()

    def expected() -> None:
        for _ in range(2):
            Engine(model).combine(list(X), Min(scale=3.0)).prediction.square().backward()
        for batch in batches:
            (model(batch).square().sum() / count).backward()

    found = gradients([model], steps)
    torch.testing.assert_close(found, gradients([model], expected), rtol=1e-9, atol=1e-11)
    assert same_everywhere(found)


def test_one_loss_of_the_group_and_of_a_batch() -> None:
    model, X = network(), poses()
    wrapped = DistributedDataParallel(model)
    engine, count = Engine(wrapped), dist.get_world_size()
    batch = torch.randn(4, 5, generator=seeded(dist.get_rank())).double()

    def step() -> None:
        prediction, _ = engine.combine(list(mine(X)), Min(scale=3.0))
        (prediction.square() + wrapped(batch).sum()).backward()

    def expected() -> None:
        loss = Engine(model).combine(list(X), Min(scale=3.0)).prediction.square()
        for rank in range(count):
            generator = seeded(rank)
            loss = loss + model(torch.randn(4, 5, generator=generator).double()).sum() / count
        loss.backward()

    found = gradients([model], step)
    torch.testing.assert_close(found, gradients([model], expected), rtol=1e-9, atol=1e-11)


def test_several_wrapped_modules_and_one_that_is_not() -> None:
    first, second = network()[:2], network()[2:]
    engine = Engine(
        DistributedDataParallel(first), second, predict=lambda a, b, pose: b(a(pose))
    )  # fmt: skip
    found = gradients(
        [first, second],
        lambda: engine.combine(list(mine(poses())), Mean()).prediction.backward(),
    )
    both = Engine(first, second, predict=lambda a, b, pose: b(a(pose)))
    expected = gradients(
        [first, second], lambda: both.combine(list(poses()), Mean()).prediction.backward()
    )
    torch.testing.assert_close(found, expected)


def test_a_module_of_a_wrapped_model_and_a_rule() -> None:
    model = network()
    module = MultiPose(DistributedDataParallel(model), Min(scale=3.0))
    engine = module.engine

    def step() -> None:
        module(list(mine(poses()))).prediction.square().backward()

    torch.testing.assert_close(gradients([model], step), alone(model), rtol=1e-9, atol=1e-11)
    assert module.engine is engine


def test_wrapped_parts_and_other_groups_are_refused() -> None:
    inside = nn.Sequential(DistributedDataParallel(network()))
    with pytest.raises(UnsupportedModuleError, match="0 is wrapped by DistributedDataParallel"):
        Engine(inside)
    first = dist.new_group([0])
    refused = r"several process groups" if dist.get_rank() == 0 else r"no group of|no member"
    with pytest.raises((TypeError, ValueError), match=refused):
        Engine(DistributedDataParallel(network()), process_group=first)
