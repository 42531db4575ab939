"""What one rank does wrong stops all ranks, by name, and leaves them able to go on."""

from collections.abc import Callable
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from posegrad import (
    Clip,
    Engine,
    Mean,
    Min,
    NonFinitePredictionError,
    NoPosesError,
    PerPoseLossError,
    RankError,
    ShapeMismatchError,
    StaleParametersError,
    TopK,
    UntrackedTensorError,
    Weighting,
)
from tests.distributed.setting import FEATURES, IDS, mine, network, poses


class Failing(nn.Module):
    """Fails, or worse, on one rank."""

    def __init__(self, fail: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.fail = nn.Linear(FEATURES, 1).double(), fail

    def forward(self, pose: Tensor) -> Tensor:
        y = self.linear(pose)
        return self.fail(y) if dist.get_rank() == 0 else y


def _raising(y: Tensor) -> Tensor:
    raise ArithmeticError("the charges do not add up")


FAILURES: dict[str, tuple[Callable[[Tensor], Tensor], type[Exception], str]] = {
    "the model raises": (_raising, ArithmeticError, "the charges do not add up"),
    "nan": (lambda y: y * torch.nan, NonFinitePredictionError, "of 8|of 1 poses are not finite"),
    "no tensor": (lambda y: (y, y), Exception, "a tuple of 2"),
}


@pytest.mark.parametrize("schedule", ["auto", "stream", "recompute", "store"])
@pytest.mark.parametrize("failure", FAILURES)
def test_one_failing_rank_stops_all_by_name(failure: str, schedule: str) -> None:
    fail, kind, message = FAILURES[failure]
    model, X = Failing(fail), poses()
    engine = Engine(model, process_group=dist.group.WORLD)
    if dist.get_rank() == 0:
        with pytest.raises(kind, match=message):
            engine.combine(list(mine(X)), Mean(), schedule=schedule)
    else:
        with pytest.raises(RankError, match=f"(?s)stops at.*Rank 0: .*({message})"):
            engine.combine(list(mine(X)), Mean(), schedule=schedule)
    model.fail = lambda y: y
    engine.combine(list(mine(X)), Mean(), schedule=schedule).prediction.backward()
    assert model.linear.weight.grad is not None


def test_a_failure_in_backward_stops_all_by_name() -> None:
    model, X = network(), poses()
    engine = Engine(model, process_group=dist.group.WORLD)
    prediction, _ = engine.combine(list(mine(X)), Mean(), schedule="recompute")
    if dist.get_rank() == 0:
        with torch.no_grad():
            model[0].weight.add_(1)
        with pytest.raises(StaleParametersError, match=r"0\.weight"):
            prediction.backward()
    else:
        with pytest.raises(RankError, match="Rank 0: StaleParametersError"):
            prediction.backward()
    assert all(p.grad is None for p in model.parameters())


def test_what_differs_between_ranks_is_named() -> None:
    model, X, first = network(), poses(), dist.get_rank() == 0
    engine = Engine(model, process_group=dist.group.WORLD)
    with pytest.raises(RankError, match="schedule \\(stream, recompute"):
        engine.combine(list(mine(X)), Mean(), schedule="stream" if first else "recompute")
    with pytest.raises(RankError, match=r"rule \(Mean\(\), Min\(scale=1\)"):
        engine.combine(list(mine(X)), Mean() if first else Min(scale=1.0))
    with pytest.raises(RankError, match=r"rule \(TopK\(k=2.*TopK\(k=3"):
        engine.combine(list(mine(X)), TopK(2) if first else TopK(3))
    with pytest.raises(RankError, match=r"rules .*Clip\(max_norm=1,.*Clip\(max_norm=2,"):
        engine.gather(list(mine(X))).backward(Clip(1.0) if first else Clip(2.0))
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(RankError, match="groups \\(given, none"):
        engine.combine(list(mine(X)), Mean(), groups=mine(IDS) if first else None)
    with pytest.raises(RankError, match="no_grad"), torch.set_grad_enabled(first):
        engine.combine(list(mine(X)), Mean())


def test_a_rank_at_another_step_is_named() -> None:
    model, X = network(), poses()
    engine = Engine(model, process_group=dist.group.WORLD)
    prediction, _ = engine.combine(list(mine(X)), Mean())
    first = dist.get_rank() == 0
    step = prediction.backward if first else partial(engine.combine, list(mine(X)), Mean())
    with pytest.raises(RankError, match=r"rank [01] at '(backward of call|combine)"):
        step()


def test_bad_calls_are_refused_on_all_ranks() -> None:
    model, X = network(), poses()
    engine = Engine(model, process_group=dist.group.WORLD)
    own = list(mine(X))
    with pytest.raises(ValueError, match="plain autograd, whose gradients would stay"):
        engine.combine(own, Mean(), schedule="retain")
    with pytest.raises(NoPosesError, match="on any rank"):
        engine.combine([], Mean())
    with pytest.raises(NoPosesError, match=r"Group\(s\) without poses: 1"):
        engine.combine(own, Mean(), groups=2 * (torch.arange(len(own)) % 2))
    _, per_pose = engine.combine(own, Mean())
    with pytest.raises(PerPoseLossError, match="recompute"):
        per_pose.sum().backward()
    assert all(p.grad is None for p in model.parameters())


def test_poses_and_groups_must_agree_on_each_rank() -> None:
    """One too many here and one too few there would add up, and shift all that lies between."""
    model, X = network(), poses()
    engine = Engine(model, process_group=dist.group.WORLD)
    owners = mine(IDS)
    changed = torch.cat([owners, owners[:1]]) if dist.get_rank() == 0 else owners[:-1]
    with pytest.raises((ShapeMismatchError, RankError), match="groups assigns"):
        engine.combine(iter(mine(X)), Mean(), groups=changed)


def test_what_would_stay_local_is_refused() -> None:
    model, X = network(), poses()
    engine = Engine(model, process_group=dist.group.WORLD)
    encoder = nn.Linear(FEATURES, FEATURES).double()
    with pytest.raises((UntrackedTensorError, RankError), match="computed with a graph"):
        engine.combine([encoder(pose) for pose in mine(X)], Mean())
    temperature = torch.ones((), requires_grad=True, dtype=torch.float64)
    with pytest.raises(UntrackedTensorError, match="neither a parameter") as caught:
        engine.combine(list(mine(X)), lambda y: (y * temperature).sum())
    assert any("It enters by the rule" in note for note in caught.value.__notes__)


def test_a_group_that_is_none_is_refused() -> None:
    model = network()
    with pytest.raises(TypeError, match="no group of processes"):
        Engine(model, process_group="world")
    first = dist.new_group([0])
    if dist.get_rank() == 0:
        Engine(model, process_group=first).combine(list(poses()), Mean()).prediction.backward()
        assert model[0].weight.grad is not None
    else:
        with pytest.raises((TypeError, ValueError), match=r"no group of|no member"):
            Engine(model, process_group=first)


def test_ranks_that_train_different_parameters_are_refused() -> None:
    """Gradients are summed by their place."""
    model, X = network(), poses()
    engine = Engine(model, process_group=dist.group.WORLD)
    (model[4] if dist.get_rank() == 0 else model[0]).bias.requires_grad_(False)
    with pytest.raises(RankError, match=r"trained parameters \(5 tensors"):
        engine.combine(list(mine(X)), Mean())
    with pytest.raises(RankError, match="differentiate by different parameters"):
        engine.jacobian(model(mine(X)).squeeze(1))
    model.requires_grad_(True)
    params = ["0.weight"] if dist.get_rank() == 0 else ["2.weight"]
    with pytest.raises(RankError, match="differentiate by different parameters"):
        engine.jacobian(model(mine(X)).squeeze(1), params=params)


def test_models_with_other_values_are_refused() -> None:
    """Seeded by the rank, as a model that no wrapper made alike."""
    torch.manual_seed(dist.get_rank())
    model, X = nn.Linear(FEATURES, 1).double(), poses()
    for use in (
        lambda engine: engine.combine(list(mine(X)), Mean()),
        lambda engine: engine.gather(list(mine(X))),
    ):
        with pytest.raises(RankError, match=r"parameters.*values"):
            use(Engine(model, process_group=dist.group.WORLD))


@pytest.mark.parametrize("schedule", ["auto", "stream"])
def test_rules_that_weigh_otherwise_are_refused(schedule: str) -> None:
    """Their running sums would be added up."""
    engine = Engine(network(), process_group=dist.group.WORLD)
    rule = Min(scale=3.0) if dist.get_rank() == 0 else Min(scale=5.0)
    with pytest.raises(RankError, match=r"weights of the rule .*3\.0.*5\.0"):
        engine.combine(list(mine(poses())), rule, schedule=schedule)


def test_backward_in_another_order_is_refused() -> None:
    model, X = network(), poses()
    engine = Engine(model, process_group=dist.group.WORLD)
    first, _ = engine.combine(list(mine(X)), Mean())
    second, _ = engine.combine(list(mine(X)), Min(scale=3.0))
    with pytest.raises(RankError, match=r"rank [01] at 'backward of call"):
        (first if dist.get_rank() == 0 else second).backward()
    assert all(p.grad is None for p in model.parameters())


def _raises_on_first(predictions: Tensor) -> Tensor:
    return _raising(predictions) if dist.get_rank() == 0 else predictions.mean()


class Picky(Weighting):
    """Fails on the first rank."""

    def forward(self, gramian: Tensor, predictions: Tensor) -> Tensor:
        return _raises_on_first(predictions) * torch.ones_like(predictions)


LOCAL: dict[str, Callable[[Engine, Tensor], object]] = {
    "a rule raises": lambda engine, X: engine.combine(list(X), _raises_on_first),
    "a weighting raises": lambda engine, X: engine.gather(list(X)).backward(Picky()),
    "no rule": lambda engine, X: engine.gather(list(X)).backward(
        "x" if dist.get_rank() == 0 else Mean()
    ),
    "no row": lambda engine, X: engine.gather(list(X))[99 if dist.get_rank() == 0 else 0],
    "no parameter": lambda engine, X: engine.jacobian(
        engine.modules[0](X).squeeze(1), params=["x" if dist.get_rank() == 0 else "0.weight"]
    ),
}


@pytest.mark.parametrize("mistake", LOCAL)
def test_a_mistake_on_one_rank_is_told(mistake: str) -> None:
    model, X = network(), poses()
    engine = Engine(model, process_group=dist.group.WORLD)
    first = dist.get_rank() == 0
    expected = (ArithmeticError, TypeError, IndexError, ValueError) if first else RankError
    with pytest.raises(expected) as caught:
        LOCAL[mistake](engine, mine(X))
    assert first or "Rank 0: " in str(caught.value)
    assert all(p.grad is None for p in model.parameters())
    engine.combine(list(mine(X)), Mean()).prediction.backward()


def test_a_rank_that_does_not_come_is_named() -> None:
    """The others do not wait for it longer than their process group does."""
    impatient = dist.new_group(timeout=timedelta(seconds=2))
    engine = Engine(network(), process_group=impatient)
    last = dist.get_world_size() - 1
    if dist.get_rank() != last:
        late = rf"waited in vain at the step 'combine' for rank {last}, not seen yet"
        with pytest.raises(RankError, match=late):
            engine.combine(list(mine(poses())), Mean())
    dist.barrier()
