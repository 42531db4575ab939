"""Law 5 for Jacobians: what reading one does to the model and to torch. Nothing."""

import copy
import pickle
import weakref
from collections.abc import Callable
from itertools import cycle, islice
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from posegrad import (
    Engine,
    Mean,
    Min,
    NoPosesError,
    NotDifferentiableError,
    PoseJacobian,
    ShapeMismatchError,
    StaleFactorError,
)
from posegrad.testing import peak_live_bytes
from tests.drawing import double
from tests.models import FEATURES, MODELS
from tests.reference import rows, trainable, untouched


class Mark(torch.autograd.Function):
    """The identity; its node is a Python object, and so can be watched."""

    nodes: ClassVar[list[weakref.ref[Any]]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)  # as torch's own nodes do
        Mark.nodes.append(weakref.ref(ctx))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        return cotangents[0]


class Watched(nn.Module):
    """A network whose graphs are counted, and whose activations' backwards are."""

    def __init__(self, width: int = 8, *, marked: bool = True) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, width), nn.Linear(width, 1)
        self.passes, self.marked = 0, marked

    def forward(self, pose: Tensor) -> Tensor:
        hidden = self.first(pose)
        if hidden.requires_grad:
            hidden.register_hook(self._count)
            hidden = Mark.apply(hidden) if self.marked else hidden
        return self.last(torch.tanh(hidden)).squeeze(-1)

    def _count(self, cotangent: Tensor) -> None:
        self.passes += cotangent is not None


def _mlp(name: str = "mlp") -> tuple[nn.Module, Tensor]:
    return MODELS[name]().double(), double(5, FEATURES)


def _flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradients.values()])


