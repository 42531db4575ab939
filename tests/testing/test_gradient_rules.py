"""Every law of `assert_weighting` and `assert_aggregation` is broken by some rule, and noticed."""

import math

import pytest
import torch
from torch import Tensor, nn
from torchjd import aggregation as theirs

from posegrad import Aggregation, Clip, Mean, Median, ShapeMismatchError, TrimmedMean, Weighting
from posegrad.testing import assert_aggregation, assert_weighting


class _Uniform(Weighting):
    """The mean, which keeps every law."""

    def forward(self, gramian: Tensor, predictions: Tensor) -> Tensor:
        return gramian.new_full((len(gramian),), 1 / len(gramian))


class _OneNumber(_Uniform):
    def forward(self, gramian: Tensor, predictions: Tensor) -> Tensor:
        return gramian.sum()


class _Inverse(_Uniform):
    """Divides by the norms, of which some are zero."""

    def forward(self, gramian: Tensor, predictions: Tensor) -> Tensor:
        return gramian.diagonal().rsqrt()


class _Solving(_Uniform):
    """Inverts G, which may be singular."""

    def forward(self, gramian: Tensor, predictions: Tensor) -> Tensor:
        weights = torch.linalg.inv_ex(gramian).inverse.sum(1)
        return weights.nan_to_num(math.nan, math.nan)


class _WritesGramian(_Uniform):
    def forward(self, gramian: Tensor, predictions: Tensor) -> Tensor:
        gramian.diagonal().add_(1)
        return super().forward(gramian, predictions)


class _WritesPredictions(_Uniform):
    def forward(self, gramian: Tensor, predictions: Tensor) -> Tensor:
        predictions.sub_(1)
        return super().forward(gramian, predictions)


class _Random(_Uniform):
    def forward(self, gramian: Tensor, predictions: Tensor) -> Tensor:
        return torch.rand(len(gramian)).to(gramian)


class _Forgetful(_Uniform):
    """Counts what copies do not count on."""

    def __deepcopy__(self, memo: object) -> "_Forgetful":
        other = _Forgetful()
        other.sign = -getattr(self, "sign", 1)
        return other

    def forward(self, gramian: Tensor, predictions: Tensor) -> Tensor:
        return getattr(self, "sign", 1) * super().forward(gramian, predictions)


class _Unpickled(_Uniform):
    def __reduce__(self) -> tuple[type, tuple[float]]:
        return Clip, (1e-3,)

    def __deepcopy__(self, memo: object) -> "_Unpickled":
        return _Unpickled()


class _First(_Uniform):
    """Follows the pose that comes first."""

    def forward(self, gramian: Tensor, predictions: Tensor) -> Tensor:
        return torch.arange(len(gramian), 0, -1).to(gramian)


class _FirstOfAlike(_Uniform):
    """Of rows that are alike, keeps the first: other weights, the same gradient."""

    def forward(self, gramian: Tensor, predictions: Tensor) -> Tensor:
        norms = gramian.diagonal()
        distances = norms[:, None] + norms[None] - 2 * gramian
        alike = (distances <= 1e-9 * norms.max()).to(gramian)  # [M, M]
        return alike.sum(1) * (alike.tril(-1).sum(1) == 0)


class _Promoting(_Uniform):
    def forward(self, gramian: Tensor, predictions: Tensor) -> Tensor:
        return gramian @ predictions


BROKEN_WEIGHTINGS: dict[str, tuple[Weighting, str]] = {
    "a number": (_OneNumber(), r"there is one weight for each row: \[\] for 1 rows"),
    "zero rows": (_Inverse(), "weights are finite: .*inf"),
    "singular Gramians": (_Solving(), "weights are finite: .*nan"),
    "in place": (_WritesGramian(), "the rule leaves the Gramian as it is"),
    "in place, predictions": (_WritesPredictions(), "the rule leaves the predictions as they are"),
    "random": (_Random(), "equal calls give equal numbers"),
    "copies": (_Forgetful(), "a copy of the rule behaves alike"),
    "pickles": (_Unpickled(), "a pickled rule behaves alike"),
    "order": (_First(), "renumbering the poses does not change the gradient"),
    "half precision": (
        _Promoting(),
        "beside predictions in half precision will do: .*(dtype|scalar type)",
    ),
}


@pytest.mark.parametrize("name", BROKEN_WEIGHTINGS)
def test_broken_weightings_are_caught(name: str) -> None:
    rule, match = BROKEN_WEIGHTINGS[name]
    with pytest.raises(AssertionError, match=r"(?s)" + match):
        assert_weighting(rule, any_order=name in ("order", "random"))


def test_weightings_that_keep_the_laws_pass() -> None:
    assert_weighting(_Uniform())
    assert_weighting(_FirstOfAlike())
    assert_weighting(_First(), any_order=False)


def test_rows_of_ones_own_are_checked() -> None:
    rows, predictions = torch.eye(3), torch.tensor([1.0, 2.0, 3.0])
    assert_weighting(_Inverse(), rows, predictions)
    with pytest.raises(AssertionError, match="weights are finite"):
        assert_weighting(_Inverse(), torch.zeros(3, 2), predictions)


