"""`grouped` against plain autograd, and what is wrong in GroupedModel that is right here.

Each test of a defect shows it on the stand-in first: it is mtenn's, not the test's.
"""

import copy
import io
import pickle
from collections.abc import Callable
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
from tests.device import DEVICE, seeded
from tests.drawing import times
from tests.interop import mtenn_standin as standin
from tests.interop.mtenn_standin import Combination, PIC50Readout, Pose
from tests.interop.test_mtenn import TABLE as COMBINATIONS
from tests.interop.test_mtenn import close, loss

Combine = Callable[[Tensor], Tensor]


def _single(width: int = 6, numbers: int = 1, readout: Any = None) -> standin.Model:
    torch.manual_seed(1)
    energy = nn.Sequential(nn.Tanh(), nn.Linear(width, numbers))
    layers = standin.Representation(width), standin.DeltaStrategy(energy)
    return standin.Model(*layers, readout).double()


def _theirs(combination: Any, pred_readout: Any = None, comb_readout: Any = None) -> nn.Module:
    model = _single()
    return standin.GroupedModel(
        model.representation, model.strategy, combination, pred_readout, comb_readout
    )


def _poses(count: int, seed: int = 0, *, trained: bool = False) -> list[Pose]:
    generator = seeded(seed)
    draws = [torch.randn(6, 3, generator=generator, dtype=torch.float64) for _ in range(count)]
    side = torch.tensor([True, True, False, False, False, False])
    return [{"pos": draw.requires_grad_(trained), "lig": side} for draw in draws]


def _plain(model: nn.Module, poses: list[Pose], combine: Combine) -> tuple[Tensor, Tensor]:
    """All graphs kept; `combine` is the rule and what follows it."""
    per_pose = torch.stack([model(pose)[0].squeeze() for pose in poses])
    return combine(per_pose), per_pose


def _gradients(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in module.named_parameters()}


def _stepped(module: nn.Module, outputs: tuple[Tensor, Tensor]) -> list[Any]:
    module.zero_grad()
    loss(*outputs).backward()
    return [*(output.detach() for output in outputs), _gradients(module)]


# What is passed to grouped; its rule by torch alone; the stand-in's, where there is one.
TABLE: dict[str, tuple[Any, Combine, Any]] = {
    **{name: (ours(), rule, theirs()) for name, (ours, rule, theirs) in COMBINATIONS.items()},
    **{f"mtenn's {name}": (row[2](), row[1], row[2]()) for name, row in COMBINATIONS.items()},
    "a rule": (Best(), torch.amin, None),
    "a rule in mtenn's signature": (RuleCombination(Best()), torch.amin, None),
    "a function": (torch.median, torch.median, None),
}


@given(name=st.sampled_from(list(TABLE)), count=st.integers(1, 8), seed=st.integers(0, 2**31))
@times(2.4)
def test_a_loss_of_both_outputs_has_autograds_gradient(name: str, count: int, seed: int) -> None:
    combination, rule, _ = TABLE[name]
    model, poses = _single(), _poses(count, seed)
    expected = _stepped(model, _plain(model, poses, lambda y: rule(y).tanh()))
    network = grouped(model, combination, comb_readout=torch.tanh)
    close(_stepped(network, network(poses)), expected, 1e-9)


@pytest.mark.parametrize("name", COMBINATIONS)
@pytest.mark.parametrize("count", [1, 8])
def test_it_agrees_with_grouped_model_where_that_is_right(name: str, count: int) -> None:
    combination, _, theirs = TABLE[name]
    first, last = nn.Softplus(), nn.Tanh()
    model = _theirs(theirs, first, last)
    expected = _stepped(model, model(_poses(count)))
    existing = grouped(model)  # a GroupedModel brings everything along
    for network in (grouped(_single(), combination, first, last), existing):
        close(_stepped(network, network(_poses(count))), expected, 1e-9)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_shapes_are_those_of_grouped_model(shape: tuple[int, ...]) -> None:
    network = grouped(_single(), MaxCombination(), pred_readout=lambda y: y.reshape(shape))
    combined, per_pose = network(_poses(3))
    assert (combined.shape, per_pose.shape) == ((), (3,))


# What is wrong in GroupedModel


