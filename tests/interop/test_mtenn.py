"""Combination objects in mtenn's calling convention, against plain autograd and its formulas."""

import copy
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
    MaxCombination,
    MeanCombination,
    RuleCombination,
    join_grad_dict,
    split_grad_dict,
)
from tests.device import seeded
from tests.drawing import times
from tests.interop import mtenn_standin as standin
from tests.interop.mtenn_table import COMBINATIONS, close, group, loss, poses_of, stepped

NAMES = ["weight", "bias"]


class Scores(nn.Module):
    """N numbers that depend on two parameters, and their gradients as GroupedModel has them."""

    def __init__(self, count: int = 3, seed: int = 0) -> None:
        super().__init__()
        draw = torch.randn(count + 1, 2, 3, generator=seeded(seed), dtype=torch.float64)
        self.weight = nn.Parameter(draw[0])
        self.bias = nn.Parameter(draw[0, 0, :1].clone())
        self.poses = 2 * draw[1:]

    def forward(self) -> Tensor:
        return (self.poses * self.weight.tanh()).sum(dim=(1, 2)) + self.bias * self.poses[:, 0, 0]

    def handed_over(self, shape: tuple[int, ...] = ()) -> tuple[Any, ...]:
        predictions = self()
        parameters = self.weight, self.bias
        rows = [torch.autograd.grad(y, parameters, retain_graph=True) for y in predictions]
        gradients = {name: [row[i] for row in rows] for i, name in enumerate(NAMES)}
        return [y.detach().reshape(shape) for y in predictions], gradients, NAMES, *parameters


@pytest.mark.parametrize("name", COMBINATIONS)
@given(
    count=st.integers(1, 8), shape=st.sampled_from([(), (1,), (1, 1)]), seed=st.integers(0, 2**31)
)
@times(0.5)
def test_a_loss_of_both_outputs_has_the_gradient_of_autograd_and_of_the_formulas(
    name: str, count: int, shape: tuple[int, ...], seed: int
) -> None:
    make, rule, theirs = COMBINATIONS[name]
    model = Scores(count, seed)
    per_pose, given_to = model(), model.handed_over(shape)
    found = stepped(model, make()(*given_to))
    close(found, stepped(model, (rule(per_pose), per_pose)))
    close(found, stepped(model, theirs()(*given_to)), 1e-9)


@pytest.mark.parametrize("rule", [Best(), TopK(3), Min(torch.tensor(2.0)), lambda y: y.median()])
def test_any_rule_without_parameters_can_be_wrapped(rule: Any) -> None:
    model = Scores(6)
    per_pose = model()
    expected = stepped(model, (rule(per_pose), per_pose))
    close(stepped(model, RuleCombination(rule)(*model.handed_over())), expected)


def test_a_pose_without_weight_counts_for_nothing_whatever_its_gradient() -> None:
    model = Scores(2)
    predictions, gradients, *rest = model.handed_over()
    best, worst = sorted(range(2), key=lambda i: predictions[i])
    gradients["weight"][worst].fill_(torch.inf)
    RuleCombination(Best())(predictions, gradients, *rest)[0].backward()
    close(model.weight.grad, gradients["weight"][best])


@pytest.mark.parametrize("name", COMBINATIONS)
def test_an_existing_grouped_model_takes_them(name: str) -> None:
    make, _, theirs = COMBINATIONS[name]
    model, poses = group(theirs()), poses_of(5)
    keys, expected = list(model.state_dict()), stepped(model, model(poses))
    model.combination = make()
    close(stepped(model, model(poses)), expected, 1e-9)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("name", COMBINATIONS)
def test_they_have_no_state_and_copies_behave_alike(name: str) -> None:
    combination, model = COMBINATIONS[name][0](), Scores()
    assert not combination.state_dict()
    expected = stepped(model, combination(*model.handed_over()))
    for twin in (copy.deepcopy(combination), pickle.loads(pickle.dumps(combination))):
        close(stepped(model, twin(*model.handed_over())), expected, 0)


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
    close(joined, gradients)
    kinds = MeanCombination, standin.Combination  # a class derived from the one may be from ours
    ours, theirs = (kind.split_grad_dict(gradients)[0] for kind in kinds)
    assert ours == theirs


def test_a_backward_can_be_repeated_and_leaves_the_given_gradients_alone() -> None:
    model = Scores(1)
    given_to = model.handed_over()
    before = copy.deepcopy(given_to[1])
    combined, _ = MeanCombination()(*given_to)
    for _ in range(3):
        combined.backward(retain_graph=True)
    close(model.weight.grad, 3 * before["weight"][0])
    close(given_to[1], before)