def test_a_rule_that_needs_several_rows_is_given_them() -> None:
    with pytest.raises(ValueError, match="at least 4"):
        assert_weighting(theirs.KrumWeighting(1))
    seen, rule = [], _Uniform()
    rule.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    assert_weighting(rule, least=4)
    assert {*seen} == {4, 5, 8}


def test_weightings_of_torchjd_are_checked_as_they_are() -> None:
    assert_weighting(theirs.UPGradWeighting())
    with pytest.raises(AssertionError, match="equal calls give equal numbers"):
        assert_weighting(theirs.PCGradWeighting())
    with pytest.raises(TypeError, match="MeanWeighting is not a Weighting that reads the Gramian"):
        assert_weighting(theirs.MeanWeighting())
    with pytest.raises(TypeError, match="Mean is not a Weighting"):
        assert_weighting(Mean())


class _Average(Aggregation):
    """The mean, which keeps every law."""

    def forward(self, block: Tensor) -> Tensor:
        return block.mean(0)


class _Whole(_Average):
    def forward(self, block: Tensor) -> Tensor:
        return block.mean()


class _Dropping(_Average):
    def forward(self, block: Tensor) -> Tensor:
        return block.mean(0) * (torch.rand(block.shape[1:]) < 0.5)


class _Copied(_Average):
    def __init__(self, sign: int = 1) -> None:
        super().__init__()
        self.sign = sign

    def __deepcopy__(self, memo: object) -> "_Copied":
        return _Copied(-self.sign)

    def forward(self, block: Tensor) -> Tensor:
        return self.sign * block.mean(0)


class _Revived(_Average):
    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Median, ()

    def __deepcopy__(self, memo: object) -> "_Revived":
        return _Revived()


class _Last(_Average):
    def forward(self, block: Tensor) -> Tensor:
        return block[-1]


class _Total(_Average):
    def forward(self, block: Tensor) -> Tensor:
        return block.sum(0)


class _Normalised(_Average):
    """Shortens a row by its length, to which all columns contribute, as much as any other's."""

    def forward(self, block: Tensor) -> Tensor:
        mean, length = block.mean(0), block.flatten(1).norm(dim=1) if block.ndim > 1 else block
        return mean if len(block) == 1 or length.std() == 0 else mean * length.min() / length.max()


class _Sorted(_Average):
    """Leaves the greatest out, among them every nan."""

    def forward(self, block: Tensor) -> Tensor:
        return block.sort(0).values[: max(1, len(block) - 1)].mean(0)


class _Quantile(_Average):
    def forward(self, block: Tensor) -> Tensor:
        return torch.quantile(block, 0.5, dim=0)  # not for half precision


BROKEN_AGGREGATIONS: dict[str, tuple[Aggregation, str]] = {
    "shape": (_Whole(), r"the result has the shape of one row: \[\] of \[2, 12\]"),
    "random": (_Dropping(), "equal calls give equal numbers"),
    "copies": (_Copied(), "a copy of the rule behaves alike"),
    "pickles": (_Revived(), "a pickled rule behaves alike"),
    "order": (_Last(), "the order of the poses does not matter"),
    "rows alike": (_Total(), "rows that are all alike are their own aggregate"),
    "columns": (_Normalised(), "what a column gives depends on that column alone"),
    "nan": (_Sorted(), "a column with a nan gives nan"),
    "half precision": (_Quantile(), "half precision will do: quantile"),
}


@pytest.mark.parametrize("name", BROKEN_AGGREGATIONS)
def test_broken_aggregations_are_caught(name: str) -> None:
    rule, match = BROKEN_AGGREGATIONS[name]
    with pytest.raises(AssertionError, match=match):
        assert_aggregation(rule, least=2)


def test_aggregations_that_keep_the_laws_pass() -> None:
    assert_aggregation(_Average())
    assert_aggregation(_Last(), torch.ones(4, 3))


def test_an_aggregation_that_needs_several_rows_is_given_them() -> None:
    assert_aggregation(TrimmedMean(3), least=7)
    with pytest.raises(ShapeMismatchError, match="leaves out 6 rows, and there are 6"):
        assert_aggregation(TrimmedMean(3), least=6)


def test_the_rule_is_left_as_it_is() -> None:
    class Weighed(Weighting):
        def __init__(self) -> None:
            super().__init__()
            self.share = nn.Parameter(torch.ones(()))

        def forward(self, gramian: Tensor, predictions: Tensor) -> Tensor:
            return self.share * torch.ones_like(gramian[0])

    rule = Weighed()
    assert_weighting(rule)
    assert rule.share.dtype == torch.float32
    assert rule.share.grad is None


def test_the_laws_draw_nothing_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    assert_weighting(Clip(1.0))
    assert_aggregation(Median())
    assert torch.equal(torch.get_rng_state(), before)
