"""Law 5: what an engine does to the model and to torch, beyond delivering gradients."""

import copy
import gc
import pickle
import random
import weakref
from collections import UserDict
from collections.abc import Callable
from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from posegrad import Combination, Engine, Mean, Min
from tests.models import FEATURES, MODELS
from tests.schedules import SCHEDULES


def _step(engine: Engine, batch: Tensor, schedule: str, rule: Combination) -> None:
    engine.combine(list(batch), rule, schedule=schedule).prediction.square().backward()


def _flat(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["mlp", "dropout", "encoder"])
def test_running_twice_is_bitwise_equal(name: str, schedule: str) -> None:
    model, batch = MODELS[name](), torch.randn(6, FEATURES)
    gradients = []
    for _ in range(2):
        torch.manual_seed(1)
        model.zero_grad()
        _step(Engine(model), batch, schedule, Min(2.0))
        gradients.append(_flat(model))
    assert torch.equal(*gradients)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradients_accumulate_over_compounds(schedule: str) -> None:
    model = MODELS["mlp"]().double()
    compounds = [torch.randn(m, FEATURES, dtype=torch.float64) for m in (2, 5, 3)]
    engine = Engine(model)
    separate = torch.zeros(())
    for batch in compounds:
        model.zero_grad()
        _step(engine, batch, schedule, Min(2.0))
        separate = separate + _flat(model)

    model.zero_grad()
    for batch in compounds:
        _step(engine, batch, schedule, Min(2.0))
    torch.testing.assert_close(_flat(model), separate)

    model.zero_grad()  # one backward for all: their graphs, or what is left of them, coexist
    parts = [engine.combine(list(b), Min(2.0), schedule=schedule).prediction for b in compounds]
    torch.stack([part.square() for part in parts]).sum().backward()
    torch.testing.assert_close(_flat(model), separate)


def _embedded() -> nn.Module:
    """Its forward writes to a parameter: rows that are longer than `max_norm` are shortened."""
    return nn.Sequential(nn.Embedding(9, 4, max_norm=0.5), nn.Flatten(), nn.Linear(8, 1)).double()


