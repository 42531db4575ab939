"""Models that a reader of graphs could get wrong, each against rows of plain autograd."""

import copy
import pickle
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from posegrad import (
    Engine,
    Min,
    PoseJacobian,
    ShapeMismatchError,
    StaleFactorError,
    UnsupportedModuleError,
)
from posegrad.graph._reading import Reading
from posegrad.graph._verify import Reference
from posegrad.jacobian.layers import Linear
from tests.device import DEVICE
from tests.drawing import double
from tests.jacobian.exact import assert_exact
from tests.jacobian.traps_table import TRAPS, WARNED
from tests.models import Passed
from tests.reference import rows, trainable
from tests.schedules import SCHEDULES


@pytest.mark.parametrize("name", TRAPS)
@pytest.mark.parametrize("check", ["first", "never"])
def test_rows_are_those_of_autograd(name: str, check: str) -> None:
    make, output_of = TRAPS[name]
    model = make().double()
    engine = Engine(model, check=check)
    for _ in range(3):
        output = output_of(model)
        expected = rows(output, trainable(model))
        scale = expected.abs().max()
        J = engine.jacobian(output)
        torch.testing.assert_close(J.matrix() / scale, expected / scale)
        torch.testing.assert_close(J.gramian() / scale**2, expected @ expected.T / scale**2)


@pytest.mark.parametrize("name", WARNED)
def test_rows_that_a_slower_way_takes_are_those_of_autograd(name: str) -> None:
    make, output_of, match = WARNED[name]
    model = make().double()
    output = output_of(model)
    with pytest.warns(UserWarning, match=match):
        assert_exact(Engine(model), model, output)


def test_a_number_and_a_parameter_of_one_number_have_a_block() -> None:
    parameter = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    J = Engine(nn.ParameterList([parameter])).jacobian(parameter.sin())
    torch.testing.assert_close(J.block("0"), parameter.detach().cos())


