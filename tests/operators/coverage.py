"""Which operators keep poses apart, and for which of them that is seen without probing."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from tests.operators.network import Outcome, examine
from tests.operators.samples import pairs_of, samples_of

__all__ = ["KINDS", "examined", "line", "not_inferred", "report"]

KINDS = ("inferred", "alone", "probed", "mixing", "doubted", "not finite", "wrong")


def examined(name: str, samples: int, pairs: int | None = None) -> Iterator[Outcome]:
    """What comes of an operator's first samples that can carry poses.

    Args:
        name: The operator.
        samples: How many samples.
        pairs: How many pairs of dimensions of each sample that keep poses apart, and how many that
            do not; None for all.
    """
    drawn = ((first, pairs_of(first, second)) for first, second in samples_of(name))
    for sample, found in islice((d for d in drawn if d[1]), samples):
        for keeps in (True, False):
            for pair in [pair for pair in found if pair.keeps is keeps][:pairs]:
                yield examine(sample, pair)


def not_inferred(outcomes: Sequence[Outcome]) -> list[tuple[str, int, list[str]]]:
    """The nodes that stand in the way, with the number of pairs and the operators, most first.

    A node stands in the way if it is in no pair that takes one backward. If each is in one, they
    are named with a question mark: they are followed along some dimensions only.
    """
    known = {n for o in outcomes if o.reading.is_fast for n in o.nodes}
    counts: Counter[str] = Counter()
    operators: dict[str, set[str]] = {}
    for outcome in outcomes:
        if outcome.reading.is_fast:
            continue
        new = outcome.nodes - known
        for name in new or {f"{name}?" for name in outcome.nodes}:
            counts[name] += 1
            operators.setdefault(name, set()).add(outcome.sample.operator)
    return [(name, count, sorted(operators[name])) for name, count in counts.most_common()]


def report(outcomes: Iterable[Outcome]) -> Iterator[str]:
    """Lines: the counts, the nodes that stand in the way, then every pair that is not inferred."""
    everything = list(outcomes)
    outcomes = [outcome for outcome in everything if outcome.pair.keeps]
    yield f"{len(outcomes)} pairs kept: {_counts(outcomes)}"
    others = [outcome for outcome in everything if not outcome.pair.keeps]
    yield f"{len(others)} pairs that mix: {_counts(others)}"
    for outcome in others:
        if outcome.reading.kind in ("wrong", "doubted"):
            yield line(outcome)
    yield "\nnodes that stand in the way, pairs, operators"
    for name, count, operators in not_inferred(outcomes):
        yield f"{count:5d}  {name:42s} {', '.join(operators)}"
    yield "\npairs that take more than one backward"
    for outcome in outcomes:
        if not outcome.reading.is_fast:
            yield line(outcome)


def _counts(outcomes: Iterable[Outcome]) -> str:
    kinds = Counter(outcome.reading.kind for outcome in outcomes)
    return ", ".join(f"{kinds[kind]} {kind}" for kind in KINDS)


def line(outcome: Outcome) -> str:
    """One pair, what came of it, and where it is."""
    found, sample, pair = outcome.reading, outcome.sample, outcome.pair
    places = ", ".join(
        f"argument {i} {tuple(sample.arguments[i].shape)} dim {dim}" for i, dim in pair.dims.items()
    )
    return (
        f"{found.kind:8s} {found.backwards:2d} {found.error:7.1e} {sample.operator} "
        f"sample {sample.number} {places} -> {pair.out_dim}: "
        f"{' '.join(sorted(outcome.nodes))} | {sample.told[:120]}"
    )