def test_gradients_of_several_compounds_add_up() -> None:
    compounds = [_poses(3, seed) for seed in (5, 6, 7)]
    model, theirs = _single(), _theirs(standin.MaxCombination(pred_scale=2.0))
    network = grouped(copy.deepcopy(model), MaxCombination(pred_scale=2.0))
    for poses in compounds:
        loss(*_plain(model, poses, Min(scale=2.0))).backward()
        loss(*theirs(poses)).backward()
        loss(*network(poses)).backward()
    close(_gradients(network), _gradients(model))
    right, last = (m.representation.atoms.weight.grad for m in (model, theirs))
    assert (right - last).norm() > 0.1 * right.norm()


def test_forward_leaves_grad_alone() -> None:
    theirs, network = _theirs(standin.MeanCombination()), grouped(_single(), MeanCombination())
    for module in (theirs, network):
        for p in module.parameters():
            p.grad = torch.full_like(p, 7.0)
        module(_poses(3))
    assert all(p.grad is None for p in theirs.parameters())
    assert all(bool((p.grad == 7).all()) for p in network.parameters())


def _freeze(model: nn.Module) -> None:
    model.representation.atoms.bias.requires_grad_(False)


def _leave_unused(model: nn.Module) -> None:
    model.representation.spare = nn.Parameter(torch.ones(2))


@pytest.mark.parametrize("change", [_freeze, _leave_unused])
def test_parameters_without_gradient_are_served(change: Callable[[nn.Module], None]) -> None:
    theirs = _theirs(standin.MeanCombination())
    change(theirs)
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'detach'"):
        theirs(_poses(3))
    model = _single()
    change(model)
    expected = _stepped(model, _plain(model, _poses(3), torch.mean))
    assert None in expected[-1].values()
    for network in (grouped(model, MeanCombination()), grouped(theirs)):
        close(_stepped(network, network(_poses(3))), expected)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_it_runs_without_gradients(guard: Any) -> None:
    theirs = _theirs(standin.MeanCombination())
    with guard(), pytest.raises(RuntimeError, match="does not require grad"):
        theirs(_poses(3))
    network = grouped(theirs)
    with guard():
        combined, _ = network(_poses(3))
    assert not combined.requires_grad
    close(combined, network(_poses(3))[0].detach())


def test_pose_tensors_get_the_gradient_of_the_loss() -> None:
    model, poses = _single(), _poses(3, trained=True)
    loss(*_plain(model, poses, Min(scale=2.0))).backward()
    expected = [pose["pos"].grad for pose in poses]

    poses = _poses(3, trained=True)
    _theirs(standin.MaxCombination(pred_scale=2.0))(poses)
    unweighted = [pose["pos"].grad for pose in poses]
    assert unweighted[0] is not None, "GroupedModel's forward writes it, before there is a loss"

    poses = _poses(3, trained=True)
    outputs = grouped(model, MaxCombination(pred_scale=2.0))(poses)
    assert poses[0]["pos"].grad is None
    loss(*outputs).backward()
    close([pose["pos"].grad for pose in poses], expected)


def test_predictions_may_be_vectors() -> None:
    layers = standin.Representation(6), standin.DeltaStrategy(nn.Linear(6, 3))
    theirs = standin.GroupedModel(*layers, standin.MeanCombination()).double()
    with pytest.raises(RuntimeError, match="only for scalar outputs"):
        theirs(_poses(4))
    model = _single(numbers=3)
    per_pose = torch.stack([model(pose)[0] for pose in _poses(4)])
    expected = _stepped(model, (per_pose.amin(0), per_pose))
    network = grouped(model, Best())
    close(_stepped(network, network(_poses(4))), expected)


def _peak(network: nn.Module, count: int) -> int:
    network(_poses(2))  # the first group is looked at closer
    poses = _poses(count)
    with peak_live_bytes() as peak:
        network(poses)[0].square().backward()
    return peak.bytes


def test_memory_does_not_grow_with_the_poses() -> None:
    def wide() -> standin.Model:
        return _single(width=500)

    parameters = sum(8 * p.numel() for p in wide().parameters())
    model = standin.GroupedModel(wide().representation, wide().strategy, standin.MeanCombination())
    assert _peak(model, 12) - _peak(model, 4) > 7 * parameters
    network = grouped(wide(), MeanCombination())
    assert _peak(network, 12) - _peak(network, 4) < 0.1 * parameters


