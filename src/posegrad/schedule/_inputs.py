"""What gradients flow to: the model's parameters, and pose tensors that require grad."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from posegrad._restoring import leaf_hooks_off, no_autocast
from posegrad._torch import has_hooks, version_of
from posegrad.errors import StaleParametersError, UntrackedTensorError, listed
from posegrad.graph import (
    alone,
    failures_named,
    grad_set_aside,
    is_slice_of_leaf,
    leaf_of_slice,
)
from posegrad.ranks import Ranks
from posegrad.schedule._poses import Pose, map_tensors

__all__ = ["Inputs", "is_watched"]


class Inputs:
    """The tensors whose gradients one combine delivers, numbered in order of appearance.

    Parameters come first. A pose tensor that requires grad (coordinates, the output of an encoder
    upstream) joins when its pose is met: the pose is *cut* there, scored on a detached copy, and
    the copy's gradient is delivered to the original, whose own graph runs once, afterwards.

    Args:
        parameters: By name.
        ranks: Those over which gradients are summed, if there are any. Those of pose tensors are
            not, so such a tensor then must be a leaf: the parameters of an encoder upstream would
            be left with the gradient of this rank alone.
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
        self._index = {id(tensor): i for i, tensor in enumerate(self.tensors)}
        self.ranks = ranks
        self.modules = modules
        self._call = call
        self._marks: list[tuple[int, int, bool]] | None = None
        self._copies: dict[int, Tensor] = {}
        limits = _limits(self.modules)
        numbers = [i for i, p in enumerate(self.tensors) if id(p) in limits]
        self._shortened = {i: limits[id(self.tensors[i])] for i in numbers}
        self.written = {*self._shortened}

    def cut(self, poses: Sequence[Pose], leaves: dict[int, Tensor]) -> list[Pose]:
        """Returns the poses with detached leaves for tensors that require grad.

        Args:
            poses: The poses.
            leaves: The leaves by the number of the tensor they stand for; new ones are added. A
                tensor that several poses share is one leaf. Once closed, nothing new is numbered.
        """

        def leaf_of(tensor: Tensor) -> Tensor:
            if not tensor.requires_grad or id(tensor) in self.parameters:
                return tensor
            if self.ranks is not None and not (tensor.is_leaf or is_slice_of_leaf(tensor)):
                raise UntrackedTensorError(_upstream_message(tensor))
            number = self._number_of(tensor)
            if number is None:
                return tensor.detach()
            if number not in leaves:
                leaves[number] = tensor.detach().requires_grad_()
            # What is no leaf to the user may be written in place by the model.
            return leaves[number] if tensor.is_leaf else leaves[number].clone()

        return [map_tensors(leaf_of, pose) for pose in poses]

    def sources(self, leaves: Mapping[int, Tensor]) -> dict[str, tuple[int, Tensor]]:
        """What a chunk's predictions may depend on: numbers and tensors, by a name for messages."""
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

        Its memory is one gradient beside the chunk's graph, which is freed unless kept.
        """
        numbers = [*range(self.parameter_count), *leaves]
        sources = [*self.tensors[: self.parameter_count], *leaves.values()]
        if not sources or not predictions.requires_grad:
            return {}
        if self.is_sharded():
            return self._through_hooks(predictions, cotangent, leaves)
        own = dict(zip(self.names, self.tensors, strict=False))
        # Only a graph that is used again fails where plain autograd would not.
        named = failures_named() if keep_graph else nullcontext()
        in_backward = self._marks is not None
        lock, aside = (nullcontext(),) * 2 if in_backward else (alone(), grad_set_aside(own))
        with lock, aside, leaf_hooks_off(sources), no_autocast(), named:
            found = torch.autograd.grad(
                predictions, sources, cotangent, retain_graph=keep_graph, allow_unused=True
            )
        return {i: g for i, g in zip(numbers, found, strict=True) if g is not None}

    def has_hooks(self, number: int) -> bool:
        """Whether functions of the user's run on the gradient of an input.

        Those of sharded parameters are FSDP2's to run, which adds the gradient itself.
        """
        return not (self.is_sharded() and number < self.parameter_count) and is_watched(
            self.tensors[number]
        )

    def reached(self, found: Collection[int], leaves: Mapping[int, Tensor]) -> set[int]:
        """The numbers of the inputs among some leaves of a graph.

        Args:
            found: `id` of every leaf.
            leaves: The detached stand-ins for pose tensors in that graph.
        """
        numbers = self._index | {id(leaf): number for number, leaf in leaves.items()}
        return {numbers[key] for key in found if key in numbers}

    def is_sharded(self) -> bool:
        """Whether FSDP2 has spread the parameters over ranks."""
        return self.ranks is not None and self.ranks.sharded

    def _through_hooks(
        self, predictions: Tensor, cotangent: Tensor, leaves: Mapping[int, Tensor]
    ) -> dict[int, Tensor]:
        """As `gradients`, but those of parameters are left to FSDP2, which writes `.grad`.

        A sharded parameter gets none from `torch.autograd.grad`. FSDP2 divides the sum over ranks
        by their number.
        """
        assert self.ranks is not None
        with no_autocast():
            predictions.backward(cotangent * self.ranks.count)  # type: ignore[no-untyped-call]
        found = {i: leaf.grad for i, leaf in leaves.items()}
        return {i: g / self.ranks.count for i, g in found.items() if g is not None}

    def joined(self, tensors: Sequence[Tensor]) -> list[int]:
        """The numbers of more tensors that gradients flow to; those of known ones stay."""
        numbers = [self._number_of(tensor) for tensor in tensors]
        return [number for number in numbers if number is not None]

    def close(self) -> None:
        """Ends the first pass: the inputs are complete, and parameters must stay as they are."""
        own = self.tensors[: self.parameter_count]
        self._marks = [_mark(p) for p in own]
        self._copies = {i: self._value(i) for i, _ in enumerate(own) if i in self.written}

    def scored(self, score: Callable[[], Tensor]) -> Tensor:
        """What a forward returns, noting which parameters it writes to itself.

        An embedding with `max_norm` shortens rows of its weight, or writes them as they are.
        """
        before = self._versions()
        predictions = score()
        pairs = zip(before, self._versions(), strict=True)
        self.written.update(i for i, (a, b) in enumerate(pairs) if a != b)
        return predictions

    def _versions(self) -> list[int]:
        return [_version(p) for p in self.tensors[: self.parameter_count]]

    def check_fresh(self) -> None:
        """Raises if a parameter is not what it was when the poses were scored.

        Raises:
            StaleParametersError: naming every changed parameter.
        """
        assert self._marks is not None
        changed = [name for i, name in enumerate(self.names) if not self._is_fresh(i)]
        if changed:
            raise StaleParametersError(
                f"Changed between {self._call} and backward(): {listed(changed)}.\n"
                f"The result was made with the old values, so no gradient at the new ones "
                f"belongs to it.\n"
                f"Call backward() before optimizer.step(), and load or freeze parameters before "
                f"{self._call}."
            )

    def _is_fresh(self, number: int) -> bool:
        """Whether a parameter is as it was; by value, but for rounding, if forwards write to it."""
        assert self._marks is not None
        parameter, mark, copy = self.tensors[number], self._marks[number], self._copies.get(number)
        now = _mark(parameter)
        if now == mark or copy is None:
            return now == mark
        same = now[1:] == mark[1:] and parameter.shape == copy.shape
        rounding = 64 * torch.finfo(copy.dtype).eps
        return same and torch.allclose(self._value(number), copy, rtol=rounding, atol=0)

    def _value(self, number: int) -> Tensor:
        """A copy of a parameter, with rows shortened as an embedding with `max_norm` does."""
        parameter = self.tensors[number].detach()
        if number not in self._shortened:
            return parameter.clone()
        longest, power = self._shortened[number]
        return torch.renorm(parameter, power, 0, longest)

    def _number_of(self, tensor: Tensor) -> int | None:
        closed = self._marks is not None
        if id(tensor) not in self._index and not closed:
            self._index[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)  # also keeps it alive, so that its id stays its own
        return self._index.get(id(tensor))


def is_watched(tensor: Tensor) -> bool:
    """Whether a tensor that requires grad has hooks, or the leaf that it was cut out of."""
    if not tensor.requires_grad:
        return False
    stacked = leaf_of_slice(tensor)
    return has_hooks(tensor) or (stacked is not None and has_hooks(stacked))


def _limits(modules: Sequence[nn.Module]) -> dict[int, tuple[float, float]]:
    """What embeddings shorten the rows of their weights to, and in which norm, by `id`."""
    kinds = (nn.Embedding, nn.EmbeddingBag)
    found = [m for m in modules if isinstance(m, kinds) and m.max_norm is not None]
    return {id(m.weight): (float(m.max_norm or 0), m.norm_type) for m in found}


def _mark(parameter: Tensor) -> tuple[int, int, bool]:
    return _version(parameter), parameter.data_ptr(), parameter.requires_grad


def _version(parameter: Tensor) -> int:
    return 0 if parameter.is_inference() else version_of(parameter)


def _upstream_message(tensor: Tensor) -> str:
    return (
        f"A pose holds a tensor of shape {list(tensor.shape)} that was computed with a graph, and "
        f"the poses of its group are spread over ranks.\n"
        f"What computed it would get the gradient of this rank's poses alone, in silence.\n"
        f"Make that module one of the engine's, Engine(encoder, model, predict=...), or detach the "
        f"tensor."
    )
