"""`grouped` against plain autograd, and what is wrong in GroupedModel that is right here.

Each test of a defect shows it on the stand-in first: it is mtenn's, not the test's.
"""

import copy
import io
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from posegrad import (
    AttentionPooling,
    Best,
    Max,
    Mean,
    Min,
    NonFinitePredictionError,
    NoPosesError,
    PerPoseLossError,
)
from posegrad.interop.mtenn import (
    Grouped,
    MaxCombination,
    MeanCombination,
    RuleCombination,
    grouped,
)
from posegrad.testing import assert_combination, peak_live_bytes
from tests.device import DEVICE
from tests.drawing import times
from tests.interop import mtenn_standin as standin
from tests.interop.mtenn_standin import Combination, PIC50Readout, Pose
from tests.interop.mtenn_table import (
    COMBINATIONS,
    Combine,
    close,
    gradients,
    group,
    loss,
    poses_of,
    single,
    stepped,
)


def _plain(model: nn.Module, poses: list[Pose], combine: Combine) -> tuple[Tensor, Tensor]:
    """All graphs kept; `combine` is the rule and what follows it."""
    found = [standin.Model.forward(model, pose)[0] for pose in poses]
    per_pose = torch.stack([y.squeeze() if y.numel() == 1 else y for y in found])
    return combine(per_pose), per_pose


def _agrees(network: Grouped, model: nn.Module, poses: list[Pose], combine: Combine) -> None:
    """A network gives what all graphs of a model do that has the same parameters."""
    expected = stepped(model, _plain(model, poses, combine))
    close(stepped(network, network(poses)), expected, 1e-9)


def _changed(model: nn.Module, change: Callable[[nn.Module], Any]) -> nn.Module:
    change(model)
    return model


# Combinations of mtenn's kind that are neither mtenn's nor ours


class GuidesFunction(torch.autograd.Function):
    """LogSumExp as mtenn's guide derives it, one output and one gradient."""

    @staticmethod
    def forward(pred_list, grad_dict, param_names, *model_params):
        return torch.logsumexp(torch.stack(pred_list).flatten(), dim=0).detach()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pred_list, grad_dict, ctx.names, *_ = inputs
        ctx.keys, gradients = Combination.split_grad_dict(grad_dict)
        ctx.save_for_backward(torch.stack(pred_list).flatten(), *gradients)

    @staticmethod
    def backward(ctx, grad_output):
        predictions, *saved = ctx.saved_tensors
        weights = (predictions - torch.logsumexp(predictions, dim=0)).exp()
        rows = Combination.join_grad_dict(ctx.keys, saved)
        sums = {name: sum(w * g for w, g in zip(weights, rows[name])) for name in rows}  # noqa: B905
        return (None,) * 3 + tuple(grad_output * sums[name] for name in ctx.names)


class LogSumExp(Combination):
    def forward(self, pred_list, grad_dict, param_names, *model_params):
        return GuidesFunction.apply(pred_list, grad_dict, param_names, *model_params)


class MaxOfMine(standin.MaxCombination):
    """Derived from mtenn's, with a rule of its own."""

    forward = LogSumExp.forward


class MaxOfOld(Combination):
    """mtenn's, when its arguments had other names."""

    __module__ = "mtenn.combination"

    def __init__(self, neg=True, scale=1000.0):
        super().__init__()
        self.neg, self.scale = neg, scale

    def forward(self, *arguments):
        return standin.MaxCombination(self.neg, self.scale)(*arguments)


TABLE: dict[str, tuple[Any, Combine]] = {
    **{name: (ours(), rule) for name, (ours, rule, _) in COMBINATIONS.items()},
    **{f"mtenn's {name}": (theirs(), rule) for name, (_, rule, theirs) in COMBINATIONS.items()},
    "a rule": (Best(), torch.amin),
    "a rule in mtenn's signature": (RuleCombination(Best()), torch.amin),
    "a function": (torch.median, torch.median),
    "by hand": (LogSumExp(), lambda y: torch.logsumexp(y, 0)),
    "derived from mtenn's": (MaxOfMine(), lambda y: torch.logsumexp(y, 0)),
}
"""What is passed to grouped, and its rule by torch alone."""