def test_poses_without_weight_are_not_differentiated() -> None:
    sharp = {"negate_preds": True, "pred_scale": 1e6}
    theirs = _theirs(standin.MaxCombination(**sharp))
    network = grouped(_single(), MaxCombination(**sharp))
    counts = []
    for module, strategy in ((theirs, theirs.strategy), (network, network.strategy)):
        backwards: list[Any] = []
        strategy.energy_func.register_full_backward_hook(lambda *_, seen=backwards: seen.append(_))
        module(_poses(8))[0].backward()
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
    layers = Tiny(), lambda comp, *_: comp
    model = standin.GroupedModel(*layers, standin.MeanCombination())
    poses = [pose | {"pos": pose["pos"].float()} for pose in _poses(4)]
    weight = model.representation.layer.weight
    per_pose = torch.stack([standin.Model.forward(model, pose)[0] for pose in poses])
    (expected,) = torch.autograd.grad(per_pose.mean(), weight)
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


@pytest.mark.parametrize("where", ["of the model", "given", "of a GroupedModel"])
def test_a_readout_that_makes_the_best_pose_the_worst_warns(where: str) -> None:
    model = {
        "of the model": _single(readout=PIC50Readout()),
        "given": _single(),
        "of a GroupedModel": _theirs(standin.MaxCombination(), PIC50Readout()),
    }[where]
    combination = None if where == "of a GroupedModel" else MaxCombination()
    with pytest.warns(UserWarning, match=r"(?s)PIC50Readout acts on.*comb_readout=.*negate_preds"):
        network = grouped(model, combination, PIC50Readout() if where == "given" else None)
    combined, per_pose = network(_poses(5))  # and it does: the lowest pIC50
    torch.testing.assert_close(combined, per_pose.min(), atol=1e-3, rtol=0)


NETWORKS_IN_ORDER: dict[str, Callable[[], Grouped]] = {
    "after the combination": lambda: grouped(_single(), MaxCombination(), None, PIC50Readout()),
    "best of the high": lambda: grouped(_single(), MaxCombination(False), PIC50Readout()),
    "mean": lambda: grouped(_single(), MeanCombination(), PIC50Readout()),
    "sum": lambda: grouped(_single(), RuleCombination(torch.sum), PIC50Readout()),
    "increasing": lambda: grouped(_single(), Min(), nn.Softplus()),
    "a network that takes vectors": lambda: grouped(_single(), Min(), nn.Linear(3, 1)),
    "a rule that takes vectors": lambda: grouped(_single(), AttentionPooling(3), PIC50Readout()),
}


@pytest.mark.parametrize("name", NETWORKS_IN_ORDER)
def test_other_readouts_do_not_warn(name: str) -> None:
    NETWORKS_IN_ORDER[name]()  # warnings are errors


def test_trying_a_readout_leaves_it_and_the_generator_alone() -> None:
    model, readout = _single(), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(1))
    state, random = copy.deepcopy(readout.state_dict()), torch.get_rng_state()
    grouped(model, MaxCombination(), readout)
    torch.testing.assert_close(readout.state_dict(), state)
    assert torch.equal(torch.get_rng_state(), random)
    assert readout.training


TRAINABLE: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "attention pooling": (3, lambda: AttentionPooling(3, hidden=4)),
    "learned temperature": (1, lambda: Min(scale=nn.Parameter(torch.tensor(2.0)))),
}


@pytest.mark.parametrize("name", TRAINABLE)
def test_rules_are_trained(name: str) -> None:
    numbers, make = TRAINABLE[name]
    parts = nn.ModuleList([_single(numbers=numbers), make(), nn.Linear(numbers, 1)]).double()
    model, rule, head = twins = copy.deepcopy(parts)

    def readout(prediction: Tensor) -> Tensor:
        return prediction.squeeze().tanh()  # [1, d] to [d]

    per_pose = torch.stack([readout(parts[0](pose)[0]) for pose in _poses(4)])
    combined = parts[2](parts[1](per_pose).reshape(numbers))
    expected = _stepped(parts, (combined, per_pose))
    network = grouped(model, rule, readout, lambda y: head(y.reshape(numbers)))
    close(_stepped(twins, network(_poses(4))), expected)
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'detach'"):
        _theirs(copy.deepcopy(rule))(_poses(4))


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


@pytest.mark.parametrize("kind", [LogSumExp, MaxOfMine])
def test_a_combination_derived_by_hand_is_taken_as_it_is(kind: type[Combination]) -> None:
    model = _single()
    expected = _stepped(model, _plain(model, _poses(5), lambda y: torch.logsumexp(y, 0)))
    network = grouped(model, kind())
    close(_stepped(network, network(_poses(5))), expected)


