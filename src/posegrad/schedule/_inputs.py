"""What gradients flow to: the model's parameters and the pose tensors that require grad."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import final

import torch
from torch import Tensor, nn

from posegrad._restoring import leaf_hooks_off, no_autocast
from posegrad._torch import has_hooks
from posegrad.graph import alone, failures_named, grad_set_aside, leaf_of_slice
from posegrad.ranks import Ranks
from posegrad.schedule._freshness import Freshness

__all__ = ["Inputs", "is_watched"]


@final
class Inputs:
    """The tensors whose gradients one call delivers, numbered in order of appearance.

    Parameters come first; pose tensors that require grad join when their pose is met (`cut`).

    Args:
        parameters: By name.
        ranks: The ranks that sum the gradients of parameters, if several do.
        modules: All modules of the models.
        call: What was called, for messages.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        ranks: Ranks | None = None,
        modules: Sequence[nn.Module] = (),
        call: str = "combine() or embed()",
    ) -> None:
        # By identity: a weight tied across two modules has two names and one gradient.
        trained = {id(p): (name, p) for name, p in parameters.items() if p.requires_grad}
        self.parameters = frozenset(id(p) for p in parameters.values())
        self.tensors: list[Tensor] = [p for _, p in trained.values()]
        self.parameter_count = len(self.tensors)
        self.names = [name for name, _ in trained.values()]
        self.ranks = ranks
        self.modules = modules
        self.freshness = Freshness([*self.tensors], self.names, modules, call)
        self._index = {id(tensor): i for i, tensor in enumerate(self.tensors)}
        self._is_closed = False

    def sources(self, leaves: Mapping[int, Tensor]) -> dict[str, tuple[int, Tensor]]:
        """What a chunk's predictions may depend on: numbers and tensors, by name for messages."""
        own = zip(self.names, enumerate(self.tensors), strict=False)
        return dict(own) | {f"pose tensor {i}": (i, leaf) for i, leaf in leaves.items()}

    def gradients(
        self,
        predictions: Tensor,
        cotangent: Tensor,
        leaves: Mapping[int, Tensor],
        *,
        keep_graph: bool = False,
    ) -> dict[int, Tensor]:
        """The vector-Jacobian product of one chunk, by number of input; unused inputs are absent.

        Holds one gradient beside the chunk's graph, which is freed unless kept.
        """
        numbers = [*range(self.parameter_count), *leaves]
        sources = [*self.tensors[: self.parameter_count], *leaves.values()]
        if not sources or not predictions.requires_grad:
            return {}
        if self.is_sharded():
            return self._through_hooks(predictions, cotangent, leaves)
        own = dict(zip(self.names, self.tensors, strict=False))
        # Only a graph that is used again can fail where plain autograd would not.
        named = failures_named() if keep_graph else nullcontext()
        # Closed inputs mean that a backward is running.
        lock, aside = (nullcontext(),) * 2 if self._is_closed else (alone(), grad_set_aside(own))
        with lock, aside, leaf_hooks_off(sources), no_autocast(), named:
            found = torch.autograd.grad(
                predictions, sources, cotangent, retain_graph=keep_graph, allow_unused=True
            )
        return {i: g for i, g in zip(numbers, found, strict=True) if g is not None}

    def has_hooks(self, number: int) -> bool:
        """Whether functions of the user run on the gradient of an input.

        Hooks of sharded parameters belong to FSDP2, which adds the gradient itself.
        """
        return not (self.is_sharded() and number < self.parameter_count) and is_watched(
            self.tensors[number]
        )

    def reached(self, found: Collection[int], leaves: Mapping[int, Tensor]) -> set[int]:
        """The numbers of the inputs among the leaves of a graph.

        Args:
            found: The `id` of every leaf.
            leaves: The detached stand-ins for pose tensors in the graph.
        """
        numbers = self._index | {id(leaf): number for number, leaf in leaves.items()}
        return {numbers[key] for key in found if key in numbers}

    def is_sharded(self) -> bool:
        """Whether FSDP2 has spread the parameters over ranks."""
        return self.ranks is not None and self.ranks.sharded

    def _through_hooks(
        self, predictions: Tensor, cotangent: Tensor, leaves: Mapping[int, Tensor]
    ) -> dict[int, Tensor]:
        """As `gradients`, but FSDP2 writes the parameters' gradients to `.grad`.

        `torch.autograd.grad` returns none for sharded parameters. FSDP2 divides the sum over ranks
        by their number.
        """
        assert self.ranks is not None
        with no_autocast():
            predictions.backward(cotangent * self.ranks.count)  # type: ignore[no-untyped-call]
        found = {i: leaf.grad for i, leaf in leaves.items()}
        return {i: g / self.ranks.count for i, g in found.items() if g is not None}

    def joined(self, tensors: Sequence[Tensor]) -> list[int]:
        """The numbers of tensors, which join the inputs if new."""
        numbers = [self.number_of(tensor) for tensor in tensors]
        return [number for number in numbers if number is not None]

    def close(self) -> None:
        """Ends the first pass: no inputs join any more, and parameters must not change."""
        self._is_closed = True
        self.freshness.mark()

    def number_of(self, tensor: Tensor) -> int | None:
        """The number of a tensor, which joins if it is new; None if the inputs are closed."""
        if id(tensor) not in self._index and not self._is_closed:
            self._index[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)  # which keeps it alive, so that its id stays unique
        return self._index.get(id(tensor))


def is_watched(tensor: Tensor) -> bool:
    """Whether a tensor that requires grad, or the leaf it was cut from, has hooks."""
    if not tensor.requires_grad:
        return False
    stacked = leaf_of_slice(tensor)
    return has_hooks(tensor) or (stacked is not None and has_hooks(stacked))
