"""What ranks that share a Jacobian exchange, and what they must agree on."""

import math
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from itertools import groupby
from typing import Any, final

import torch
from torch import Tensor

from posegrad._restoring import Change
from posegrad.errors import NoPosesError, RankError, ShapeMismatchError
from posegrad.ranks import Ranks, shown

__all__ = [
    "agreed",
    "check_outputs",
    "check_same",
    "check_same_directions",
    "grad_apart",
    "layers",
    "made_of",
    "packed",
    "summed",
]


@final
class grad_apart(Change):  # noqa: N801
    """Collects what is added to the `.grad` of a rule's parameters, then restores `.grad`."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters
        self._before = {name: p.grad for name, p in parameters.items()}
        self._found: dict[str, Tensor] = {}

    def make(self) -> dict[str, Tensor]:
        for p in self._parameters.values():
            p.grad = None
        return self._found

    def undo(self) -> None:
        for name, p in self._parameters.items():
            if p.grad is not self._before[name]:
                if p.grad is not None:
                    self._found[name] = p.grad
                p.grad = self._before[name]


def made_of(rule: object) -> str:
    """Identifies a rule. Explicit weights count as one rule: those of the first rank are used."""
    return "weights" if isinstance(rule, Tensor) else shown(rule)


def check_same(rules: Sequence[str], sums: Sequence[float], sizes: Sequence[float]) -> None:
    """Refuses rules, and gradients, that ranks do not agree on: the models would drift apart."""
    if len(set(rules)) > 1:
        raise RankError(
            f"The ranks apply different rules to the rows they share: {', '.join(rules)}.\n"
            f"They make one gradient, so the rule must be the same on all; no .grad was touched."
        )
    alike = all(abs(one - sums[0]) <= 1e-5 * max(sizes) for one in sums)
    if not alike and not all(map(math.isnan, sums)):
        raise RankError(
            f"The rule made different gradients of the same rows on different ranks: their sums "
            f"are {list(sums)}.\n"
            f"It draws random numbers, or has a state, of its own on each rank, and the ranks' "
            f"parameters would drift apart; no .grad was touched.\n"
            f"Seed the rule's generator alike on all ranks."
        )


def summed(tensors: Iterable[Tensor]) -> tuple[float, float]:
    """The sum of all numbers of some tensors, and of their magnitudes: to compare by rank."""
    held = list(tensors)
    each = [float(tensor.sum(dtype=torch.float64)) for tensor in held]
    sizes = [float(tensor.abs().sum(dtype=torch.float64)) for tensor in held]
    return sum(each), sum(sizes)


def check_same_directions(sums: Sequence[float], sizes: Sequence[float]) -> None:
    """Refuses directions of the parameters that differ from rank to rank."""
    alike = all(abs(one - sums[0]) <= 1e-5 * max(sizes) for one in sums)
    if not alike and not all(map(math.isnan, sums)):
        raise RankError(
            f"The ranks move the parameters along different directions: their sums are "
            f"{list(sums)}.\nJ @ v is one product of all rows, so v must be the same on all ranks."
        )


def layers(names: Sequence[str]) -> Iterator[list[str]]:
    """The names of parameters, module by module: weight and bias share a cotangent."""
    for _, own in groupby(names, key=lambda name: name.rpartition(".")[0]):
        yield list(own)


def agreed(ranks: Ranks, numbers: Sequence[int], layouts: Sequence[str]) -> Ranks:
    """The ranks, once they agree on a call and on the parameters they differentiate by.

    Args:
        ranks: The ranks that share the poses.
        numbers: The number that each rank would give the call.
        layouts: The fingerprint of each rank's parameters.

    Raises:
        RankError: if the parameters differ between ranks.
    """
    if len(set(layouts)) > 1:
        raise RankError(
            f"The ranks differentiate by different parameters: {list(layouts)}.\n"
            f"Their gradients are added up, so the same must be trained, or named by params=, "
            f"on all."
        )
    return ranks.in_call(numbers)


@final
class _Packer(pickle.Pickler):
    """Sends only what a tensor shows, not the whole storage behind a view."""

    def reducer_override(self, found: Any) -> Any:
        if isinstance(found, Tensor):
            shown = found.numel() * found.element_size()
            if found.untyped_storage().nbytes() > shown:
                return found.clone().__reduce_ex__(pickle.HIGHEST_PROTOCOL)  # type: ignore[no-untyped-call]
        return NotImplemented


def packed(blocks: object) -> bytes:
    """A layer's blocks as they are sent."""
    file = BytesIO()
    _Packer(file, pickle.HIGHEST_PROTOCOL).dump(blocks)
    return file.getvalue()


def check_outputs(predictions: Sequence[Tensor]) -> None:
    """Refuses outputs that are not parts of one output.

    Raises:
        NoPosesError: if no rank has any.
        ShapeMismatchError: if they disagree.
    """
    if not predictions:
        raise NoPosesError(
            "No rank has predictions: there is nothing to differentiate.\n"
            "Leave empty batches out of the loop, on all ranks."
        )
    kinds = [(tuple(one.shape[1:]), one.dtype) for one in predictions]
    if len(set(kinds)) > 1 or predictions[0].ndim == 0:
        raise ShapeMismatchError(
            f"The outputs of the ranks are {[list(one.shape) for one in predictions]} of "
            f"{[one.dtype for one in predictions]}; they are joined along dimension 0, which "
            f"counts poses, and must agree in the rest."
        )