def test_one_derived_by_hand_is_held_to_the_laws_of_a_rule() -> None:
    assert_combination(grouped(_single(), LogSumExp()).combination)


@pytest.mark.parametrize(
    ("combination", "rule"),
    [
        (MaxCombination(False, 2.0), Max),
        (RuleCombination(Best()), Best),
        (Best(), Best),
        (standin.MaxCombination(), Min),
        (standin.MeanCombination(), Mean),
    ],
)
def test_the_combination_of_a_grouped_model_is_found(combination: Any, rule: type) -> None:
    assert type(grouped(_theirs(combination)).combination) is rule
    assert type(grouped(_theirs(combination), Mean()).combination) is Mean


def test_older_names_of_arguments_are_understood() -> None:
    class MaxCombination(Combination):
        def __init__(self, neg=True, scale=1000.0):
            super().__init__()
            self.neg, self.scale = neg, scale

        def forward(self, *arguments):
            return standin.MaxCombination(self.neg, self.scale)(*arguments)

    MaxCombination.__module__ = "mtenn.combination"
    found = grouped(_single(), MaxCombination(False, 3.0)).combination
    assert isinstance(found, Max)
    assert found.scale == 3.0


# The module


def test_parts_and_parameters_have_the_names_of_grouped_model() -> None:
    theirs = _theirs(standin.MeanCombination(), nn.Linear(1, 1).double())
    network = grouped(theirs)
    assert isinstance(network, standin.GroupedModel)
    assert [name for name, _ in network.named_parameters()] == [
        name for name, _ in theirs.named_parameters()
    ]
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
    network = grouped(_single(), MaxCombination(), nn.Softplus(), nn.Tanh(), schedule="store")
    expected = _stepped(network, network(_poses(4)))
    twin = copied(network)
    network.zero_grad()
    close(_stepped(twin, twin(_poses(4))), expected)
    assert all(p.grad is None for p in network.parameters())
    assert twin.schedule == "store"
    assert list(twin.state_dict()) == list(network.state_dict())


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: nn.ModuleDict({"net": m})])
def test_checkpoints_go_both_ways(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """Also inside another module, as trainers have it."""
    first, last = nn.Linear(1, 1).double(), nn.Linear(1, 1).double()
    theirs = _theirs(standin.MeanCombination(), first, last)
    network = grouped(_single(), MeanCombination(), copy.deepcopy(first), copy.deepcopy(last))
    for source, target in ((theirs, network), (network, theirs), (theirs, grouped(theirs))):
        with torch.no_grad():
            for p in source.parameters():
                p.normal_()
        wrap(target).load_state_dict(wrap(source).state_dict())
        assert sorted(wrap(target).state_dict()) == sorted(wrap(source).state_dict())
        for name, tensor in source.state_dict().items():
            assert torch.equal(target.state_dict()[name], tensor), name


def test_a_rule_with_parameters_adds_its_keys() -> None:
    network = grouped(_single(), AttentionPooling(1, hidden=2))
    assert {"combination.score.weight", "representation.atoms.bias"} <= network.state_dict().keys()
    network.load_state_dict(network.state_dict())


def test_parts_can_be_replaced_afterwards() -> None:
    model, other = _single(), _single(width=9)
    network = grouped(model, MeanCombination())
    network(_poses(3))
    network.representation, network.strategy = other.representation, other.strategy
    network.combination = Min(scale=2.0)
    expected = _stepped(other, _plain(other, _poses(3), Min(scale=2.0)))
    close(_stepped(network, network(_poses(3))), expected)
    assert model.representation is not other.representation


def test_a_model_may_be_any_module_and_options_go_to_the_engine() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    poses = list(torch.randn(5, 4, dtype=torch.float64))
    first, last = nn.Softplus(), nn.Tanh()
    per_pose = first(model(torch.stack(poses)))[:, 0]
    expected = _stepped(model, (last(per_pose.min()), per_pose))
    expected[-1] = {f"model.{name}": gradient for name, gradient in expected[-1].items()}
    network = grouped(model, Best(), first, last, chunk_size=2, collate=torch.stack)
    close(_stepped(network, network(poses)), expected)
    close(network.score(poses[0]), first(model(poses[0])))
    assert "schedule='recompute'" in repr(network)


def test_losses_of_single_poses_need_another_schedule_than_stream() -> None:
    network = grouped(_single(), MeanCombination(), schedule="stream")
    network(_poses(3))[0].backward()
    with pytest.raises(PerPoseLossError, match="recompute"):
        network(_poses(3))[1].sum().backward()


def test_second_derivatives_are_right_with_all_graphs() -> None:
    model = _single()
    weight = model.representation.atoms.weight

    def second(outputs: tuple[Tensor, Tensor]) -> Tensor:
        (first,) = torch.autograd.grad(loss(*outputs), weight, create_graph=True)
        return torch.autograd.grad(first.square().sum(), weight)[0]

    expected = second(_plain(model, _poses(4), lambda y: -torch.logsumexp(-2 * y, 0) / 2))
    network = grouped(model, MaxCombination(pred_scale=2.0), schedule="retain")
    close(second(network(_poses(4))), expected)


def test_no_poses_and_nan_predictions_are_refused() -> None:
    theirs, poses = _theirs(standin.MeanCombination()), _poses(3)
    with pytest.raises(RuntimeError, match="non-empty TensorList"):
        theirs([])
    with pytest.raises(NoPosesError, match="no poses"):
        grouped(theirs)([])
    poses[1]["pos"][0] = torch.nan
    assert theirs(poses)[0].isnan()
    with pytest.raises(NonFinitePredictionError, match="poses 1,"):
        grouped(theirs)(poses)


def _with_a_forward() -> nn.Module:
    model = _single()
    model.forward = lambda pose: model(pose)
    return model


def _compiled() -> nn.Module:
    model = _single()
    model.compile(backend="eager")
    return model


def _with_scale() -> nn.Module:
    model = _single()
    model.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
    return model


def test_the_model_and_its_group_have_one_set_of_parameters_and_hooks_of_their_own() -> None:
    model = _with_scale()
    network = grouped(model, Mean())
    model.load_state_dict(_with_scale().state_dict(), assign=True)
    assert [*model.parameters()] == [*network.parameters()]
    calls: list[int] = []
    network.register_forward_hook(lambda *_: calls.append(1))
    model(_poses(1)[0])
    assert not calls
    network.register_buffer("spare", torch.ones(1), persistent=False)
    assert "spare" not in model.state_dict()


BAD: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "no combination": (
        TypeError,
        r"no combination, and Model is no GroupedModel",
        lambda: grouped(_single()),
    ),
    "a class": (
        TypeError,
        r"class MaxCombination, not an instance",
        lambda: grouped(_single(), MaxCombination),
    ),
    "a class of mtenn's": (
        TypeError,
        r"class MaxCombination, not an instance",
        lambda: grouped(_single(), standin.MaxCombination),
    ),
    "two readouts of poses": (
        ValueError,
        r"pred_readout is given, but model.readout is a PIC50Readout.*set model.readout = None",
        lambda: grouped(_single(readout=PIC50Readout()), MeanCombination(), nn.Softplus()),
    ),
    "two readouts of the combination": (
        ValueError,
        r"comb_readout is given, but model.comb_readout is a Tanh",
        lambda: grouped(_theirs(Mean(), None, nn.Tanh()), Mean(), None, nn.Softplus()),
    ),
    "a forward of the object's own": (
        TypeError,
        r"compiled or replaced on the object itself.*Group the model first",
        lambda: grouped(_with_a_forward(), Mean()),
    ),
    "a compiled forward": (
        TypeError,
        r"compiled or replaced on the object itself",
        lambda: grouped(_compiled(), Mean()),
    ),
    "no module": (
        TypeError,
        r"model is a type, not an nn.Module",
        lambda: grouped(nn.Linear, Mean()),
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, as it compiles
@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused_when_made(name: str) -> None:
    error, match, make = BAD[name]
    with pytest.raises(error, match=rf"(?s){match}"):
        make()


def test_mtenn_itself() -> None:
    mtenn = pytest.importorskip("mtenn", reason="mtenn is on conda-forge only, not on PyPI")
    parts = _single()
    theirs = mtenn.combination.MaxCombination(negate_preds=True, pred_scale=2.0)
    model = mtenn.model.GroupedModel(parts.representation, parts.strategy, theirs)
    expected = _stepped(model, model(_poses(4)))
    network = grouped(model)
    close(_stepped(network, network(_poses(4))), expected, 1e-9)
    model.combination = MaxCombination(pred_scale=2.0)
    close(_stepped(model, model(_poses(4))), expected, 1e-9)