@pytest.mark.parametrize("then", SCHEDULES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_forward_that_writes_to_a_parameter_does_not_make_it_stale(
    schedule: str, then: str
) -> None:
    poses = torch.randint(9, (5, 1, 2)), torch.randint(9, (3, 1, 2))
    torch.manual_seed(1)
    model = _embedded()
    first, second = (Min(2.0)(torch.cat([model(pose)[:, 0] for pose in group])) for group in poses)
    (3 * first + second).backward()
    expected = _flat(model)

    torch.manual_seed(1)
    model = _embedded()
    first, second = (
        Engine(model).combine(list(group), Min(2.0), schedule=name).prediction
        for group, name in zip(poses, (schedule, then), strict=True)
    )
    first.backward(retain_graph=True)
    (2 * first + second).backward()
    torch.testing.assert_close(_flat(model), expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_combine_leaves_grad_alone_until_backward(schedule: str) -> None:
    model = MODELS["mlp"]()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    prediction, _ = Engine(model).combine(list(torch.randn(4, FEATURES)), Mean(), schedule=schedule)
    assert bool((_flat(model) == 1).all())
    prediction.backward()
    assert not bool((_flat(model) == 1).all())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_unused_and_frozen_parameters_keep_grad_none(schedule: str) -> None:
    model = MODELS["unused and frozen"]()
    _step(Engine(model), torch.randn(4, FEATURES), schedule, Mean())
    assert model.unused.grad is None
    assert model.frozen.weight.grad is None
    assert model.linear.weight.grad is not None


@pytest.mark.parametrize("schedule", ["store", "stream", "recompute"])
def test_backward_twice_accumulates_if_the_graph_is_kept(schedule: str) -> None:
    model, batch = MODELS["mlp"]().double(), torch.randn(4, FEATURES, dtype=torch.float64)
    prediction, _ = Engine(model).combine(list(batch), Mean(), schedule=schedule)
    prediction.backward(retain_graph=True)
    once = _flat(model).clone()
    prediction.backward()
    torch.testing.assert_close(_flat(model), 2 * once)


@pytest.mark.parametrize("schedule", ["store", "stream"])
def test_gradients_are_freed_by_backward_like_a_graph(schedule: str) -> None:
    model = MODELS["mlp"]()
    prediction, _ = Engine(model).combine(list(torch.randn(4, FEATURES)), Mean(), schedule=schedule)
    prediction.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        prediction.backward()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_plain_backward_is_unchanged_while_an_engine_lives(schedule: str) -> None:
    model, batch = MODELS["mlp"](), torch.randn(4, FEATURES)
    model(batch).sum().backward()
    expected = _flat(model).clone()
    engine = Engine(model)
    _step(engine, batch, schedule, Mean())
    model.zero_grad()
    model(batch).sum().backward()
    assert torch.equal(_flat(model), expected)


class Failing(nn.Module):
    """Raises in its k-th forward, or in the backward of its k-th forward with a graph."""

    def __init__(self, *, forward: int = -1, backward: int = -1) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, 1)
        self.norm = nn.BatchNorm1d(FEATURES)
        self.forward_at, self.backward_at = forward, backward
        self.calls = self.graphs = 0

    def forward(self, pose: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.forward_at:
            raise ArithmeticError("forward failed")
        out = self.linear(self.norm(pose.expand(2, -1)))[0]
        if out.requires_grad:
            self.graphs += 1
            if self.graphs == self.backward_at:
                out.register_hook(_fail)
        return out


def _fail(_: Tensor) -> None:
    raise ArithmeticError("backward failed")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("k", [1, 3, 5, 7])
def test_a_failing_forward_leaves_everything_usable(schedule: str, k: int) -> None:
    _check_survives(
        Failing(forward=k), schedule, "forward failed", ran=k <= 5 or schedule == "recompute"
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("k", [2, 4])
def test_a_failing_backward_leaves_everything_usable(schedule: str, k: int) -> None:
    first_pass = 5 if schedule == "recompute" else 0  # its graphs are never differentiated
    _check_survives(Failing(backward=first_pass + k), schedule, "backward failed", ran=True)


def _check_survives(model: Failing, schedule: str, message: str, *, ran: bool) -> None:
    torch.manual_seed(3)
    batch = torch.randn(5, FEATURES)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    engine = Engine(model)
    buffers = list(model.buffers())
    fast = torch.backends.mha.get_fastpath_enabled()
    if ran:
        with pytest.raises(ArithmeticError, match=message):
            _step(engine, batch, schedule, Mean())
        assert bool((_flat(model) == 1).all())
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert torch.is_grad_enabled()
    assert all(a is b for a, b in zip(buffers, model.buffers(), strict=True))
    assert model.training

    healthy = copy.deepcopy(model)
    healthy.forward_at = healthy.backward_at = model.forward_at = model.backward_at = -1
    for m, e in ((model, engine), (healthy, Engine(healthy))):
        m.zero_grad()
        _step(e, batch, schedule, Mean())
    assert torch.equal(_flat(model), _flat(healthy))


def test_a_failing_pose_is_named() -> None:
    with pytest.raises(ArithmeticError) as caught:
        Engine(Failing(forward=3)).combine(list(torch.randn(5, FEATURES)), Mean())
    assert any("while scoring pose 2" in note for note in caught.value.__notes__)


class Encoding(UserDict[str, Tensor]):
    """Looks for attributes in what it holds, as `BatchEncoding` of transformers does."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError from None


class Sized(nn.Linear):
    """Asks its input for its size, as language models do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(x.size()))


@pytest.mark.parametrize(
    ("pose", "kind", "call"),
    [
        ({"x": torch.ones(3)}, "mapping (dict)", "model(**pose)"),
        (Encoding(x=torch.ones(3)), "mapping (Encoding)", "model(**pose)"),
        (MappingProxyType({"x": torch.ones(3)}), "mapping (mappingproxy)", "model(**pose)"),
        ([torch.ones(3), torch.ones(3)], "sequence (list)", "model(*pose)"),
    ],
)
def test_a_pose_that_the_model_cannot_take_says_how_it_was_called(
    pose: object, kind: str, call: str
) -> None:
    with pytest.raises(AttributeError) as caught:
        Engine(Sized(3, 1)).combine([pose], Mean())
    [note] = [note for note in caught.value.__notes__ if "predict=" in note]
    assert kind in note
    assert f"predict=lambda model, pose: {call}" in note
    assert "groups=" in note


def test_a_mapping_that_predict_unpacks_is_a_pose() -> None:
    model, x = Sized(3, 1), torch.randn(4, 3)
    engine = Engine(model, predict=lambda model, pose: model(**pose))
    _, per_pose = engine.combine([Encoding(x=row) for row in x], Mean(), schedule="recompute")
    torch.testing.assert_close(per_pose, model(x).squeeze(1))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nothing_survives_a_step(schedule: str) -> None:
    graphs: list[weakref.ref[object]] = []

    class Watched(nn.Linear):
        def forward(self, pose: Tensor) -> Tensor:
            out = super().forward(pose)
            if out.grad_fn is not None:
                graphs.append(weakref.ref(out))
            return out

    model = Watched(FEATURES, 1)
    engine = Engine(model)
    for _ in range(3):
        _step(engine, torch.randn(4, FEATURES), schedule, Mean())
    gc.collect()
    assert graphs
    assert all(ref() is None for ref in graphs)
    assert not model._forward_hooks
    assert not model._backward_hooks


def test_the_model_is_freed_with_its_engine() -> None:
    model = MODELS["mlp"]()
    engine = Engine(model)
    _step(engine, torch.randn(4, FEATURES), "recompute", Mean())
    ref = weakref.ref(model)
    del model, engine
    gc.collect()
    assert ref() is None


def test_models_can_be_copied_and_pickled_while_an_engine_lives() -> None:
    model, batch = MODELS["mlp"](), torch.randn(4, FEATURES)
    _step(Engine(model), batch, "auto", Mean())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(batch), model(batch))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_two_engines_on_one_model(schedule: str) -> None:
    model, batch = MODELS["mlp"]().double(), torch.randn(4, FEATURES, dtype=torch.float64)
    first, second = Engine(model, chunk_size=1), Engine(model, chunk_size=2)
    results = [e.combine(batch, Mean(), schedule=schedule).prediction for e in (first, second)]
    sum(results).backward()
    both = _flat(model).clone()
    model.zero_grad()
    (2 * Mean()(model(batch).squeeze(1))).backward()
    torch.testing.assert_close(both, _flat(model))


def _with_dropout(draw: Callable[[], object], schedule: str) -> Tensor:
    torch.manual_seed(5)
    model, batch = MODELS["dropout"](), torch.randn(4, FEATURES)
    prediction, _ = Engine(model).combine(list(batch), Mean(), schedule=schedule)
    draw()
    prediction.backward()
    return torch.rand(3)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_users_random_numbers_are_the_users(schedule: str) -> None:
    # Forwards draw as in a plain loop; backward, whatever it replays, draws nothing.
    expected = _with_dropout(lambda: None, "retain")
    assert torch.equal(_with_dropout(lambda: None, schedule), expected)
    assert not torch.equal(_with_dropout(lambda: torch.rand(1), schedule), expected)


def test_backward_moves_no_random_state_of_anybody() -> None:
    """Also where a replay draws and nothing comes of it."""
    model = nn.Linear(FEATURES, 1)

    def predict(model: nn.Module, pose: torch.Tensor) -> torch.Tensor:
        return model(pose) + 0 * (random.random() + np.random.rand() + torch.rand(1))

    engine = Engine(model, predict=predict)
    prediction, _ = engine.combine(list(torch.randn(4, FEATURES)), Mean(), schedule="recompute")
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    prediction.backward()
    assert random.getstate() == before[0]
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])