@pytest.mark.parametrize("name", TABLE)
@given(
    count=st.integers(1, 8), shape=st.sampled_from([(), (1,), (1, 1)]), seed=st.integers(0, 2**31)
)
@times(0.2)
def test_a_loss_of_both_outputs_has_autograds_gradient(
    name: str, count: int, shape: tuple[int, ...], seed: int
) -> None:
    combination, rule = TABLE[name]
    model = single()
    network = grouped(model, combination, lambda y: y.reshape(shape), torch.tanh)
    _agrees(network, model, poses_of(count, seed), lambda y: rule(y).tanh())


@pytest.mark.parametrize("name", COMBINATIONS)
@pytest.mark.parametrize("count", [1, 8])
def test_it_agrees_with_grouped_model_where_that_is_right(name: str, count: int) -> None:
    ours, _, theirs = COMBINATIONS[name]
    first, last = nn.Softplus(), nn.Tanh()
    model = group(theirs(), first, last)
    expected = stepped(model, model(poses_of(count)))
    existing = grouped(model)  # a GroupedModel brings everything along
    for network in (grouped(single(), ours(), first, last), existing):
        close(stepped(network, network(poses_of(count))), expected, 1e-9)


def test_one_derived_by_hand_is_held_to_the_laws_of_a_rule() -> None:
    assert_combination(grouped(single(), LogSumExp()).combination)


@pytest.mark.parametrize(
    ("combination", "rule"),
    [
        (MaxCombination(False, 2.0), Max(2.0)),
        (RuleCombination(Best()), Best()),
        (Best(), Best()),
        (standin.MaxCombination(), Min(1000.0)),
        (standin.MeanCombination(), Mean()),
        (MaxOfOld(False, 3.0), Max(3.0)),
    ],
)
def test_the_combination_of_a_grouped_model_is_found(combination: Any, rule: nn.Module) -> None:
    assert repr(grouped(group(combination)).combination) == repr(rule)
    assert type(grouped(group(combination), Mean()).combination) is Mean


# What is wrong in GroupedModel


FAILING: dict[str, tuple[str, Callable[[nn.Module], Any]]] = {
    "a frozen parameter": (
        "no attribute 'detach'",
        lambda model: model.representation.atoms.bias.requires_grad_(False),
    ),
    "an unused parameter": (
        "no attribute 'detach'",
        lambda model: model.register_parameter("spare", nn.Parameter(torch.ones(2))),
    ),
    "a rule with parameters": (
        "no attribute 'detach'",
        lambda model: setattr(model, "combination", Min(nn.Parameter(torch.tensor(2.0)))),
    ),
    "several numbers": (
        "only for scalar outputs",
        lambda model: setattr(model, "strategy", single(numbers=3).strategy),
    ),
}
"""How GroupedModel fails, and on what."""


@pytest.mark.parametrize("name", FAILING)
def test_what_grouped_model_fails_on_is_served(name: str) -> None:
    match, change = FAILING[name]
    theirs = _changed(group(standin.MeanCombination()), change)
    with pytest.raises((AttributeError, RuntimeError), match=match):
        theirs(poses_of(4))
    network = grouped(theirs)
    _agrees(network, theirs, poses_of(4), network.combination)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_it_runs_without_gradients(guard: Any) -> None:
    theirs = group(standin.MeanCombination())
    with guard(), pytest.raises(RuntimeError, match="does not require grad"):
        theirs(poses_of(3))
    network = grouped(theirs)
    with guard():
        combined, _ = network(poses_of(3))
    assert not combined.requires_grad
    close(combined, network(poses_of(3))[0].detach())


def test_gradients_of_several_compounds_add_up() -> None:
    model, theirs = single(), group(standin.MaxCombination(pred_scale=2.0))
    network = grouped(copy.deepcopy(model), MaxCombination(pred_scale=2.0))
    for poses in (poses_of(3, seed) for seed in (5, 6, 7)):
        loss(*_plain(model, poses, Min(scale=2.0))).backward()
        loss(*theirs(poses)).backward()
        loss(*network(poses)).backward()
    close(gradients(network), gradients(model))
    right, last = (m.representation.atoms.weight.grad for m in (model, theirs))
    assert (right - last).norm() > 0.1 * right.norm()


def test_forward_leaves_grad_alone() -> None:
    theirs, network = group(standin.MeanCombination()), grouped(single(), MeanCombination())
    for module in (theirs, network):
        for p in module.parameters():
            p.grad = torch.full_like(p, 7.0)
        module(poses_of(3))
    assert all(p.grad is None for p in theirs.parameters())
    assert all(bool((p.grad == 7).all()) for p in network.parameters())


