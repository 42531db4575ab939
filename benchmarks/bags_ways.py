"""Ways to a step on a bag, or on pairs: what others do by hand, and posegrad.

All add the gradient of `task.rule(*embeddings)` to `.grad`, and score the same chunks.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from benchmarks.bags_cases import Task
from posegrad import Engine

__all__ = ["WAYS", "Way"]

Way = Callable[[Task], Callable[[], None]]
"""Bound to a task, it takes a step. An engine is made once, as in training."""


def _chunks(task: Task) -> Iterator[tuple[nn.Module, tuple[Tensor, ...]]]:
    for network, x in zip(task.networks, task.inputs, strict=True):
        yield network, x.split(task.chunk_size)


def _plain(task: Task) -> None:
    """All graphs are kept until the backward."""
    task.rule(*(torch.cat([net(c) for c in chunks]) for net, chunks in _chunks(task))).backward()


def _checkpoint(task: Task) -> None:
    """A checkpoint around each chunk."""
    task.rule(
        *(
            torch.cat(
                [torch.utils.checkpoint.checkpoint(net, c, use_reentrant=False) for c in chunks]
            )
            for net, chunks in _chunks(task)
        )
    ).backward()


def _two_passes(task: Task) -> None:
    """GradCache: embeddings without graphs, their cotangents, then each chunk again.

    The random state of a chunk's first run is restored for its second (CPU generator only).
    """
    states: list[Tensor] = []
    leaves: list[Tensor] = []
    with torch.no_grad():
        for network, chunks in _chunks(task):
            found = []
            for chunk in chunks:
                states.append(torch.get_rng_state())
                found.append(network(chunk))
            leaves.append(torch.cat(found).requires_grad_())
    task.rule(*leaves).backward()

    after, restored = torch.get_rng_state(), iter(states)
    for leaf, (network, chunks) in zip(leaves, _chunks(task), strict=True):
        cotangents = leaf.grad.split(task.chunk_size)  # type: ignore[union-attr]
        for chunk, cotangent in zip(chunks, cotangents, strict=True):
            torch.set_rng_state(next(restored))
            network(chunk).backward(cotangent)
    torch.set_rng_state(after)


def _best_again(task: Task) -> None:
    """Scores without graphs, then the few that count once more, as one chunk."""
    [(network, chunks)] = _chunks(task)
    with torch.no_grad():
        scores = torch.cat([network(chunk) for chunk in chunks])
    best = scores.topk(task.best or len(scores)).indices
    task.rule(network(task.inputs[0][best])).backward()


def _posegrad(task: Task) -> Callable[[], None]:
    engines = [Engine(network, chunk_size=task.chunk_size) for network in task.networks]

    def combined() -> None:
        engines[0].combine(task.inputs[0], task.rule).prediction.backward()

    def embedded() -> None:
        pairs = zip(engines, task.inputs, strict=True)
        task.rule(*(engine.embed(x) for engine, x in pairs)).backward()

    return combined if len(engines) == 1 else embedded


WAYS: dict[str, Way] = {
    "plain": lambda task: partial(_plain, task),
    "checkpoint": lambda task: partial(_checkpoint, task),
    "two passes by hand": lambda task: partial(_two_passes, task),
    "the best again by hand": lambda task: partial(_best_again, task),
    "posegrad": _posegrad,
}
