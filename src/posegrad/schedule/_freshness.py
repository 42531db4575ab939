"""Checks that parameters are still what they were when the poses were scored."""

from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor, nn

from posegrad._torch import version_of
from posegrad.errors import StaleParametersError, listed

__all__ = ["Freshness"]


@final
class Freshness:
    """Notes the parameters at the end of a first pass, and refuses a backward if they changed.

    Args:
        parameters: The parameters.
        names: Their names.
        modules: All modules of the models.
        call: What was called, for messages.

    Attributes:
        written: The numbers of parameters that forwards themselves write: an embedding with
            `max_norm` shortens rows of its weight, or rewrites them unchanged.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        names: Sequence[str],
        modules: Sequence[nn.Module],
        call: str,
    ) -> None:
        self._parameters = parameters
        self._names = names
        self._call = call
        self._marks: list[tuple[int, int, bool]] = []
        self._copies: dict[int, Tensor] = {}
        limits = _limits(modules)
        numbers = [i for i, p in enumerate(parameters) if id(p) in limits]
        self._shortened = {i: limits[id(parameters[i])] for i in numbers}
        self.written = {*self._shortened}

    def noting(self, score: Callable[[], Tensor]) -> Tensor:
        """Returns what a forward returns, and notes which parameters the forward wrote."""
        before = [*map(_version, self._parameters)]
        predictions = score()
        pairs = zip(before, map(_version, self._parameters), strict=True)
        self.written.update(i for i, (a, b) in enumerate(pairs) if a != b)
        return predictions

    def mark(self) -> None:
        """Notes the parameters, which must not change from now on."""
        self._marks = [_mark(p) for p in self._parameters]
        self._copies = {i: self._value(i) for i in self.written}

    def check(self) -> None:
        """Raises if a parameter has changed.

        Raises:
            StaleParametersError: naming every changed parameter.
        """
        changed = [name for i, name in enumerate(self._names) if not self._is_fresh(i)]
        if changed:
            raise StaleParametersError(
                f"Changed between {self._call} and backward(): {listed(changed)}.\n"
                f"The result was made with the old values, so no gradient at the new ones "
                f"belongs to it.\n"
                f"Call backward() before optimizer.step(), and load or freeze parameters before "
                f"{self._call}."
            )

    def _is_fresh(self, number: int) -> bool:
        """Whether a parameter is unchanged; if forwards write it, by value up to rounding."""
        parameter, copy = self._parameters[number], self._copies.get(number)
        mark, now = self._marks[number], _mark(parameter)
        if now == mark or copy is None:
            return now == mark
        same = now[1:] == mark[1:] and parameter.shape == copy.shape
        rounding = 64 * torch.finfo(copy.dtype).eps
        return same and torch.allclose(self._value(number), copy, rtol=rounding, atol=0)

    def _value(self, number: int) -> Tensor:
        """A copy of a parameter, its rows shortened as by an embedding with `max_norm`."""
        parameter = self._parameters[number].detach()
        if number not in self._shortened:
            return parameter.clone()
        longest, power = self._shortened[number]
        return torch.renorm(parameter, power, 0, longest)


def _limits(modules: Sequence[nn.Module]) -> dict[int, tuple[float, float]]:
    """The length and the norm to which embeddings shorten rows of their weights, by `id`."""
    kinds = (nn.Embedding, nn.EmbeddingBag)
    found = [m for m in modules if isinstance(m, kinds) and m.max_norm is not None]
    return {id(m.weight): (float(m.max_norm or 0), m.norm_type) for m in found}


def _mark(parameter: Tensor) -> tuple[int, int, bool]:
    return _version(parameter), parameter.data_ptr(), parameter.requires_grad


def _version(parameter: Tensor) -> int:
    return 0 if parameter.is_inference() else version_of(parameter)