def test_frozen_parameters_get_no_gradient() -> None:
    model = Scores()
    given_to = model.handed_over()
    model.bias.requires_grad_(False)
    combined, _ = MeanCombination()(*given_to)
    combined.backward()
    assert model.bias.grad is None
    close(model.weight.grad, torch.stack(given_to[1]["weight"]).mean(0))


def test_there_is_no_graph_under_no_grad() -> None:
    given_to = Scores().handed_over()
    with torch.no_grad():
        outputs = MeanCombination()(*given_to)
    assert not any(output.requires_grad for output in outputs)


def _with(**changes: Any) -> Callable[[], Any]:
    """A call with arguments in the place of those of two poses."""
    pred_list, gradients, names, *parameters = Scores(2).handed_over()
    handed = {"pred_list": pred_list, "grad_dict": gradients, "param_names": names}
    *first, last = (handed | {"model_params": parameters} | changes).values()
    return lambda: MaxCombination()(*first, *last)


def _with_gradients(**changes: Any) -> Callable[[], Any]:
    return _with(grad_dict=Scores(2).handed_over()[1] | changes)


BAD: dict[type[Exception], dict[str, Callable[[], Any]]] = {
    NoPosesError: {"no poses.*Leave compounds": _with(pred_list=[])},
    NonFinitePredictionError: {
        "1 of 2 poses are not finite: poses 1, predictions nan.*had cleared .grad": _with(
            pred_list=[torch.ones(()), torch.tensor(torch.nan)]
        )
    },
    ShapeMismatchError: {
        r"pose 1 has shape \[3\].*grouped\(model, rule\), which takes vectors": _with(
            pred_list=[torch.ones(1), torch.ones(3)]
        ),
        r"pose 1 is torch.float64 \[\], that of pose 0 is torch.float32": _with(
            pred_list=[torch.ones(1), torch.ones(1).double()]
        ),
        r"2 predictions.*: bias has 1 of \[1\], needs 2 of \[1\]\..*one for each": _with_gradients(
            bias=[torch.ones(1)]
        ),
        r"weight has 2 of \[6\], needs 2 of \[2, 3\]; bias has 0 of any shape, needs 2": (
            _with_gradients(weight=[torch.ones(6)] * 2, bias=[])
        ),
        r"bias has 2 of \[1\] and \[2\], needs 2 of \[1\]": _with_gradients(
            bias=[torch.ones(1), torch.ones(2)]
        ),
        r"bias has no entry, needs 2 of \[1\]\..*same model.named_parameters\(\)": _with(
            grad_dict={"weight": [torch.ones(2, 3)] * 2}
        ),
        "scale has 0 of any shape, needs no entry; shift has 0": _with_gradients(
            scale=[], shift=[]
        ),
        "2 param_names and 1 parameters": _with(model_params=[torch.ones(2, 3)]),
    },
    UnsupportedModuleError: {
        r"parameters: hidden.*grouped\(": lambda: RuleCombination(AttentionPooling(3)),
        r"parameters: scale\. .*grouped\(": lambda: RuleCombination(
            Min(nn.Parameter(torch.ones(())))
        ),
    },
    TypeError: {"class Best, not an instance": lambda: RuleCombination(Best)},
    ValueError: {
        "scale is -1": lambda: MaxCombination(pred_scale=-1),
        "shorter": lambda: join_grad_dict("ab", [torch.ones(1)]),
    },
}


@pytest.mark.parametrize(
    ("error", "match"), [(error, match) for error, rows in BAD.items() for match in rows]
)
def test_what_does_not_fit_is_refused(error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=f"(?s){match}"):
        BAD[error][match]()


def test_second_derivatives_are_refused_where_mtenns_are_wrong() -> None:
    model = Scores()
    per_pose = model()
    second = {}
    for name, outputs in {
        "autograd": (torch.logsumexp(-2 * per_pose, 0) / -2, per_pose),
        "stand-in": standin.MaxCombination(pred_scale=2.0)(*model.handed_over()),
        "ours": MaxCombination(pred_scale=2.0)(*model.handed_over()),
    }.items():
        (first,) = torch.autograd.grad(loss(*outputs), model.weight, create_graph=True)
        second[name] = first.square().sum()
    expected, found = (
        torch.autograd.grad(second[name], model.weight)[0] for name in ("autograd", "stand-in")
    )
    assert (found - expected).norm() > 0.01 * expected.norm()
    with pytest.raises(HigherOrderError, match="second derivative"):
        second["ours"].backward()


def test_a_parameter_changed_before_backward_is_refused() -> None:
    model = Scores()
    combined, _ = MeanCombination()(*model.handed_over())
    with torch.no_grad():
        model.weight.add_(1)
    with pytest.raises(StaleParametersError, match="weight"):
        combined.backward()