def _grads(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _assert_reads(engine: Engine, model: nn.Module, output: Tensor) -> PoseJacobian:
    """To more digits than a comparison has by default; the graph is kept."""
    J = engine.jacobian(output, retain_graph=True)
    expected = rows(output, trainable(model))
    torch.testing.assert_close(J.matrix(), expected, rtol=1e-10, atol=1e-12)
    return J


def _jacobian(model: nn.Module, engine: Engine, batch: Tensor) -> None:
    J = engine.jacobian(model(batch).square())
    J.gramian()
    J.backward(Min(2.0))


def _gramian(model: nn.Module, engine: Engine, batch: Tensor) -> None:
    losses = model(batch)
    losses.backward(engine.compute_gramian(losses).sum(0))


# name: what a training loop may do
STEPS: dict[str, Callable[[nn.Module, Engine, Tensor], object]] = {
    "plain": lambda model, engine, batch: model(batch).sum().backward(),
    "evaluation with a graph": lambda model, engine, batch: model(batch),
    "jacobian": _jacobian,
    "gramian": _gramian,
    "gather": lambda model, engine, batch: engine.gather(batch).backward(Mean()),
    "store": lambda model, engine, batch: engine.combine(
        batch, Mean(), schedule="store"
    ).prediction.backward(),
}


def test_nothing_piles_up_over_many_mixed_steps() -> None:
    model = Watched()
    engine = Engine(model, chunk_size=4)
    Mark.nodes.clear()
    with peak_live_bytes() as bytes_made:
        for step in islice(cycle(STEPS), 60):
            STEPS[step](model, engine, torch.randn(6, FEATURES))
            assert not any(node() for node in Mark.nodes), step  # freed without the gc
        model.zero_grad()
    assert len(Mark.nodes) >= 60
    assert bytes_made.live == 0


def _fingerprint(model: nn.Module) -> list[object]:
    """Everything that hangs on the modules and parameters of a model, by name."""
    tables = [
        {key: len(value) if isinstance(value, dict) else None for key, value in vars(m).items()}
        for m in model.modules()
    ]
    hung = [
        (sorted(vars(p)), p._backward_hooks, getattr(p, "_post_accumulate_grad_hooks", None))
        for p in model.parameters()
    ]
    return [*tables, *hung]


def test_nothing_hangs_on_the_model() -> None:
    model, batch = Watched(), torch.randn(6, FEATURES)
    before = _fingerprint(model)
    engine = Engine(model, chunk_size=4)
    for step in STEPS.values():
        step(model, engine, batch)
        assert _fingerprint(model) == before


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_model_are_on_their_own(twin: Callable[[nn.Module], nn.Module]) -> None:
    model, batch = _mlp()
    engine = Engine(model)
    engine.jacobian(model(batch))
    other = twin(model)
    with pytest.raises(
        NotDifferentiableError, match=r"none of the 4 .* another model \(a copy\?\)"
    ):
        engine.jacobian(other(batch))
    for m, e in ((model, engine), (other, Engine(other))):
        _assert_reads(e, m, m(batch))


def test_two_engines_on_one_model_one_with_fewer_parameters() -> None:
    model, batch = _mlp()
    whole, part = Engine(model), Engine(model[2])
    for _ in range(2):
        output = model(batch)
        _assert_reads(part, model[2], output)
        _assert_reads(whole, model, output)


def test_the_model_may_change_under_the_engine() -> None:
    model, batch = _mlp()
    engine = Engine(model)
    frozen = next(model.parameters())
    changes: list[Callable[[], object]] = [
        lambda: None,
        lambda: model.__setitem__(2, nn.Linear(8, 1, bias=False).double()),
        lambda: frozen.requires_grad_(False),
        lambda: frozen.requires_grad_(True),
        lambda: model.append(nn.Linear(1, 1).double()),
        lambda: model.eval(),
    ]
    for change in changes:
        change()
        output = model(batch)
        J = _assert_reads(engine, model, output)
        assert list(J.combine(torch.ones_like(output))) == list(trainable(model))


def _broken_loss(predictions: Tensor, poses: Tensor) -> Tensor:
    if 3 in poses:
        raise ArithmeticError("the loss failed")
    return predictions


def _weigh(engine: Engine, model: nn.Module, batch: Tensor, weights: Any) -> None:
    engine.jacobian(model(batch).squeeze(1)).backward(weights)


def _stale(engine: Engine, model: nn.Module, batch: Tensor) -> None:
    J = engine.jacobian(model(batch))
    batch.mul_(2)
    J.backward(Mean())


def _stale_before(engine: Engine, model: nn.Module, batch: Tensor) -> None:
    output = model(batch)
    batch.mul_(2)
    engine.jacobian(output)


# error, message, what raises it
FAILURES: list[tuple[type[Exception], str, Callable[[Engine, nn.Module, Tensor], object]]] = [
    (ShapeMismatchError, r"shape \[4\].*\[5\]", lambda e, m, x: _weigh(e, m, x, torch.ones(4))),
    (
        ShapeMismatchError,
        r"combines predictions \[5\] to \[5\]",
        lambda e, m, x: _weigh(e, m, x, nn.Identity()),
    ),
    (StaleFactorError, r"input beside 0\.weight", _stale),
    (StaleFactorError, "saved in the forward was changed in place", _stale_before),
    (ArithmeticError, "the loss failed", lambda e, m, x: e.gather(x, loss=_broken_loss)),
    (NoPosesError, "There are no poses", lambda e, m, x: e.gather(x[:0])),
    (NoPosesError, r"shape \[0, 1\]", lambda e, m, x: e.jacobian(m(x[:0]))),
    (NotDifferentiableError, "carries no graph", lambda e, m, x: e.jacobian(m(x).detach())),
    (NotDifferentiableError, "computed by another model", lambda e, m, x: e.jacobian(_mlp()[0](x))),
    (ValueError, "params names 0.bigs", lambda e, m, x: e.jacobian(m(x), params=["0.bigs"])),
    (ValueError, "params names ?", lambda e, m, x: e.jacobian(m(x), params=[torch.ones(1)])),
    (ValueError, "form='tiny' is unknown", lambda e, m, x: e.gather(x, form="tiny")),
    (IndexError, "is indexed by 'a'", lambda e, m, x: e.jacobian(m(x))["a"]),
    (KeyError, "no trainable parameter 'w'", lambda e, m, x: e.jacobian(m(x)).block("w")),
]


@pytest.mark.parametrize(("error", "message", "fail"), FAILURES)
def test_failures_leave_grad_and_engine_alone(
    error: type[Exception], message: str, fail: Callable[[Engine, nn.Module, Tensor], object]
) -> None:
    model, batch = _mlp()
    engine = Engine(model)
    with untouched(model), pytest.raises(error, match=message):
        fail(engine, model, batch)
    _assert_reads(engine, model, model(batch))


def test_hooks_on_parameters_run_once_and_only_in_backward() -> None:
    model, batch = _mlp()
    calls: list[str] = []
    for name, p in model.named_parameters():
        p.register_hook(lambda g, name=name: calls.append(name) or 2 * g)
        p.register_post_accumulate_grad_hook(lambda p, name=name: calls.append(f"after {name}"))
    model(batch).sum().backward()
    expected, once = _grads(model), sorted(calls)
    calls.clear()
    model.zero_grad()
    J = Engine(model, check="always").jacobian(model(batch))
    J.gramian(), J.matrix(), J.combine(torch.ones(5, 1))
    assert not calls
    assert all(p.grad is None for p in model.parameters())
    J.backward(torch.ones(5, 1))
    assert sorted(calls) == once
    torch.testing.assert_close(_grads(model), expected)


@pytest.mark.parametrize("name", ["mlp", "dropout", "checkpointed", "encoder", "recurrent"])
def test_running_twice_is_bitwise_equal_and_draws_no_random_number(name: str) -> None:
    model, batch = _mlp(name)
    engine = Engine(model, check="always")
    results = []
    for e in (engine, engine, Engine(model)):
        torch.manual_seed(1)
        output = model(batch)
        before = torch.get_rng_state()
        G, J = e.compute_gramian(output), e.jacobian(output)
        results.append(torch.cat([G.flatten(), J.matrix().flatten(), _flat(J.combine(output))]))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 2), (5, 2, 3)])
