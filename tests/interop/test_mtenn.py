"""Combination objects in mtenn's calling convention, against plain autograd and its formulas."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from posegrad import (
    AttentionPooling,
    Best,
    HigherOrderError,
    Min,
    NonFinitePredictionError,
    NoPosesError,
    ShapeMismatchError,
    StaleParametersError,
    TopK,
    UnsupportedModuleError,
)
from posegrad.interop.mtenn import (
    BoltzmannCombination,
    MaxCombination,
    MeanCombination,
    RuleCombination,
    join_grad_dict,
    split_grad_dict,
)
from tests.device import seeded
from tests.drawing import times
from tests.interop import mtenn_standin as standin

# Ours, what it must be, and the stand-in's, whose gradient is written by hand.
TABLE: dict[str, tuple[Any, Callable[[Tensor], Tensor], Any]] = {
    "mean": (MeanCombination, torch.mean, standin.MeanCombination),
    "min": (MaxCombination, lambda y: -_logsumexp(-y, 1000.0), standin.MaxCombination),
    "soft min": (
        partial(MaxCombination, pred_scale=1.7),
        lambda y: -_logsumexp(-y, 1.7),
        partial(standin.MaxCombination, pred_scale=1.7),
    ),
    "max": (
        partial(MaxCombination, negate_preds=False, pred_scale=3.0),
        lambda y: _logsumexp(y, 3.0),
        partial(standin.MaxCombination, False, 3.0),
    ),
    "boltzmann": (
        BoltzmannCombination,
        lambda y: (torch.softmax(-y, dim=0) * y).sum(),
        standin.BoltzmannCombination,
    ),
}


def _logsumexp(y: Tensor, scale: float) -> Tensor:
    return torch.logsumexp(scale * y, dim=0) / scale


NAMES = ["weight", "bias"]


class Scores(nn.Module):
    """N numbers that depend on two parameters, and their gradients as GroupedModel has them."""

    def __init__(self, count: int, seed: int = 0, spread: float = 2.0) -> None:
        super().__init__()
        generator = seeded(seed)
        draw = torch.randn(count + 1, 2, 3, generator=generator, dtype=torch.float64)
        self.weight = nn.Parameter(draw[0])
        self.bias = nn.Parameter(draw[0, 0, :1].clone())
        self.poses = spread * draw[1:]

    def forward(self) -> Tensor:
        return (self.poses * self.weight.tanh()).sum(dim=(1, 2)) + self.bias * self.poses[:, 0, 0]

    def handed_over(self, shape: tuple[int, ...] = ()) -> tuple[Any, ...]:
        predictions = self()
        rows = [
            torch.autograd.grad(y, [self.weight, self.bias], retain_graph=True) for y in predictions
        ]
        gradients = {name: [row[i] for row in rows] for i, name in enumerate(NAMES)}
        pred_list = [y.detach().reshape(shape) for y in predictions]
        return pred_list, gradients, NAMES, self.weight, self.bias


def loss(combined: Tensor, per_pose: Tensor) -> Tensor:
    """Of both outputs, with weights of both signs."""
    signs = torch.cos(3 * torch.arange(per_pose.numel(), dtype=per_pose.dtype) + 1)
    return (combined - 1.5).square().sum() + (signs * per_pose.flatten()).sum()


def _results(model: nn.Module, combined: Tensor, per_pose: Tensor) -> list[Tensor]:
    gradients = torch.autograd.grad(loss(combined, per_pose), list(model.parameters()))
    return [combined.detach(), per_pose.detach(), *gradients]


def close(found: Any, expected: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@given(
    name=st.sampled_from(list(TABLE)),
    count=st.integers(1, 8),
    shape=st.sampled_from([(), (1,), (1, 1)]),
    seed=st.integers(0, 2**31),
)
@times(2.4)
def test_a_loss_of_both_outputs_has_the_gradient_of_autograd_and_of_the_formulas(
    name: str, count: int, shape: tuple[int, ...], seed: int
) -> None:
    make, rule, theirs = TABLE[name]
    model = Scores(count, seed)
    per_pose, given_to = model(), model.handed_over(shape)
    found = _results(model, *make()(*given_to))
    close(found, _results(model, rule(per_pose), per_pose))
    close(found, _results(model, *theirs()(*given_to)), 1e-9)


@pytest.mark.parametrize("rule", [Best(), TopK(3), Min(torch.tensor(2.0)), lambda y: y.median()])
def test_any_rule_without_parameters_can_be_wrapped(rule: Any) -> None:
    model = Scores(6)
    per_pose = model()
    expected = _results(model, rule(per_pose), per_pose)
    close(_results(model, *RuleCombination(rule)(*model.handed_over())), expected)


def _poses(count: int) -> list[dict[str, Tensor]]:
    side = torch.tensor([True, True, False, False, False])
    poses = torch.randn(count, 5, 3, dtype=torch.float64)
    return [{"pos": pose, "lig": side} for pose in poses]


@pytest.mark.parametrize("name", TABLE)
def test_an_existing_grouped_model_takes_them(name: str) -> None:
    make, _, theirs = TABLE[name]
    energy = nn.Sequential(nn.Tanh(), nn.Linear(8, 1))
    layers = standin.Representation(8), standin.DeltaStrategy(energy)
    model = standin.GroupedModel(*layers, theirs()).double()
    keys = list(model.state_dict())
    poses = _poses(5)
    expected = _results(model, *model(poses))
    model.combination = make()
    close(_results(model, *model(poses)), expected, 1e-9)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("name", TABLE)
def test_they_have_no_state_and_copies_behave_alike(name: str) -> None:
    combination, model = TABLE[name][0](), Scores(4)
    assert not combination.state_dict()
    expected = _results(model, *combination(*model.handed_over()))
    for twin in (copy.deepcopy(combination), pickle.loads(pickle.dumps(combination))):
        assert all(map(torch.equal, _results(model, *twin(*model.handed_over())), expected))


def test_weights_are_normalised_in_float32_where_the_formulas_are_not() -> None:
    """The parameter is added to every prediction, so its gradient is the sum of the weights."""
    shift = nn.Parameter(torch.zeros(()))
    ones = {"shift": [torch.ones(())] * 3}
    predictions = [torch.tensor(-80.0)] * 3
    errors = {}
    for kind in (standin.MaxCombination, MaxCombination):
        combined, _ = kind()(predictions, ones, ["shift"], shift)
        errors[kind] = abs(torch.autograd.grad(combined, shift)[0].item() - 1)
    assert errors[standin.MaxCombination] > 1e-3
    assert errors[MaxCombination] < 1e-6


@given(names=st.lists(st.text(min_size=1), min_size=1, unique=True), count=st.integers(1, 5))
def test_splitting_and_joining_are_inverse(names: list[str], count: int) -> None:
    gradients = {name: [torch.full((i + 1,), float(i)) for i in range(count)] for name in names}
    joined = join_grad_dict(*split_grad_dict(gradients))
    assert list(joined) == names
    torch.testing.assert_close(joined, gradients)
    assert (
        MeanCombination.split_grad_dict(gradients)[0]
        == standin.Combination.split_grad_dict(gradients)[0]
    ), "a class derived from mtenn's may be derived from ours"


def test_joining_refuses_unequal_lists() -> None:
    with pytest.raises(ValueError, match="shorter"):
        join_grad_dict(["a", "b"], [torch.ones(1)])


def test_a_backward_can_be_repeated_and_leaves_the_given_gradients_alone() -> None:
    model = Scores(1)
    given_to = model.handed_over()
    before = copy.deepcopy(given_to[1])
    combined, _ = MeanCombination()(*given_to)
    for _ in range(3):
        combined.backward(retain_graph=True)
    torch.testing.assert_close(model.weight.grad, 3 * before["weight"][0])
    torch.testing.assert_close(given_to[1], before)


def test_frozen_parameters_get_no_gradient() -> None:
    model = Scores(3)
    given_to = model.handed_over()
    model.bias.requires_grad_(False)
    combined, _ = MeanCombination()(*given_to)
    combined.backward()
    assert model.bias.grad is None
    torch.testing.assert_close(model.weight.grad, torch.stack(given_to[1]["weight"]).mean(0))


def test_there_is_no_graph_under_no_grad() -> None:
    given_to = Scores(3).handed_over()
    with torch.no_grad():
        combined, per_pose = MeanCombination()(*given_to)
    assert not combined.requires_grad
    assert not per_pose.requires_grad


def _with(**changes: Any) -> list[Any]:
    pred_list, gradients, names, *parameters = Scores(2).handed_over()
    handed = {"pred_list": pred_list, "grad_dict": gradients, "param_names": names}
    handed |= {"model_params": parameters} | changes
    return [*(handed[key] for key in list(handed)[:3]), *handed["model_params"]]


def _gradients(**changes: Any) -> dict[str, list[Tensor]]:
    return {**Scores(2).handed_over()[1], **changes}


BAD: dict[str, tuple[type[Exception], str, list[Any]]] = {
    "no predictions": (NoPosesError, r"no poses.*Leave compounds", _with(pred_list=[])),
    "vectors": (
        ShapeMismatchError,
        r"pose 1 has shape \[3\].*grouped\(model, rule\), which takes vectors",
        _with(pred_list=[torch.ones(1), torch.ones(3)]),
    ),
    "precisions": (
        ShapeMismatchError,
        r"pose 1 is torch.float64 \[\], that of pose 0 is torch.float32",
        _with(pred_list=[torch.ones(1), torch.ones(1).double()]),
    ),
    "nan": (
        NonFinitePredictionError,
        r"1 of 2 poses are not finite: poses 1, predictions nan",
        _with(pred_list=[torch.ones(()), torch.tensor(torch.nan)]),
    ),
    "a gradient too few": (
        ShapeMismatchError,
        r"2 predictions.*: bias has 1 of \[1\], needs 2 of \[1\]\..*one for each",
        _with(grad_dict=_gradients(bias=[torch.ones(1)])),
    ),
    "another shape": (
        ShapeMismatchError,
        r"weight has 2 of \[6\], needs 2 of \[2, 3\]; bias has 0 of any shape, needs 2",
        _with(grad_dict=_gradients(weight=[torch.ones(6)] * 2, bias=[])),
    ),
    "names without gradients": (
        ShapeMismatchError,
        r"bias has no entry, needs 2 of \[1\]\..*same model.named_parameters\(\)",
        _with(grad_dict={"weight": _gradients()["weight"]}),
    ),
    "gradients without names": (
        ShapeMismatchError,
        r"scale has 0 of any shape, needs no entry; shift has 0",
        _with(grad_dict=_gradients(scale=[], shift=[])),
    ),
    "a parameter too few": (
        ShapeMismatchError,
        r"2 param_names and 1 parameters",
        _with(model_params=[nn.Parameter(torch.ones(2, 3))]),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused(name: str) -> None:
    error, match, arguments = BAD[name]
    with pytest.raises(error, match=rf"(?s){match}"):
        MaxCombination()(*arguments)


def test_nan_predictions_say_that_mtenn_has_dropped_grad() -> None:
    with pytest.raises(NonFinitePredictionError) as caught:
        MeanCombination()(*_with(pred_list=[torch.tensor(torch.nan)] * 2))
    assert "had cleared .grad" in caught.value.__notes__[0]


@pytest.mark.parametrize("rule", [AttentionPooling(3), Min(nn.Parameter(torch.ones(())))])
def test_rules_with_parameters_are_refused_when_made(rule: Any) -> None:
    with pytest.raises(UnsupportedModuleError, match=r"(?s)parameters: (hidden|scale).*grouped\("):
        RuleCombination(rule)


def test_what_is_no_rule_is_refused_when_made() -> None:
    with pytest.raises(TypeError, match="class Best, not an instance"):
        RuleCombination(Best)
    with pytest.raises(ValueError, match="scale is -1"):
        MaxCombination(pred_scale=-1)


def test_second_derivatives_are_refused_where_mtenns_are_wrong() -> None:
    model = Scores(3)
    per_pose = model()
    second = {}
    for name, outputs in {
        "autograd": (-_logsumexp(-per_pose, 2.0), per_pose),
        "stand-in": standin.MaxCombination(pred_scale=2.0)(*model.handed_over()),
    }.items():
        (first,) = torch.autograd.grad(loss(*outputs), model.weight, create_graph=True)
        (second[name],) = torch.autograd.grad(first.square().sum(), model.weight)
    assert (second["stand-in"] - second["autograd"]).norm() > 0.01 * second["autograd"].norm()

    outputs = MaxCombination(pred_scale=2.0)(*model.handed_over())
    (first,) = torch.autograd.grad(loss(*outputs), model.weight, create_graph=True)
    with pytest.raises(HigherOrderError, match="second derivative"):
        first.square().sum().backward()


def test_a_parameter_changed_before_backward_is_refused() -> None:
    model = Scores(3)
    combined, _ = MeanCombination()(*model.handed_over())
    with torch.no_grad():
        model.weight.add_(1)
    with pytest.raises(StaleParametersError, match="weight"):
        combined.backward()
