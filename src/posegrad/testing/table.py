"""Every rule of the library, a line each.

A rule that has its line here has its tests (the laws of its kind, and every schedule against plain
autograd), its line in the docs (`python -m posegrad.testing` prints them), and its row in the
benchmark suite `rules`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import final

from posegrad.combination import (
    AttentionPooling,
    Best,
    Boltzmann,
    Combination,
    Max,
    Mean,
    Min,
    Sum,
    TopK,
)
from posegrad.weighting import Clip, GradientRule, Median, SignAgreement, TrimmedMean, Weighting

__all__ = ["RULES", "Row", "markdown"]

KT = 0.593  # kcal/mol at 298 K


@final
@dataclass(frozen=True)
class Row:
    """A rule, as tests, docs and benchmarks know it.

    Args:
        make: The rule with usual arguments.
        result: What it makes of predictions or gradients, in letters: y predictions, g gradients, w
            weights, G the Gramian.
        use: What it is for.
        components: The trailing shape of a prediction it needs; `()` if any will do.
        shifts: Whether adding a constant to all predictions adds it to the result.
        least: The fewest poses it takes.
    """

    make: Callable[[], Combination | GradientRule]
    result: str
    use: str
    components: tuple[int, ...] = ()
    shifts: bool = True
    least: int = 1

    @property
    def takes_any_predictions(self) -> bool:
        """Whether it is a combination rule for predictions of any shape."""
        return self.kind == "predictions" and not self.components

    @property
    def kind(self) -> str:
        """What the rule looks at."""
        rule = self.make()
        if isinstance(rule, Combination):
            return "predictions"
        return "Gramian" if isinstance(rule, Weighting) else "rows of one parameter"


RULES: dict[str, Row] = {
    "Mean()": Row(Mean, "mean y", "all poses alike"),
    "Sum()": Row(Sum, "sum y", "contributions that add up", shifts=False),
    "Min(1000)": Row(Min, "-ln(sum e^(-ty)) / t", "the best pose, smoothly; mtenn's default"),
    "Min(1/kT)": Row(lambda: Min(1 / KT), "-kT ln(sum e^(-y/kT))", "free energy of the poses"),
    "Max(5)": Row(lambda: Max(5.0), "ln(sum e^(ty)) / t", "the best score, where high is good"),
    "Boltzmann(kT)": Row(lambda: Boltzmann(KT), "sum y e^(-y/kT) / Z", "thermal average"),
    "Best()": Row(Best, "min y", "the best pose alone"),
    "TopK(3)": Row(lambda: TopK(3), "mean of the 3 lowest y", "a few good poses"),
    "AttentionPooling(4)": Row(
        lambda: AttentionPooling(4), "sum a y, a trained", "learn which poses count", (4,), False
    ),
    "AttentionPooling(4, gated=True)": Row(
        lambda: AttentionPooling(4, gated=True),
        "sum a y, a trained, with a gate",
        "patches of a bag; ABMIL",
        (4,),
        False,
    ),
    "Clip(1)": Row(lambda: Clip(1.0), "sum g min(1, 1/|g|)", "bound one pose's pull; DP-SGD"),
    "TrimmedMean(1)": Row(
        lambda: TrimmedMean(1), "mean g but for 1 at each end", "outliers among poses", least=3
    ),
    "Median()": Row(Median, "median g", "many outliers"),
    "SignAgreement(0.5)": Row(
        lambda: SignAgreement(0.5), "mean g where signs agree", "what all poses have in common"
    ),
}


def markdown() -> str:
    """The rules as a table of the docs."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    yield "| rule | looks at | result | for |\n|---|---|---|---|"
    for label, row in RULES.items():
        result = row.result.replace("|", "\\|")  # a norm's bars are no borders of cells
        yield f"| `{label}` | {row.kind} | {result} | {row.use} |"
