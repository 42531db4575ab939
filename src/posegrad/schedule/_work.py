"""What a call has to do, as far as its poses tell."""

from collections.abc import Hashable, Iterable

from torch import Tensor

from posegrad.combination import Combination
from posegrad.combination._groups import ungrouped
from posegrad.schedule._cost import Load
from posegrad.schedule._division import Division
from posegrad.schedule._memory import CHUNK, OPERATOR
from posegrad.schedule._poses import bytes_of

__all__ = ["name_of", "work_of"]

_MANY = 2**20  # what a generator is assumed to have


def work_of(division: Division, parameters: Iterable[Tensor], *, uses_up: bool) -> Load:
    """The work that some poses take, under any rule.

    Args:
        division: The poses, in chunks.
        parameters: What is trained.
        uses_up: Whether the poses may be consumed to count chunks.
    """
    known, graph = division.known, division.graph() if division.is_measured else None
    poses = _MANY if division.count is None else max(1, division.count)
    chunks = division.chunks() if uses_up else -(-poses // max(1, division.together()))
    chunks = 1 if division.one_chunk else max(1, chunks)
    together = -(-poses // chunks)
    alone = division.walked or together == 1
    return Load(
        poses,
        chunks,
        graph=graph,
        gradient=bytes_of(p for p in parameters if p.requires_grad),
        budget=known.budget,
        # Poses without a count may be a generator, which cannot be scored again if rows fail.
        apart=known.has_rows
        and division.count is not None
        and (alone or known.is_apart(stated=division.is_stated)),
        whole=division.whole,
        picks=not known.draws and (division.walked or known.may_pick()),
        walked=division.walked,
        extra=0.0 if graph is None else _extra(division, graph, together),
    )


def _extra(division: Division, graph: float, together: int) -> float:
    """The fixed time of a chunk, in forwards of one pose."""
    assert division.known.measure is not None
    operators = division.known.measure.nodes * OPERATOR
    forward = graph + operators / (1 if division.walked else together)
    return CHUNK / forward


def name_of(rule: Combination) -> Hashable:
    """What identifies a rule from call to call; it only affects what a call costs."""
    rule = ungrouped(rule)
    function = getattr(rule, "function", None)
    return type(rule), getattr(function, "__code__", None), rule.extra_repr()