def test_pose_tensors_get_the_gradient_of_the_loss() -> None:
    model, theirs = single(), group(standin.MaxCombination(pred_scale=2.0))
    ones, others, unweighted = (poses_of(3, trained=True) for _ in range(3))
    theirs(unweighted)
    assert unweighted[0]["pos"].grad is not None, "it is written before there is a loss"
    outputs = grouped(model, MaxCombination(pred_scale=2.0))(ones)
    assert ones[0]["pos"].grad is None
    loss(*outputs).backward()
    loss(*_plain(model, others, Min(scale=2.0))).backward()
    close([pose["pos"].grad for pose in ones], [pose["pos"].grad for pose in others])


def _peak(network: nn.Module, count: int) -> int:
    network(poses_of(2))  # the first group is looked at closer
    poses = poses_of(count)
    with peak_live_bytes() as peak:
        network(poses)[0].square().backward()
    return peak.bytes


def test_memory_does_not_grow_with_the_poses() -> None:
    theirs = group(standin.MeanCombination(), width=500)
    network = grouped(single(width=500), MeanCombination())
    parameters = sum(8 * p.numel() for p in theirs.parameters())
    assert _peak(theirs, 12) - _peak(theirs, 4) > 7 * parameters
    assert _peak(network, 12) - _peak(network, 4) < 0.1 * parameters


