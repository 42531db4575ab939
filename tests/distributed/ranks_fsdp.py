"""A model whose parameters are sharded by FSDP2's `fully_shard`."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from posegrad import (
    Boltzmann,
    Combination,
    Engine,
    Mean,
    Min,
    MultiPose,
    NoPosesError,
    RankError,
    UnsupportedModuleError,
)
from tests.distributed.setting import FEATURES, IDS, M, network, poses

# A linear layer of one row returns a view, which FSDP2 would not have written to in place.
pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")


def own(everyone: Tensor) -> Tensor:
    """This rank's part: uneven, but every rank has a pose."""
    sizes = {2: (8, 3), 3: (7, 1, 3)}[dist.get_world_size()]
    return everyone.split(sizes)[dist.get_rank()]


def sharded(model: nn.Sequential, *, inner: bool = True) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model if inner else ():
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def full(model: nn.Module) -> dict[str, Tensor | None]:
    """Whole gradients, from the parts of all ranks."""
    for module in model.modules():
        getattr(module, "reshard", lambda: None)()
    return {
        name: None if p.grad is None else p.grad.full_tensor()
        for name, p in model.named_parameters()
    }


def squares(prediction: Tensor, per_pose: Tensor) -> Tensor:
    return prediction.square().sum()


def of_both(prediction: Tensor, per_pose: Tensor) -> Tensor:
    return prediction.square().sum() + (per_pose * torch.arange(M)).sum()


def expected(
    rule: Combination, loss: Callable[[Tensor, Tensor], Tensor], groups: Tensor | None = None
) -> dict[str, Tensor | None]:
    model = network()
    loss(*Engine(model).combine(list(poses()), rule, groups=groups, schedule="retain")).backward()
    return {name: p.grad for name, p in model.named_parameters()}


RULES: dict[str, Callable[[], Combination]] = {
    "Mean": Mean,
    "Min(3)": lambda: Min(scale=3.0),
    "Min(1000)": lambda: Min(scale=1000.0),  # most ranks have no pose to differentiate
    "Boltzmann": lambda: Boltzmann(kT=0.5),
}


@pytest.mark.parametrize("inner", [False, True], ids=["one unit", "layer by layer"])
@pytest.mark.parametrize("loss", [squares, of_both])
@pytest.mark.parametrize("rule", RULES)
def test_a_step_equals_the_unsharded_one(
    rule: str, loss: Callable[[Tensor, Tensor], Tensor], inner: bool
) -> None:
    model = sharded(network(), inner=inner)
    engine = Engine(model)
    for _ in range(2):
        loss(*engine.combine(list(own(poses())), RULES[rule]())).backward()
        close = torch.testing.assert_close
        close(full(model), expected(RULES[rule](), loss), rtol=1e-9, atol=1e-11)
        model.zero_grad()


def test_embeddings_equal_those_of_the_unsharded_model() -> None:
    model, whole = sharded(network()), network()
    embeddings = Engine(model).embed(list(own(poses())))
    torch.testing.assert_close(embeddings, whole(poses()).squeeze(1))
    torch.outer(embeddings, embeddings).logsumexp(1).sum().backward()
    expected = whole(poses()).squeeze(1)
    torch.outer(expected, expected).logsumexp(1).sum().backward()
    close = torch.testing.assert_close
    close(
        full(model), {name: p.grad for name, p in whole.named_parameters()}, rtol=1e-9, atol=1e-11
    )


def test_groups_chunks_and_accumulation() -> None:
    model = sharded(network())
    engine = Engine(model, chunk_size=2, collate=torch.stack)
    for _ in range(2):
        combined = engine.combine(list(own(poses())), Min(scale=3.0), groups=own(IDS))
        squares(*combined).backward()
    found = full(model)
    once = expected(Min(scale=3.0), squares, IDS)
    torch.testing.assert_close(found, {name: 2 * g for name, g in once.items()})


def test_training_equals_that_of_the_unsharded_model() -> None:
    model, whole = sharded(network()), network()
    engine, alone = Engine(model), Engine(whole)
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.1) for m in (model, whole)]
    for _ in range(4):
        engine.combine(list(own(poses())), Min(scale=3.0)).prediction.square().backward()
        alone.combine(list(poses()), Min(scale=3.0)).prediction.square().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        found = engine.combine(list(own(poses())), Min(scale=3.0)).prediction
        torch.testing.assert_close(found, alone.combine(list(poses()), Min(scale=3.0)).prediction)


def test_poses_that_require_grad() -> None:
    model = sharded(network())
    mine = [pose.clone().requires_grad_() for pose in own(poses())]
    Engine(model).combine(mine, Boltzmann(kT=0.5)).prediction.backward()
    X = poses().requires_grad_()
    Engine(network()).combine(X, Boltzmann(kT=0.5)).prediction.backward()
    torch.testing.assert_close(torch.stack([pose.grad for pose in mine]), own(X.grad))


def test_random_numbers_go_on_where_they_were() -> None:
    """Also on the rank that runs its first pose again to keep in step with the others."""
    layers = (nn.Linear(FEATURES, 64), nn.Dropout(0.5), nn.Linear(64, 1))
    engine = Engine(sharded(nn.Sequential(*layers).double()))
    X = torch.ones(M, FEATURES, dtype=torch.float64)
    torch.manual_seed(dist.get_rank())
    seen = []
    for _ in range(3):
        _, per_pose = engine.combine(list(own(X)), Mean())
        per_pose.sum().backward()  # the masks are those of the first pass, or ReplayError
        seen += own(per_pose.detach()).tolist()
    assert len(set(seen)) == len(seen)


def test_a_backward_of_the_model_around_ours_is_refused() -> None:
    model = sharded(network())
    engine = Engine(model)
    loss = engine.combine(list(own(poses())), Mean()).prediction + model(own(poses())).sum()
    with pytest.raises(UnsupportedModuleError, match="one after the other"):
        loss.backward()


def test_a_module_form() -> None:
    model = sharded(network())
    module = MultiPose(model, Min(scale=3.0))
    squares(*module(list(own(poses())))).backward()
    torch.testing.assert_close(full(model), expected(Min(scale=3.0), squares))


def test_what_cannot_be_served_is_refused() -> None:
    model = sharded(network())
    engine, mine = Engine(model), list(own(poses()))
    for schedule in ("stream", "store", "retain"):
        with pytest.raises(UnsupportedModuleError, match="get none but from backward"):
            engine.combine(mine, Mean(), schedule=schedule)
    for read in (engine.gather, lambda p: engine.jacobian(model(torch.stack(p)).squeeze(1))):
        with pytest.raises(UnsupportedModuleError, match="whose parameters are not in the graph"):
            read(mine)
    for p in model.parameters():
        assert p.grad is None


def test_a_rank_without_poses_is_named() -> None:
    engine = Engine(sharded(network()))
    mine = [] if dist.get_rank() == 0 else list(own(poses()))
    kind = NoPosesError if dist.get_rank() == 0 else RankError
    with pytest.raises(kind, match=r"Give every rank a pose|has no poses"):
        engine.combine(mine, Mean())


def test_models_sharded_in_part_or_too_late_are_refused() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    part = network()
    fully_shard(part[0], mesh=mesh)
    with pytest.raises(UnsupportedModuleError, match=r"2\.weight, 2\.bias.* are not"):
        Engine(part)
    late = network()
    engine = Engine(late)
    sharded(late)
    with pytest.raises(UnsupportedModuleError, match="after the engine was made"):
        engine.combine(list(poses()), Mean())
