"""`engine.loss` in two processes: one rule of all rows, or one a rank that DDP averages."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchjd.aggregation import UPGrad

from posegrad import Clip, Engine, Mean, Median
from posegrad.errors import RankError, UnsupportedModuleError
from tests.distributed.setting import DDP_OPTIONS, gradients, mine, network, poses, same_everywhere
from tests.loss.setting import Warm

RULES: dict[str, Any] = {
    "Clip": lambda: Clip(0.5),
    "Clip, by parameter": lambda: Clip(0.5, by="parameter"),
    "UPGrad": UPGrad,
    "Median": Median,
    "Mean": Mean,
}


def _losses(model: nn.Module, X: Tensor) -> Tensor:
    return (model(X).squeeze(1) - 1.0).square()


def _averaged(rule: str, batches: list[Tensor]) -> dict[str, Tensor | None]:
    """The mean over the batches of what a rule makes of each, in one process."""
    alone = network()
    engine = Engine(alone)
    for X in batches:
        (engine.loss(_losses(alone, X), RULES[rule]()) / len(batches)).backward()
    return gradients([alone], lambda: None)


def _check(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert same_everywhere(found)


@pytest.mark.parametrize("options", DDP_OPTIONS)
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_for_each_rank_is_averaged(rule: str, options: str) -> None:
    if rule != "Clip" and options not in ("plain", "static graph"):
        pytest.skip("one rule is enough for the other options")
    model = network()
    ddp = DistributedDataParallel(model, **DDP_OPTIONS[options])
    engine = Engine(ddp.module)
    for step in range(3):
        X = poses() + step
        found = gradients(
            [model], lambda X=X: engine.loss(_losses(ddp, mine(X)), RULES[rule]()).backward()
        )
        _check(found, _averaged(rule, [*X.split((8, 3))]))


@pytest.mark.parametrize("options", ["plain", "bucket views", "static graph"])
def test_accumulation_without_talking(options: str) -> None:
    model = network()
    ddp = DistributedDataParallel(model, **DDP_OPTIONS[options])
    engine = Engine(ddp.module)
    if options == "static graph":  # torch itself fails if the first backward is one without talking
        gradients([model], lambda: engine.loss(_losses(ddp, mine(poses())), Clip(0.5)).backward())

    def step() -> None:
        for i in range(3):
            with ddp.no_sync() if i < 2 else nullcontext():
                loss = engine.loss(_losses(ddp, mine(poses() + i)), Clip(0.5))
                (loss / 3).backward()

    batches = [part for i in range(3) for part in (poses() + i).split((8, 3))]
    _check(gradients([model], step), _averaged("Clip", batches))


@pytest.mark.parametrize("options", DDP_OPTIONS)
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("rule", ["Clip", "Clip, by parameter", "Median"])
def test_one_rule_of_all_rows(rule: str, inside: bool, options: str) -> None:
    """The forward goes through DDP, which then averages what is alike, or through the model."""
    if rule == "Clip, by parameter" and options != "plain":
        pytest.skip("two rules are enough for the other options")
    model, alone = network(), network()
    ddp = DistributedDataParallel(model, **DDP_OPTIONS[options])
    engine, plain = Engine(ddp), Engine(alone)
    expected = gradients(
        [alone], lambda: plain.loss(_losses(alone, poses()), RULES[rule]()).backward()
    )
    values = []

    def step() -> None:
        loss = engine.loss(_losses(ddp if inside else model, mine(poses())), RULES[rule]())
        values.append(loss.detach())
        (2 * loss).backward()

    for _ in range(3):
        found = gradients([model], step)
        _check(found, {name: 2 * g for name, g in expected.items()})
    torch.testing.assert_close(
        values[0], plain.loss(_losses(alone, poses()), RULES[rule]()).detach()
    )


def test_rows_alone_are_refused_where_ddp_waits_for_its_first_backward() -> None:
    """Its gradients would have stayed local."""
    model = network()
    ddp = DistributedDataParallel(model, static_graph=True)
    engine = Engine(ddp.module)
    with pytest.raises(UnsupportedModuleError, match=r"(?s)static_graph=True.*engine\.loss"):
        engine.backward(_losses(ddp, mine(poses())), Clip(0.5))
    assert all(p.grad is None for p in model.parameters())
    for _ in range(2):  # the first by the scalar; then by rows as well
        found = gradients(
            [model], lambda: engine.loss(_losses(ddp, mine(poses())), Clip(0.5)).backward()
        )
        _check(found, _averaged("Clip", [*poses().split((8, 3))]))
    found = gradients([model], lambda: engine.backward(_losses(ddp, mine(poses())), Clip(0.5)))
    _check(found, _averaged("Clip", [*poses().split((8, 3))]))


def test_without_gradients_no_rank_waits() -> None:
    model = network()
    engine = Engine(DistributedDataParallel(model))
    if dist.get_rank() == 0:
        with torch.no_grad():
            loss = engine.loss(_losses(model, mine(poses())), Clip(0.5))
        torch.testing.assert_close(loss, _losses(model, mine(poses())).mean().detach())


def test_a_rank_without_losses_has_the_gradient_too() -> None:
    model, alone = network(), network()
    engine = Engine(model, process_group=dist.group.WORLD)
    X = poses()
    own = X if dist.get_rank() == 0 else X[:0]
    found = gradients([model], lambda: engine.loss(_losses(model, own), Clip(0.5)).backward())
    expected = gradients(
        [alone], lambda: Engine(alone).loss(_losses(alone, X), Clip(0.5)).backward()
    )
    _check(found, expected)


def test_a_trained_rule_beside_heads_that_each_rank_has() -> None:
    model, alone, rule, plain = network(), network(), Warm(), Warm()
    engine = Engine(model, process_group=dist.group.WORLD)
    head, own = nn.Linear(1, 1).double(), poses()
    with torch.no_grad():
        head.weight.fill_(0.5)

    def step() -> None:
        loss = engine.loss(head(model(mine(own))).squeeze(1).square(), rule)
        assert rule.beta.grad is None
        loss.backward()

    found = gradients([model, rule], step)
    expected = gradients(
        [alone, plain],
        lambda: Engine(alone).loss(head(alone(own)).squeeze(1).square(), plain).backward(),
    )
    _check(found, expected)
    head.zero_grad()
    step()
    of_loss = head.weight.grad.clone()
    head.zero_grad()
    head(model(mine(own))).square().sum().backward()
    torch.testing.assert_close(of_loss, head.weight.grad)  # the sum of this rank's own losses


def test_a_failure_on_one_rank_stops_all() -> None:
    model = network()
    engine = Engine(DistributedDataParallel(model))
    own = _losses(model, mine(poses()))
    if dist.get_rank() == 1:
        with pytest.raises(TypeError, match="The output is a str"):
            engine.loss("losses", Clip(0.5))  # type: ignore[arg-type]
    else:
        with pytest.raises(RankError, match="Rank 1: TypeError"):
            engine.loss(own, Clip(0.5))
    assert all(p.grad is None for p in model.parameters())
    engine.loss(_losses(model, mine(poses())), Clip(0.5)).backward()


def _noisy(seed: int) -> Clip:
    return Clip(1.0, noise_multiplier=2.0, generator=torch.Generator("cpu").manual_seed(seed))


def test_one_draw_of_noise_over_all_ranks_and_micro_batches() -> None:
    silent, noisy = network(), network()
    ddp = DistributedDataParallel(noisy)
    rule, engine, plain = _noisy(3), Engine(ddp.module), Engine(silent)
    batches = [poses(), poses() + 1]

    def step() -> None:
        for i, X in enumerate(batches):
            rule.last(i == 1 and dist.get_rank() == 0)
            with ddp.no_sync() if i == 0 else nullcontext():
                engine.loss(_losses(ddp, mine(X)), rule).backward()

    found = gradients([noisy], step)
    for X in batches:
        for part in X.split((8, 3)):
            (plain.loss(_losses(silent, part), Clip(1.0)) / 2).backward()
    expected = gradients([silent], lambda: None)
    drawn = torch.Generator("cpu").manual_seed(3)
    for name, p in noisy.named_parameters():
        noise = 2.0 * torch.randn(p.shape, generator=drawn)
        torch.testing.assert_close(found[f"0.{name}"], expected[f"0.{name}"] + noise / 2)


def test_one_rule_of_all_rows_draws_once() -> None:
    model, alone = network(), network()
    engine = Engine(DistributedDataParallel(model))
    found = gradients(
        [model], lambda: engine.loss(_losses(model, mine(poses())), _noisy(3)).backward()
    )
    expected = gradients(
        [alone], lambda: Engine(alone).loss(_losses(alone, poses()), _noisy(3)).backward()
    )
    _check(found, expected)


def test_what_only_one_rank_uses() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(network() for _ in range(3))

        def forward(self, X: Tensor, number: int) -> Tensor:
            return self.experts[number](X).squeeze(1)

    model, alone = Experts(), Experts()
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    engine = Engine(ddp.module)
    for step in range(3):
        used = (dist.get_rank() + step) % 3
        loss = engine.loss(ddp(mine(poses()), used).square(), Clip(0.5))
        found = gradients([model], loss.backward)
        for rank, part in enumerate(poses().split((8, 3))):
            own = alone(part, (rank + step) % 3).square()
            (Engine(alone).loss(own, Clip(0.5)) / 2).backward()
        expected = gradients([alone], lambda: None)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_losses_of_one_of_two_outputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = network(), network()

        def forward(self, X: Tensor) -> tuple[Tensor, Tensor]:
            return self.one(X), self.other(X)

    model = Two()
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    engine = Engine(ddp.module)
    for _ in range(3):
        own = ddp(mine(poses()))[0].squeeze(1).square()
        found = gradients([model], engine.loss(own, Clip(0.5)).backward)
        alone = network()
        for part in poses().split((8, 3)):
            own = alone(part).squeeze(1).square()
            (Engine(alone).loss(own, Clip(0.5)) / 2).backward()
        for name, p in alone.named_parameters():
            torch.testing.assert_close(found[f"0.one.{name}"], p.grad, rtol=1e-10, atol=1e-12)
            assert found[f"0.other.{name}"] is None