def test_iteration_gives_the_rows_of_each_first_index(shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), nn.Linear(6, 6)).double()
    model.register_parameter("idle", nn.Parameter(torch.ones(2)))
    width = torch.Size(shape[1:]).numel()
    output = model(double(5, FEATURES))[:, :width].reshape(shape)
    J = Engine(model).jacobian(output, retain_graph=True)
    found = list(J)
    assert len(found) == len(J) == 5
    for i, row in enumerate(found):
        assert list(row) == list(J.shapes)
        for name, p in model.named_parameters():
            expected = rows(output[i], {name: p})
            torch.testing.assert_close(row[name], expected.reshape(*shape[1:], *p.shape))


def test_an_output_without_dimensions_has_no_length() -> None:
    model, batch = _mlp()
    J = Engine(model).jacobian(model(batch).sum())
    with pytest.raises(TypeError, match="0-d"):
        len(J)
    with pytest.raises(TypeError, match=r"without dimensions.*\n.*J\[\(\)\]"):
        iter(J)
    torch.testing.assert_close(J[()], J.combine(torch.ones((), dtype=torch.float64)))


@pytest.mark.parametrize("check", ["first", "always", "never"])
@pytest.mark.parametrize("mixing", [False, True])
@pytest.mark.filterwarnings("ignore:The predictions of different poses depend")
def test_activations_that_retain_grad_keep_what_they_have(mixing: bool, check: str) -> None:
    model, batch = _mlp()
    engine = Engine(model, check=check)

    def kept() -> tuple[Tensor, list[Tensor]]:
        hidden = model[0](batch)
        squashed = torch.tanh(hidden - hidden.mean(0) if mixing else hidden).mul(2)
        output = model[2](squashed).squeeze(1)
        activations = [squashed, output, output.square()]  # saved by the next layer, or the output
        for activation in activations:
            activation.retain_grad()
        return activations[-1], activations

    for _ in range(3):  # found out, then read by routine
        output, activations = kept()
        engine.jacobian(output, retain_graph=True)
        assert all(a.grad is None for a in activations)
        output.sum().backward(retain_graph=True)
        before = [a.grad for a in activations]
        expected = [g.clone() for g in before]
        engine.jacobian(output)
        assert all(a.grad is g for a, g in zip(activations, before, strict=True))
        torch.testing.assert_close(before, expected)