def test_poses_without_weight_are_not_differentiated() -> None:
    theirs = group(standin.MaxCombination(pred_scale=1e6))
    counts = []
    for module in (theirs, grouped(single(), MaxCombination(pred_scale=1e6))):
        backwards: list[Any] = []
        module.strategy.energy_func.register_full_backward_hook(
            lambda *_, seen=backwards: seen.append(_)
        )
        module(poses_of(8))[0].backward()
        counts.append(len(backwards) // 3)  # the complex and its two parts
    assert counts == [8, 1]


class Tiny(nn.Module):
    """Gradients that are too small for float16, unless the loss is scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 64)

    def forward(self, pose: Pose) -> Tensor:
        return 1e-5 * self.layer(pose["pos"]).tanh().mean()


def test_scaled_losses_keep_float16_gradients() -> None:
    torch.manual_seed(0)
    model = standin.GroupedModel(Tiny(), lambda comp, *_: comp, standin.MeanCombination())
    poses = [pose | {"pos": pose["pos"].float()} for pose in poses_of(4)]
    weight = model.representation.layer.weight
    (expected,) = torch.autograd.grad(_plain(model, poses, torch.mean)[0], weight)
    errors = []
    for network in (model, grouped(model)):
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**14)
        optimizer = torch.optim.SGD(network.parameters())
        with torch.autocast(DEVICE.type, torch.float16):
            combined, _ = network(poses)
        scaler.scale(combined).backward()
        scaler.unscale_(optimizer)
        errors.append(((weight.grad - expected).norm() / expected.norm()).item())
        optimizer.zero_grad()
    assert errors[0] > 0.1
    assert errors[1] < 0.01


READOUTS: dict[str, tuple[bool, Callable[[], Grouped]]] = {
    "of the model": (True, lambda: grouped(single(readout=PIC50Readout()), MaxCombination())),
    "given": (True, lambda: grouped(single(), MaxCombination(), PIC50Readout())),
    "of a GroupedModel": (True, lambda: grouped(group(standin.MaxCombination(), PIC50Readout()))),
    "after the rule": (False, lambda: grouped(single(), MaxCombination(), None, PIC50Readout())),
    "best of the high": (False, lambda: grouped(single(), MaxCombination(False), PIC50Readout())),
    "mean": (False, lambda: grouped(single(), MeanCombination(), PIC50Readout())),
    "sum": (False, lambda: grouped(single(), RuleCombination(torch.sum), PIC50Readout())),
    "increasing": (False, lambda: grouped(single(), Min(), nn.Softplus())),
    "network of vectors": (False, lambda: grouped(single(), Min(), nn.Linear(3, 1))),
    "rule of vectors": (False, lambda: grouped(single(), AttentionPooling(3), PIC50Readout())),
}
"""Whether a readout makes the best pose the worst, and where it stands."""


@pytest.mark.parametrize("name", READOUTS)
def test_a_readout_that_makes_the_best_pose_the_worst_warns(name: str) -> None:
    is_worst, make = READOUTS[name]
    match = r"(?s)PIC50Readout acts on.*comb_readout=.*negate_preds"
    warns: AbstractContextManager[Any] = nullcontext()  # in which warnings are errors
    with pytest.warns(UserWarning, match=match) if is_worst else warns:
        network = make()
    if is_worst:  # and it does: the lowest pIC50
        combined, per_pose = network(poses_of(5))
        torch.testing.assert_close(combined, per_pose.min(), atol=1e-3, rtol=0)


def test_trying_a_readout_leaves_it_and_the_generator_alone() -> None:
    model, readout = single(), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(1))
    state, random = copy.deepcopy(readout.state_dict()), torch.get_rng_state()
    grouped(model, MaxCombination(), readout)
    close(readout.state_dict(), state, 0)
    assert torch.equal(torch.get_rng_state(), random)
    assert readout.training


def test_rules_and_readouts_are_trained() -> None:
    parts = nn.ModuleList([single(numbers=3), AttentionPooling(3, hidden=4), nn.Linear(3, 1)])
    model, rule, head = twins = copy.deepcopy(parts.double())

    def readout(prediction: Tensor) -> Tensor:
        return prediction.squeeze().tanh()  # [1, d] to [d]

    per_pose = torch.stack([readout(parts[0](pose)[0]) for pose in poses_of(4)])
    expected = stepped(parts, (parts[2](parts[1](per_pose)), per_pose))
    network = grouped(model, rule, readout, head)
    close(stepped(twins, network(poses_of(4))), expected)


# The module


def test_parts_and_parameters_have_the_names_of_grouped_model() -> None:
    theirs = group(standin.MeanCombination(), nn.Linear(1, 1).double())
    network = grouped(theirs)
    assert isinstance(network, standin.GroupedModel)
    assert gradients(network).keys() == gradients(theirs).keys()
    for name in ("representation", "strategy", "readout", "comb_readout"):
        assert getattr(network, name) is getattr(theirs, name)
    assert isinstance(network.combination, Mean)
    assert isinstance(theirs.combination, standin.MeanCombination)


def _saved(network: Grouped) -> Grouped:
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, _saved, lambda network: pickle.loads(pickle.dumps(network))]
)
def test_copies_behave_alike_and_are_apart(copied: Callable[[Grouped], Grouped]) -> None:
    network = grouped(single(), MaxCombination(), nn.Softplus(), nn.Tanh(), schedule="store")
    expected = stepped(network, network(poses_of(4)))
    twin = copied(network)
    network.zero_grad()
    close(stepped(twin, twin(poses_of(4))), expected)
    assert all(p.grad is None for p in network.parameters())
    assert twin.schedule == "store"
    assert list(twin.state_dict()) == list(network.state_dict())


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: nn.ModuleDict({"net": m})])
def test_checkpoints_go_both_ways(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """Also inside another module, as trainers have it."""
    first, last = nn.Linear(1, 1).double(), nn.Linear(1, 1).double()
    theirs = group(standin.MeanCombination(), first, last)
    network = grouped(single(), MeanCombination(), copy.deepcopy(first), copy.deepcopy(last))
    for source, target in ((theirs, network), (network, theirs), (theirs, grouped(theirs))):
        with torch.no_grad():
            for p in source.parameters():
                p.normal_()
        wrap(target).load_state_dict(wrap(source).state_dict())
        assert sorted(wrap(target).state_dict()) == sorted(wrap(source).state_dict())
        close(dict(target.state_dict()), dict(source.state_dict()), 0)


def test_a_rule_with_parameters_adds_its_keys() -> None:
    network = grouped(single(), AttentionPooling(1, hidden=2))
    assert {"combination.score.weight", "representation.atoms.bias"} <= network.state_dict().keys()
    network.load_state_dict(network.state_dict())


def test_parts_can_be_replaced_afterwards() -> None:
    model, other = single(), single(width=9)
    network = grouped(model, MeanCombination())
    network(poses_of(3))
    network.representation, network.strategy = other.representation, other.strategy
    network.combination = Min(scale=2.0)
    _agrees(network, other, poses_of(3), Min(scale=2.0))
    assert model.representation is not other.representation


def test_a_model_may_be_any_module_and_options_go_to_the_engine() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    poses = list(torch.randn(5, 4, dtype=torch.float64))
    first, last = nn.Softplus(), nn.Tanh()
    per_pose = first(model(torch.stack(poses)))[:, 0]
    expected = stepped(model, (last(per_pose.min()), per_pose))
    expected[-1] = {f"model.{name}": gradient for name, gradient in expected[-1].items()}
    network = grouped(model, Best(), first, last, chunk_size=2, collate=torch.stack)
    close(stepped(network, network(poses)), expected)
    close(network.score(poses[0]), first(model(poses[0])))
    assert "schedule='recompute'" in repr(network)


def test_losses_of_single_poses_need_another_schedule_than_stream() -> None:
    network = grouped(single(), MeanCombination(), schedule="stream")
    network(poses_of(3))[0].backward()
    with pytest.raises(PerPoseLossError, match="recompute"):
        network(poses_of(3))[1].sum().backward()


def test_second_derivatives_are_right_with_all_graphs() -> None:
    model = single()
    network = grouped(model, MaxCombination(pred_scale=2.0), schedule="retain")
    second = []
    for outputs in (network(poses_of(4)), _plain(model, poses_of(4), Min(scale=2.0))):
        weight = model.representation.atoms.weight
        (first,) = torch.autograd.grad(loss(*outputs), weight, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), weight)[0])
    close(*second)


def test_the_model_and_its_group_have_one_set_of_parameters_and_hooks_of_their_own() -> None:
    model = single()
    model.scale = nn.Parameter(torch.ones(()))
    network = grouped(model, Mean())
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    assert [*model.parameters()] == [*network.parameters()]
    calls: list[int] = []
    network.register_forward_hook(lambda *_: calls.append(1))
    model(poses_of(1)[0])
    assert not calls
    network.register_buffer("spare", torch.ones(1), persistent=False)
    assert "spare" not in model.state_dict()


# What is refused


def test_no_poses_and_nan_predictions_are_refused() -> None:
    theirs, poses = group(standin.MeanCombination()), poses_of(3)
    with pytest.raises(RuntimeError, match="non-empty TensorList"):
        theirs([])
    with pytest.raises(NoPosesError, match="no poses"):
        grouped(theirs)([])
    poses[1]["pos"][0] = torch.nan
    assert theirs(poses)[0].isnan()
    with pytest.raises(NonFinitePredictionError, match="poses 1,"):
        grouped(theirs)(poses)


BAD: dict[type[Exception], dict[str, Callable[[], Any]]] = {
    TypeError: {
        "no combination, and Model is no GroupedModel": lambda: grouped(single()),
        "class MaxCombination, not an instance of it": lambda: grouped(single(), MaxCombination),
        r"MaxCombination\(\.\.\.\) with its arguments": lambda: grouped(
            single(), standin.MaxCombination
        ),
        "compiled or replaced on the object itself.*Group the model first": lambda: grouped(
            _changed(single(), lambda model: setattr(model, "forward", model.forward)), Mean()
        ),
        "The forward of this Model was compiled": lambda: grouped(
            _changed(single(), lambda model: model.compile(backend="eager")), Mean()
        ),
        "model is a type, not an nn.Module": lambda: grouped(nn.Linear, Mean()),
    },
    ValueError: {
        "pred_readout is given, but model.readout is a PIC50Readout.*readout = None": lambda: (
            grouped(single(readout=PIC50Readout()), Mean(), nn.Softplus())
        ),
        "comb_readout is given, but model.comb_readout is a Tanh": lambda: grouped(
            group(Mean(), None, nn.Tanh()), comb_readout=nn.Softplus()
        ),
        "chunk_size": lambda: grouped(single(), Mean(), chunk_size=0),
    },
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, as it compiles
@pytest.mark.parametrize(
    ("error", "match"), [(error, match) for error, rows in BAD.items() for match in rows]
)
def test_what_does_not_fit_is_refused_when_made(error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=f"(?s){match}"):
        BAD[error][match]()


def test_mtenn_itself() -> None:
    mtenn = pytest.importorskip("mtenn", reason="mtenn is on conda-forge only, not on PyPI")
    parts = single()
    theirs = mtenn.combination.MaxCombination(negate_preds=True, pred_scale=2.0)
    model = mtenn.model.GroupedModel(parts.representation, parts.strategy, theirs)
    expected = stepped(model, model(poses_of(4)))
    network = grouped(model)
    close(stepped(network, network(poses_of(4))), expected, 1e-9)
    model.combination = MaxCombination(pred_scale=2.0)
    close(stepped(model, model(poses_of(4))), expected, 1e-9)
