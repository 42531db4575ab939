"""Every way to a gradient with a model that is wrapped for several processes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torchjd.aggregation import UPGrad

from posegrad import Boltzmann, Clip, Engine
from tests.distributed.setting import M, network, poses
from tests.modes.columns import Refused
from tests.modes.distributed import DDP, FSDP2, OUTCOMES
from tests.modes.ways import WAYS
from tests.schedules import SCHEDULES

Step = Callable[[Engine, Tensor], Any]


def _sharded(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    DDP: DistributedDataParallel,
    FSDP2: _sharded,
}


def own(everyone: Tensor) -> Tensor:
    """This rank's part; every rank has some."""
    parts = {2: (8, 3), 3: (7, 1, 3)}[dist.get_world_size()]
    return everyone.split(parts)[dist.get_rank()]


def _combined(schedule: str) -> Step:
    def step(engine: Engine, X: Tensor) -> None:
        prediction, _ = engine.combine(list(X), Boltzmann(0.6), schedule=schedule)
        prediction.square().backward()

    return step


def _scored(engine: Engine, X: Tensor) -> Tensor:
    return engine.modules[0](X).squeeze(1)


W = torch.linspace(-1, 2, M, dtype=torch.float64)

STEPS: dict[str, Step] = {
    **{s: _combined(s) for s in (*SCHEDULES, "auto")},
    "embed": lambda engine, X: torch.logsumexp(engine.embed(list(X)).square(), 0).backward(),
    "J.combine(w)": lambda engine, X: engine.jacobian(_scored(engine, X)).combine(W),
    "J.backward(w)": lambda engine, X: engine.jacobian(_scored(engine, X)).backward(W),
    "gather(poses)": lambda engine, X: engine.gather(list(X)).backward(W),
    "J.gramian()": lambda engine, X: engine.jacobian(_scored(engine, X)).gramian(),
    "compute_gramian": lambda engine, X: engine.compute_gramian(_scored(engine, X)),
    "backward(Clip)": lambda engine, X: engine.backward(_scored(engine, X), Clip(0.5)),
    "backward(UPGrad)": lambda engine, X: engine.backward(_scored(engine, X), UPGrad()),
    "loss(Clip)": lambda engine, X: engine.loss(_scored(engine, X), Clip(0.5)).backward(),
    "loss(UPGrad)": lambda engine, X: engine.loss(_scored(engine, X), UPGrad()).backward(),
}


def _whole(gradient: Any) -> Any:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


# A linear layer of one row returns a view, which FSDP2 would not have written to in place.
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", OUTCOMES)
def test_a_wrapped_model(mode: str, way: str) -> None:
    model, alone, outcome = network(), network(), OUTCOMES[mode][way]
    engine = Engine(WRAPPERS[mode](model))
    if isinstance(outcome, Refused):
        with pytest.raises(outcome.error, match=outcome.match):
            STEPS[way](engine, own(poses()))
        assert all(p.grad is None for p in model.parameters())
        way = "auto"  # the engine goes on
    found = STEPS[way](engine, own(poses()))
    expected = STEPS[way](Engine(alone), poses())
    torch.testing.assert_close(found, expected)
    for part in model.modules():
        getattr(part, "reshard", lambda: None)()
    pairs = zip(model.parameters(), alone.parameters(), strict=True)
    for parameter, reference in pairs:
        torch.testing.assert_close(_whole(parameter.grad), reference.grad, rtol=1e-8, atol=1e-10)
