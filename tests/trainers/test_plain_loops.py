"""Loops by hand: schedulers, clipping, loss scaling, saving in the middle, averaged copies."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from posegrad import Min, MultiPose
from tests.device import DEVICE
from tests.trainers.oracle import RULES, Compound, assert_same, compounds, network, plain_step


def _loss(module: nn.Module, compound: Compound) -> Tensor:
    poses, target = compound
    return (module(poses).prediction - target).square()


def _training(module: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05, weight_decay=0.1)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=8)


def _train(module: nn.Module, optimizer: Any, scheduler: Any, data: list[Compound]) -> None:
    for compound in data:
        optimizer.zero_grad()
        _loss(module, compound).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 0.3)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("name", RULES)
def test_schedulers_and_clipping(name: str) -> None:
    schedule, rule = RULES[name]
    module, plain = MultiPose(network(), rule(), schedule=schedule), MultiPose(network(), rule())
    data = compounds(8)
    _train(module, *_training(module), data)
    optimizer, scheduler = _training(plain)
    for compound in data:
        optimizer.zero_grad()
        plain_step(plain.model, plain.rule, [compound])
        nn.utils.clip_grad_norm_(plain.parameters(), 0.3)
        optimizer.step()
        scheduler.step()
    assert_same(module, plain)


def test_float16_with_a_scaler_that_backs_off() -> None:
    """The first scale overflows, so that a step is skipped; auto takes `recompute`."""
    module, plain = MultiPose(network().float(), Min(2.0)), network().float()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (module.model, plain)]
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**16)
    taken = 0
    for poses, target in compounds(6):
        poses, target = poses.float(), target.float()
        optimizers[0].zero_grad()
        with torch.autocast(DEVICE.type, torch.float16):
            loss = _loss(module, (poses, target))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizers[0])
        finite = all(p.grad.isfinite().all() for p in module.parameters())
        nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        scaler.step(optimizers[0])
        scaler.update()
        if finite:
            taken += 1
            optimizers[1].zero_grad()
            plain_step(plain, Min(2.0), [(poses, target)])
            nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            optimizers[1].step()
    assert 1 <= taken < 6
    for p, q in zip(module.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=5e-3, atol=5e-3)


def _saved(state: object) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)  # weights only, as by default


@pytest.mark.parametrize("name", RULES)
def test_saved_in_the_middle_it_goes_on_bit_for_bit(name: str) -> None:
    schedule, rule = RULES[name]
    model = nn.Sequential(nn.Dropout(0.3), *network())
    module = MultiPose(model, rule(), schedule=schedule)
    parts = (module, *_training(module))
    data = compounds(8)
    _train(*parts, data[:4])
    state = _saved([part.state_dict() for part in parts] + [torch.get_rng_state()])
    _train(*parts, data[4:])

    resumed = MultiPose(nn.Sequential(nn.Dropout(0.3), *network()), rule(), schedule=schedule)
    again = (resumed, *_training(resumed))
    for part, saved in zip(again, state[:3], strict=True):
        part.load_state_dict(saved)
    torch.set_rng_state(state[3])
    _train(*again, data[4:])
    for p, q in zip(module.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_module_saved_whole_goes_on_bit_for_bit() -> None:
    module = MultiPose(network(), Min(1000.0), chunk_size=2)
    data = compounds(8)
    _train(module, *_training(module), data[:4])
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    for one in (module, other):
        _train(one, *_training(one), data[4:])
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", RULES)
def test_averaged_copies(name: str) -> None:
    schedule, rule = RULES[name]
    module = MultiPose(network(), rule(), schedule=schedule)
    module(compounds(1)[0][0])  # the copy is made of one that has been used
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.6))
    expected = [p.detach().clone() for p in module.parameters()]
    optimizer, scheduler = _training(module)
    for i, compound in enumerate(compounds(4)):
        _train(module, optimizer, scheduler, [compound])
        average.update_parameters(module)
        keep = 0.6 if i else 0.0  # the first update copies
        for e, p in zip(expected, module.parameters(), strict=True):
            e.mul_(keep).add_((1 - keep) * p.detach())
    for p, e in zip(average.module.parameters(), expected, strict=True):
        torch.testing.assert_close(p, e, rtol=1e-12, atol=1e-12)

    poses, _ = compounds(1, seed=1)[0]
    with torch.no_grad():
        found = average(poses).prediction
        by_hand = average.module.rule(average.module.model(poses).squeeze(1))
        assert not torch.allclose(found, module(poses).prediction)
    torch.testing.assert_close(found, by_hand, rtol=1e-10, atol=1e-10)


def _state(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: AveragedModel(m).module])
@pytest.mark.parametrize("name", RULES)
def test_copies_train_apart(name: str, copied: Any) -> None:
    schedule, rule = RULES[name]
    module = MultiPose(network(), rule(), schedule=schedule)
    first, *data = compounds(5)
    _loss(module, first).backward()  # its engine has seen a group
    other = copied(module)
    module.zero_grad()
    other.zero_grad()
    assert {id(p) for p in module.parameters()}.isdisjoint(map(id, other.parameters()))
    for one, still in ((module, other), (other, module)):
        before, moved = _state(still), _state(one)
        _train(one, *_training(one), data)
        assert all(map(torch.equal, before, _state(still)))
        assert all(p.grad is None for p in still.parameters())
        assert not any(map(torch.equal, moved, _state(one)))
        one.zero_grad()
    assert_same(module, other)  # each learnt the same, apart