def test_a_gate_that_opens_later_is_found() -> None:
    """At zero it hides that poses depend on each other; the graph looks the same."""
    model, gate = nn.Linear(4, 1).double(), torch.zeros((), dtype=torch.float64)
    engine = Engine(model, check="never")
    for step in range(3):
        gate.fill_(step / 2)
        scores = model(double(6, 4)).squeeze(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that poses mix, once they do
            assert_exact(engine, model, scores + gate * (scores - scores.mean()).square())


class Twice(torch.autograd.Function):
    """A product and its triple, by one operator with two outputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        return x @ weights, 3 * (x @ weights)

    @staticmethod
    def backward(ctx: Any, once: Tensor, thrice: Tensor) -> tuple[None, Tensor]:
        (x,) = ctx.saved_tensors
        return None, x.mT @ (once + 3 * thrice)


@pytest.mark.parametrize("check", ["first", "always", "never"])
def test_another_output_of_the_last_operator_is_another_structure(check: str) -> None:
    model, x = nn.Linear(3, 1).double(), double(4, 3)
    engine = Engine(model, check=check)
    for number in (0, 1, 0, 1):
        output = Twice.apply(x, model.weight[0])[number]
        expected = rows(output, {"weight": model.weight})
        found = engine.jacobian(output, params=["weight"]).matrix()
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_rows_that_vanish_are_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """If nothing is read where autograd finds a gradient, that is a disagreement."""
    model, x = nn.Linear(3, 1).double(), double(4, 3)
    monkeypatch.setattr(Reading, "_part", lambda *given: None)
    with pytest.warns(UserWarning, match="do not add up"):
        assert_exact(Engine(model), model, model(x)[:, 0])


def test_rows_read_in_a_new_way_are_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was checked while the gate was shut says nothing of how rows are read once it opens."""
    checks = []
    taken = Reference.of
    monkeypatch.setattr(Reference, "of", lambda *given: checks.append(1) or taken(*given))
    model, gate = nn.Linear(4, 1).double(), torch.zeros((), dtype=torch.float64)
    engine = Engine(model)
    for value, expected in ((0, 1), (0, 1), (1, 2), (1, 2)):
        gate.fill_(value)
        scores = model(double(6, 4)).squeeze(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that poses mix
            engine.jacobian(scores + gate * (scores - scores.mean()).square())
        assert len(checks) == expected


def _adapted(gate: float) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A trunk behind a head of zeros, as adapters and mixers start with."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    model = model.double()
    with torch.no_grad():
        model[-1].weight.fill_(gate)
    return model, lambda: model(double(6, 4)).squeeze(1)


def test_gradients_that_are_zero_are_not_compared_again_and_again() -> None:
    model, score = _adapted(0.0)
    engine = Engine(model)
    counts = []
    for step in range(6):
        if step == 4:
            nn.init.ones_(model[-1].weight)
        J = assert_exact(engine, model, score())
        counts.append("plain autograd" in J.report())
    assert counts == [True, False, False, False, True, False]


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_gradients_that_come_later_are_compared(
    monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """Whatever was compared while they were zero."""
    model, score = _adapted(0.0)
    engine = Engine(model)
    for _ in range(calls):
        engine.jacobian(score())
    nn.init.ones_(model[-1].weight)
    vjp, read = Linear.vjp, Linear.rows
    monkeypatch.setattr(Linear, "vjp", lambda *given: 2 * vjp(*given))
    monkeypatch.setattr(Linear, "rows", lambda *given: 2 * read(*given))
    monkeypatch.setattr(Linear, "combine", lambda *given: None)
    output = score()
    expected = rows(output, {n: p for n, p in trainable(model).items() if n != "4.weight"})
    with pytest.warns(UserWarning, match="do not add up"):
        J = engine.jacobian(output)
    found = torch.cat([J.block(n).flatten(1) for n in J.used if n != "4.weight"], dim=1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_small_cotangents_are_not_dropped(dtype: torch.dtype) -> None:
    """Rows of a ragged batch whose gradients are near the smallest numbers of the type."""
    model = nn.Linear(4, 1, dtype=dtype)
    owners = torch.tensor([1, 0, 2, 1, 0, 1])
    smallest = torch.finfo(dtype).tiny
    x = torch.ones(6, 4, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rounding at this size may look like mixing
        scores = model(x).squeeze(1)
        output = torch.zeros(3, dtype=dtype).index_add(0, owners, scores * (64 * smallest))
        norms = Engine(model).jacobian(output).matrix().double().norm(dim=1)
    atoms = torch.bincount(owners)
    torch.testing.assert_close(norms / norms[2], atoms.double(), rtol=0.02, atol=0)


def test_complex_parameters_are_refused_by_name() -> None:
    model = nn.Linear(3, 1)
    model.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(UnsupportedModuleError, match=r"Complex parameters: phase.*\n.*params="):
        Engine(model).jacobian(model(torch.ones(2, 3)))
    with pytest.raises(UnsupportedModuleError, match=r"Complex parameters: phase"):
        Engine(model).jacobian(model(torch.ones(2, 3)), params=["weight", "phase"])


class Turned(nn.Module):
    """A real parameter before a complex one, and one after it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 1)
        self.phase = nn.Parameter(torch.randn(4, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return self.last((torch.tanh(self.first(x)) * self.phase).abs()).squeeze(-1)


@pytest.mark.parametrize("by_name", [False, True])
def test_a_complex_parameter_that_is_left_out_disturbs_nobody(by_name: bool) -> None:
    model = Turned()
    model.first.double(), model.last.double()
    model.phase = nn.Parameter(torch.randn(4, dtype=torch.complex128))
    named = {n: p for n, p in model.named_parameters() if n != "phase"}
    output = model(double(5, 3))
    wanted = list(named) if by_name else list(named.values())
    assert_exact(Engine(model), model, output, of=named, params=wanted)


@pytest.mark.parametrize("chunk_size", [1, 2])
@pytest.mark.parametrize("schedule", ["auto", *SCHEDULES])
def test_combine_serves_complex_parameters(schedule: str, chunk_size: int) -> None:
    model, x = Turned(), torch.randn(4, 3)
    expected = torch.autograd.grad(Min(2.0)(model(x)), list(model.parameters()))
    engine = Engine(model, chunk_size=chunk_size)
    engine.combine(x, Min(2.0), schedule=schedule).prediction.backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], list(expected))


class TwoKindsOfRows(nn.Module):
    """Atoms and something else, as many as there are poses."""

    def __init__(self) -> None:
        super().__init__()
        self.atoms, self.others, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor, owners: Tensor, z: Tensor, others: Tensor) -> Tensor:
        pooled = x.new_zeros(3, 4).index_add(0, owners, self.atoms(x).tanh())
        return self.head(pooled.index_add(0, others, self.others(z).tanh())).sin().squeeze(1)


def test_an_index_speaks_for_its_own_rows_only() -> None:
    model, owners = TwoKindsOfRows().double(), torch.tensor([0, 0, 1, 1, 2, 2, 2])
    engine = Engine(model, check="never")
    for others in (torch.tensor([0, 0, 1, 2]), torch.tensor([1, 0, 2])):
        output = model(double(7, 3), owners, double(len(others), 3), others)
        assert_exact(engine, model, output, pose_index=[owners])


@pytest.mark.parametrize("check", ["first", "never"])
@pytest.mark.parametrize("count", [3, 5])
@pytest.mark.parametrize("second", [False, True])
def test_an_index_counts_one_dimension_of_the_output(check: str, count: int, second: bool) -> None:
    """Which one is seen from its numbers, or else found by probing."""
    model, rows_of = nn.Linear(3, 3).double(), double(8, 3)
    owners = torch.tensor([0, 1, 2, 3, 4, 4, 0, 1]) % count
    output = double(count, 3).zero_().index_add(0, owners, model(rows_of).tanh()).sin()
    output = output.mT if second else output
    assert_exact(Engine(model, check=check), model, output, pose_index=owners)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch_dim", ["auto", None])
@pytest.mark.parametrize("probed", [False, True])
def test_an_island_of_fewer_digits_is_no_disagreement(
    dtype: torch.dtype, batch_dim: str | None, probed: bool
) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)).double()
    hidden = model[0](double(5, 3)).to(dtype).sin().double()
    output = model[1](hidden.flip(0) if probed else hidden).sin().sum(1)
    expected = rows(output, trainable(model))
    found = Engine(model, batch_dim=batch_dim).jacobian(output).matrix()
    torch.testing.assert_close(found, expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-7)


def test_a_first_gather_of_nan_verifies_nothing() -> None:
    """A hook that mixes poses is found when there are numbers to compare."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    engine = Engine(model)

    def output_of(x: Tensor) -> Tensor:
        hidden = model[1](model[0](x))
        hidden.register_hook(lambda g: g.flip(0))
        return model[2](hidden).squeeze(1)

    x = double(4, 3)
    x[0] = torch.nan
    engine.jacobian(output_of(x))
    with pytest.warns(UserWarning, match="do not add up"):
        assert_exact(engine, model, output_of(double(4, 3)))


@pytest.mark.parametrize("first", ["nan", "finite"])
def test_nan_is_named_and_not_taken_for_poses_that_mix(first: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)).double()
    engine = Engine(model)

    def output_of(x: Tensor) -> Tensor:
        return model[1](Passed.apply(model[0](x)).square()).squeeze(1)

    healthy, ill = double(5, 3), double(5, 3)
    ill[1], ill[3] = torch.nan, torch.inf
    if first == "finite":
        engine.jacobian(output_of(healthy))
    for _ in range(2):
        match = r"nan or infinite at the activations of: 0, as the output is at 1, 3\. Whose"
        with pytest.warns(UserWarning, match=match):
            engine.jacobian(output_of(ill))
    J = assert_exact(engine, model, output_of(healthy))
    assert J.paths["0.weight"] == ("closed form (Linear)",)


def test_nan_gradients_of_a_finite_output_are_named() -> None:
    model, x = nn.Linear(3, 4).double(), double(5, 3)
    x[2] = 0
    nn.init.zeros_(model.bias)
    output = Passed.apply(model(x)).norm(dim=1).sqrt()  # 0 has no slope
    with pytest.warns(UserWarning, match=r"infinite at the activations of: bias, weight\. Whose"):
        Engine(model).jacobian(output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_of_rows_that_cancel_within_a_pose(dtype: torch.dtype) -> None:
    model = nn.Linear(64, 64, bias=False, dtype=dtype)
    x = torch.randn(6, 1, 64, dtype=dtype).repeat(1, 3, 1)
    weights = torch.randn(3, 1, dtype=dtype)
    J = Engine(model).jacobian((model(x) * (weights - weights.mean(0))).sum((1, 2)))
    torch.testing.assert_close(J.norms(), J.matrix().norm(dim=1))
    torch.testing.assert_close(J.gramian().diagonal(), J.matrix().square().sum(1))


def test_later_statistics_do_not_change_a_jacobian() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).double().eval()
    x = double(4, 4)
    J = Engine(model).jacobian(model(x).sin().sum(1))
    before = J.matrix()
    model.train()(3 * x)
    torch.testing.assert_close(J.matrix(), before, rtol=0, atol=0)


def test_what_is_handed_out_is_the_callers() -> None:
    model = nn.Sequential(nn.Bilinear(3, 3, 3), nn.Linear(3, 3)).double()
    x = double(4, 3)
    output = model[1](model[0](x, x)).sin().sum(1)
    J = Engine(model).jacobian(output)
    before, predictions = J.matrix(), J.predictions.clone()
    for name, _ in model.named_parameters():
        J.block(name).zero_()
    output.detach().zero_()
    torch.testing.assert_close(J.matrix(), before, rtol=0, atol=0)
    torch.testing.assert_close(J.predictions, predictions, rtol=0, atol=0)


def test_threads_leave_gradients_alone() -> None:
    model = nn.Linear(3, 1)
    engine, failures = Engine(model), []
    model.weight.grad = torch.ones(1, 3)

    def work() -> None:
        try:
            for _ in range(20):
                engine.jacobian(model(torch.randn(4, 3, device=DEVICE)).squeeze(1))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert torch.equal(model.weight.grad, torch.ones(1, 3))


def test_inference_mode_around_the_call() -> None:
    model = nn.Linear(3, 1)
    output = model(torch.ones(2, 3)).squeeze(1)
    with torch.inference_mode():
        found = Engine(model).jacobian(output).gramian()
    torch.testing.assert_close(found, torch.full((2, 2), 4.0))


def test_parameters_changed_before_the_call_are_named() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    output = model(torch.ones(2, 3)).squeeze(1)
    nn.init.zeros_(model[1].weight)
    with pytest.raises(StaleFactorError, match="changed in place"):
        Engine(model).jacobian(output)


class Sliced(nn.Module):
    """Rows of one parameter, used in different places."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(double(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return ((x * self.rows[0]).sin() * self.rows[1]).sum(1)


def test_freezing_afterwards() -> None:
    model = Sliced()
    J = Engine(model).jacobian(model(double(3, 4)))
    before = J.matrix()
    model.rows.requires_grad_(False)
    torch.testing.assert_close(J.matrix(), before)
    assert not model.rows.requires_grad
    J.backward(torch.ones(3, dtype=torch.float64))  # as autograd's, which skips frozen parameters
    assert model.rows.grad is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda J: pickle.loads(pickle.dumps(J))])
def test_copies_of_a_jacobian(copied: Callable[[PoseJacobian], PoseJacobian]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).double()
    model.add_module("sliced", Sliced())
    J = Engine(model).jacobian(model(double(3, 4)))
    torch.testing.assert_close(copied(J).gramian(), J.gramian())


@pytest.mark.parametrize("index", [torch.tensor(3), torch.zeros(2, 2), torch.zeros(4)])
def test_an_index_is_one_number_for_each_row(index: Tensor) -> None:
    model = nn.Linear(3, 1)
    with pytest.raises(ShapeMismatchError, match="for each row of a kind, the number of its pose"):
        Engine(model).jacobian(model(torch.ones(4, 3)).squeeze(1), pose_index=index)


@torch._functorch.config.patch(donated_buffer=True, enable_autograd_cache=False)
def test_graphs_that_can_be_used_once_are_named() -> None:
    torch._dynamo.reset()
    layers = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 1))
    model = torch.compile(layers, backend="aot_eager")
    model(torch.randn(3, 7)).sum().backward()  # compiles a backward that frees as it goes
    with pytest.raises(UnsupportedModuleError, match="donated_buffer = False"):
        Engine(model).jacobian(model(torch.randn(3, 7)).squeeze(1))


def test_mixed_half_precisions_meet_in_float32() -> None:
    model = nn.Module()
    model.a = nn.Parameter(torch.ones(3, dtype=torch.float16))
    model.b = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    x = torch.ones(2, 3)
    J = Engine(model).jacobian((x * model.a).sum(1) + (1e6 * x * model.b).sum(1))
    assert J.matrix().dtype == torch.float32
    assert bool(J.matrix().isfinite().all())


class Silent(torch.autograd.Function):
    """Returns nothing for a gradient of zeros, as a function may."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor | None:  # type: ignore[override]
        return 2 * grad if bool(grad.any()) else None


class OwnWeights(nn.Module):
    """A weight for each pose, behind a function of its own."""

    def __init__(self, poses: int) -> None:
        super().__init__()
        self.own = nn.ModuleList([nn.Linear(3, 1) for _ in range(poses)])
        self.shared = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        each = [Silent.apply(layer(pose)) for layer, pose in zip(self.own, x, strict=True)]
        return torch.cat(each) + self.shared(x).squeeze(1)


@pytest.mark.parametrize("memory", [1, 8 * 700, 2**20])
@pytest.mark.parametrize("batch_dim", ["auto", None])
def test_functions_of_python_that_return_nothing_for_some_rows(batch_dim: Any, memory: int) -> None:
    """Whichever row comes first, by whichever backward: nothing stands for zeros."""
    model = OwnWeights(4).double()
    engine = Engine(model, batch_dim=batch_dim, memory=memory, check="never")
    for _ in range(3):
        assert_exact(engine, model, model(double(4, 3)))


class Offset(nn.Module):
    """Two parameters that are added up before they meet a pose, and so have one cotangent."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return ((self.one + self.other) * x).sum(-1)


@pytest.mark.parametrize("count", [1, 4])
def test_gradients_of_two_parameters_never_share_memory(count: int) -> None:
    """Else what is done to one in place, as gradient clipping does, is done to both."""
    model, x = Offset(), torch.randn(count, 3)
    engine = Engine(model)
    for _ in range(3):
        model.zero_grad()
        engine.backward(model(x), torch.ones(count))
        expected = x.sum(0)
        model.one.grad.mul_(2)
        torch.testing.assert_close(model.other.grad, expected)
        torch.testing.assert_close(model.one.grad, 2 * expected)


def test_a_model_that_names_its_parameters_itself_is_asked_each_time() -> None:
    """What it names may depend on anything, not on what its modules hold alone."""
    model, x = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)), torch.randn(4, 3)
    engine = Engine(model)
    assert "0.weight" in engine.jacobian(model(x).squeeze(1)).blocks
    last = dict(model[1].named_parameters(prefix="last"))
    model.named_parameters = lambda: iter(last.items())
    assert list(engine.jacobian(model(x).squeeze(1)).blocks) == ["last.weight", "last.bias"]


class Growing(nn.Module):
    """Lists a module inside only once it is used, and holds it where no one looks."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.used = [nn.Linear(3, 3)], False

    def named_modules(self, memo=None, prefix="", remove_duplicate=True):
        yield from super().named_modules(memo, prefix, remove_duplicate)
        if self.used:
            yield f"{prefix}.late", self.hidden[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden[0](x) if self.used else x


def test_a_module_inside_that_lists_its_modules_itself_is_asked_each_time() -> None:
    model, x = nn.Sequential(Growing(), nn.Linear(3, 1)), torch.randn(4, 3)
    engine = Engine(model)
    assert list(engine.jacobian(model(x).squeeze(1)).blocks) == ["1.weight", "1.bias"]
    model[0].used = True
    J = assert_exact(engine, model, model(x).squeeze(1))
    assert "0.late.weight" in J.blocks


def _write_double(gradient: Tensor) -> None:
    gradient.mul_(2)


def test_a_hook_that_writes_to_the_outputs_gradient_does_so_once_a_call() -> None:
    model, x = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)).double(), double(4, 3)
    engine = Engine(model)
    for step in range(5):
        output = model(x).squeeze(1)
        expected = rows(output, trainable(model)) * (2 if step > 2 else 1)
        if step > 2:  # what is known of the structure by then says nothing of hooks
            output.register_hook(_write_double)
        found = engine.jacobian(output).matrix()
        torch.testing.assert_close(found, expected)
