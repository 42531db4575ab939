"""The Gramian of poses that ranks share, tile by tile: each rank has that of all."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from posegrad import Engine, NoPosesError, RankError, UnsupportedModuleError
from tests.device import seeded
from tests.distributed.setting import FEATURES, SHARES, mine, network, poses, same_everywhere

MANY = 7  # times the poses: some ranks have several blocks


def _shared(model: nn.Module, **options: Any) -> Engine:
    return Engine(model, process_group=dist.group.WORLD, **options)


def _drawn(seed: int, times: int = MANY) -> tuple[Tensor, Tensor]:
    """Poses of all ranks, in their order, and this rank's."""
    each = [
        torch.randn(times * m, FEATURES, generator=seeded(seed + rank), dtype=torch.float64)
        for rank, m in enumerate(SHARES[dist.get_world_size()])
    ]
    return torch.cat(each), each[dist.get_rank()]


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("memory", [1, 20_000, 60_000, 2**30])
def test_tiles_of_all_ranks_make_the_gramian(memory: int, width: int) -> None:
    model = network()
    model[-1] = nn.Linear(7, width).double()
    for p in model.parameters():
        dist.broadcast(p.detach(), 0)
    times = 1 if memory == 1 else MANY  # a block for each pose
    (X, own), (Y, others) = _drawn(10, times), _drawn(20, times)
    J, K = (Engine(model).gather(batch) for batch in (X, Y))
    engine = _shared(model, memory=memory)
    found = engine.gramian(own)
    torch.testing.assert_close(found, J.gramian())
    torch.testing.assert_close(engine.gramian(list(own), list(others)), J @ K.T)
    assert same_everywhere({"G": found})


def test_each_rank_gathers_a_share() -> None:
    model = network()
    X = torch.randn(64, FEATURES, generator=seeded(dist.get_rank()), dtype=torch.float64)
    engine, scored = _shared(model, memory=20_000, chunk_size=16), [0]
    blocks = Engine(model, memory=20_000, chunk_size=16).plan_gramian(X).blocks
    assert blocks == 4
    model.register_forward_hook(lambda *_: scored.__setitem__(0, scored[0] + 1))
    engine.gramian(X)
    assert scored[0] <= 1 + blocks + blocks**2  # one process of all would gather twice that or more


def test_numbers_of_poses_are_those_of_the_rank() -> None:
    model, (X, own) = network(), _drawn(10)
    targets = torch.randn(len(own), generator=seeded(3), dtype=torch.float64)
    found = _shared(model, memory=20_000).gramian(
        own, loss=lambda predictions, i: (predictions - targets[i]).square()
    )
    every: list[Tensor] = [torch.empty(0)] * dist.get_world_size()
    dist.all_gather_object(every, targets)
    targets = torch.cat(every)
    expected = Engine(model).gather(
        X, loss=lambda predictions, i: (predictions - targets[i]).square()
    )
    torch.testing.assert_close(found, expected.gramian())


def test_what_ranks_disagree_on_is_refused() -> None:
    model, engine = network(), _shared(network())
    with pytest.raises(NoPosesError, match="No rank has poses"):
        engine.gramian([])
    with pytest.raises(NoPosesError, match="No rank has poses"):
        engine.gramian(mine(poses()), [])
    with pytest.raises(RankError, match=r"Ranks \[1.*\] passed no others"):
        engine.gramian(mine(poses()), None if dist.get_rank() else poses())
    with pytest.raises(UnsupportedModuleError, match="depends on those of all"):
        engine.plan_gramian(mine(poses()))
    with torch.no_grad():
        model[0].weight += dist.get_rank()
    with pytest.raises(RankError, match="differentiate by different parameters"):
        _shared(model).gramian(mine(poses()))


def test_a_rank_that_fails_is_named_by_all() -> None:
    model = network()
    first = dist.get_rank() == 0

    def predict(model: nn.Module, pose: Tensor) -> Tensor:
        if first:
            raise KeyError("no such pose")
        return model(pose)

    with pytest.raises(KeyError if first else RankError, match="no such pose"):
        _shared(model, predict=predict).gramian(mine(poses()))