def test_a_graph_is_kept_if_asked_for_and_freed_if_not() -> None:
    model, batch = _mlp()
    engine = Engine(model)
    output = model(batch)
    gramian, J = engine.compute_gramian(output), engine.jacobian(output, retain_graph=True)
    assert gramian.shape == (5, 1, 1, 5)
    output.sum().backward(retain_graph=True)
    torch.testing.assert_close(_flat(J.combine(torch.ones(5, 1))), _grads(model))
    engine.jacobian(output)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        output.sum().backward()


def test_activations_are_freed_while_the_output_lives() -> None:
    model, batch = Watched(width=1000), torch.randn(50, FEATURES)
    engine = Engine(model)
    with peak_live_bytes() as made:
        output = model(batch)
        engine.jacobian(output)
    assert made.live <= 3 * output.nbytes  # one activation alone has 1000 times as much


@pytest.mark.parametrize("form", ["auto", "factors", "dense"])
@pytest.mark.parametrize("chunk_size", [1, 3, 5])
@pytest.mark.parametrize(("name", "count"), [("mlp", 5), ("mlp", 1), ("vector", 5), ("vector", 1)])
def test_gathering_in_chunks_is_the_jacobian_of_the_batch(
    name: str, count: int, chunk_size: int, form: str
) -> None:
    model, batch = _mlp(name)
    batch = batch[:count]
    predictions = model(batch).squeeze(-1)
    squares = _squares(predictions, torch.arange(count))
    for output, loss in ((predictions, None), (squares, _squares)):
        whole = Engine(model).jacobian(output, retain_graph=True)
        for poses, collate in ((batch, None), (list(batch), torch.stack)):
            engine = Engine(model, chunk_size=chunk_size, collate=collate)
            J = engine.gather(poses, loss=loss, form=form)
            assert J.output_shape == output.shape
            torch.testing.assert_close(J.matrix(), whole.matrix())
            torch.testing.assert_close(J.gramian(), whole.gramian())
            torch.testing.assert_close(J.combine(output), whole.combine(output))


def _squares(predictions: Tensor, poses: Tensor) -> Tensor:
    goals = poses.double().reshape(-1, *[1] * (predictions.ndim - 1))
    return (predictions - goals).square()


def test_a_loss_with_a_reduction_is_refused() -> None:
    model, batch = _mlp()
    with pytest.raises(ShapeMismatchError, match=r"shape \[\] for 3 poses.*\n.*targets\[i\]"):
        Engine(model, chunk_size=3).gather(batch, loss=lambda y, i: (y - i).square().mean())


def test_store_in_chunks_is_retain_for_one_pass_a_chunk() -> None:
    model, batch = Watched(marked=False).double(), double(12, FEATURES)
    engine = Engine(model, chunk_size=4)
    for _ in range(2):  # the first time, the engine also checks
        model.zero_grad()
        model.passes = 0
        engine.combine(batch, Min(2.0), schedule="store").prediction.backward()
        stored, passes = _grads(model), model.passes
    assert passes == 3
    model.zero_grad()
    engine.combine(batch, Min(2.0), schedule="retain").prediction.backward()
    torch.testing.assert_close(stored, _grads(model))
