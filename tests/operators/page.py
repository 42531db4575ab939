"""The table of operators, and what the coverage comes to, as a page of the docs."""

import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from posegrad.graph._operators import OPERATORS, Kind
from tests.operators.cases import Case, reading_of
from tests.operators.coverage import examined, line
from tests.operators.layers import LAYERS
from tests.operators.losses import LOSSES
from tests.operators.network import Reading
from tests.operators.samples import OPERATORS as OF_TORCH

__all__ = ["PAGE", "case_line", "known_operators", "page"]

PAGE = Path(__file__).parents[2] / "docs" / "operators.md"

SAMPLES = 4  # of each operator of torch

_INTRO = """# Operators, losses and layers

How poses are followed through a graph, operator by operator. `python -m tests.operators page`
writes this page; tests compare it with the code, and the code with plain autograd.

"""

_KNOWN = """## Operators that are known

Poses are followed through these by what each operator is, whatever numbers flow, and without a
backward of their own. Names are those of autograd's nodes. In a Jacobian the rows of a parameter
that enters an operator in italics have a closed form. An operator that is not in the table is exact
too: it is probed, alone.

| how poses move | operators |
|---|---|"""

_LAYERS = """## {title}

Backwards in the third call on one structure; every row is exact. More than one means that poses
could not be followed from operator to operator, and the network was probed.

| backwards | {title_in_text} |
|---|---|"""

_COVERED = """## Operators of torch

Every differentiable operator of torch's own database (torch {torch}), in the middle of a network,
with poses along each dimension of {samples} samples of it. Of {kept} ways to lay poses that keep
them apart, {fast} ({share:.1%}) take one backward. No row is wrong, also in {mixing} ways that mix
poses. `make coverage` prints which those are.

- **followed**: poses keep apart, and the structure of the graph says so.
- **alone**: an operator was probed by itself; the Jacobian takes one backward.
- **probed**: the network was probed; a few backwards.
- **mix**: poses depend on each other in it; rows are exact, at the cost of a backward each.

| operator | followed | alone | probed | mix |
|---|---|---|---|---|"""


def page() -> str:
    """docs/operators.md; it takes minutes."""
    parts = [
        _INTRO + "\n".join([_KNOWN, *known_operators()]),
        _cases("Losses", "losses of torch.nn.functional", LOSSES),
        _cases("Layers", "layers of torch.nn", LAYERS),
        _covered(),
    ]
    return "\n\n".join(parts) + "\n"


def known_operators() -> Iterator[str]:
    """A line for each rule."""
    by_rule: dict[str, dict[str, bool]] = {}
    for node, kind in OPERATORS.items():
        name = re.sub(r"^torch::autograd::|Backward\d*$|Backwards$", "", node)
        own = by_rule.setdefault(_rule_of(kind), {})
        own[name] = own.get(name, False) or bool(kind.forms)
    for rule, names in by_rule.items():
        told = [f"*{name}*" if closed else name for name, closed in names.items()]
        yield f"| {rule} | {', '.join(told)} |"


def _rule_of(kind: Kind) -> str:
    """How poses move, in the words of its rule."""
    rule = kind.moves or kind.picks
    if rule is None:
        return "It is probed alone where there is something behind it."
    name = rule.__qualname__.split(".")[0]  # of the function that makes it
    told = getattr(sys.modules[rule.__module__], name).__doc__
    return str(told).strip().split("\n\n")[0].replace("\n    ", " ").replace("|", "\\|")


def _cases(title: str, title_in_text: str, cases: Mapping[str, Case]) -> str:
    lines = [case_line(name, reading_of(case)) for name, case in cases.items()]
    return "\n".join([_LAYERS.format(title=title, title_in_text=title_in_text), *lines])


def case_line(name: str, found: Reading) -> str:
    """The line of a loss or a layer."""
    return f"| {found.backwards} | {name} |"


def _covered() -> str:
    with ProcessPoolExecutor(initializer=_alone) as pool:
        counts = dict(zip(OF_TORCH, pool.map(_counts_of, OF_TORCH), strict=True))
    total = sum(counts.values(), Counter())
    fast, mixing = total["inferred"] + total["alone"], total["mixing"]
    kept = total.total() - mixing
    title = _COVERED.format(
        torch=torch.__version__.split("+")[0],
        samples=SAMPLES,
        kept=kept,
        fast=fast,
        share=fast / kept,
        mixing=mixing,
    )
    return "\n".join([title, *(_covered_line(name, found) for name, found in counts.items())])


def _alone() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def _covered_line(name: str, counts: Mapping[str, int]) -> str:
    return f"| {name} | " + " | ".join(str(counts[kind] or "") for kind in _COLUMNS) + " |"


_COLUMNS = ("inferred", "alone", "probed", "mixing")


def _counts_of(name: str) -> Counter[str]:
    """How many of the pairs that keep poses apart came to what, and how many pairs mix them."""
    found = list(examined(name, SAMPLES))
    wrong = [line(o) for o in found if o.reading.kind in ("wrong", "doubted")]
    if wrong:
        raise ValueError("\n".join(wrong))  # such a page had better not be written
    return Counter(o.reading.kind if o.pair.keeps else "mixing" for o in found)
