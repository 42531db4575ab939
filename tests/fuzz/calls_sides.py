"""Two ways to run a case: by the engine, and by plain autograd, the oracle."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from posegrad import Engine
from tests.fuzz.calls_draw import Call
from tests.fuzz.calls_world import World, chunk_size_of, collate_of, predict, rows_of

__all__ = ["Plain", "Scored", "Side", "Tested", "plain_loss"]


class Scored:
    """The result of a call and, on the plain side, what its backward will tell of its poses.

    Args:
        prediction: Combined.
        per_pose: `[m, ...]`.
        uses: For each pose the ids of the leaves its chunk depends on.
    """

    def __init__(self, prediction: Tensor, per_pose: Tensor, uses: list[set[int]]) -> None:
        self.prediction, self.per_pose, self.uses = prediction, per_pose, uses
        self.weights: Tensor | None = None
        if uses and per_pose.requires_grad:
            per_pose.register_hook(self._note)

    def _note(self, cotangent: Tensor) -> None:
        self.weights = cotangent.detach().abs().reshape(len(cotangent), -1).amax(dim=1)

    def live(self, tiny: float) -> set[int]:
        """The leaves that poses with a weight use."""
        weights = [] if self.weights is None else self.weights.tolist()
        return set().union(*(u for u, w in zip(self.uses, weights, strict=False) if w > tiny))

    def touched(self) -> set[int]:
        """The leaves that any pose uses."""
        return set().union(*self.uses)


class Side(ABC):
    """How combine is done in one world."""

    def __init__(self, world: World) -> None:
        self.world = world

    def combine(self, call: Call, label: str) -> Scored:
        """The call's prediction and its poses' predictions."""
        cast = torch.autocast("cpu", torch.bfloat16) if self.world.case.autocast else nullcontext()
        with cast:
            return self.scored(call, label)

    @abstractmethod
    def scored(self, call: Call, label: str) -> Scored:
        """As `combine`, under whatever autocast there is."""


class Plain(Side):
    """All graphs kept, chunk after chunk; imports nothing of the engine."""

    def scored(self, call: Call, label: str) -> Scored:
        poses = self.world.poses(call, label).items
        rows: list[Tensor] = []
        uses: list[set[int]] = []
        for chunk in _chunks(poses, call):
            out = self._chunk(chunk, call)
            rows.append(out)
            uses += [_leaves_of(out)] * len(chunk)
        per_pose = torch.cat(rows)
        if per_pose.numel() == len(poses):
            per_pose = per_pose.reshape(-1)
        rule = self.world.rules[call.rule]
        if call.groups:
            owners = owners_of(call)
            count = max(owners) + 1
            members = [[i for i, own in enumerate(owners) if own == g] for g in range(count)]
            return Scored(torch.stack([rule(per_pose[own]) for own in members]), per_pose, uses)
        return Scored(rule(per_pose), per_pose, uses)

    def _chunk(self, chunk: list[Any], call: Call) -> Tensor:
        collate = collate_of(call)
        if collate is None:
            return predict(self.world.modules, chunk[0], joined=False).unsqueeze(0)
        return predict(self.world.modules, collate(chunk), joined=True)


class Tested(Side):
    """By the engine."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.engines: dict[tuple[Any, ...], Engine] = {}

    def scored(self, call: Call, label: str) -> Scored:
        poses = self.world.poses(call, label).handed(call.form)
        groups: Any = None
        if call.groups:
            owners = owners_of(call)
            groups = torch.tensor(owners)
            if call.groups == "sizes":
                groups = [owners.count(g) for g in range(max(owners) + 1)]
        found = self._engine(call).combine(
            poses, self.world.rules[call.rule], groups=groups, schedule=call.schedule
        )
        return Scored(*found, [])

    def _engine(self, call: Call) -> Engine:
        joined = collate_of(call) is not None
        form = call.form if joined else ""
        key = (call.engine, call.chunk, form)
        if key not in self.engines:
            self.engines[key] = Engine(
                *self.world.modules,
                predict=partial(_predict, joined=joined),
                collate=collate_of(call),
                chunk_size=chunk_size_of(call),
            )
        return self.engines[key]


def _predict(*modules_and_pose: Any, joined: bool) -> Tensor:
    *modules, pose = modules_and_pose
    return predict(modules, pose, joined=joined)


def owners_of(call: Call) -> list[int]:
    """The group of every pose: in order, or spread."""
    count = min(call.poses, 1 + call.seed % 3)
    owners = [i % count for i in range(call.poses)]
    return sorted(owners) if call.groups == "sizes" else owners


def _chunks(poses: list[Any], call: Call) -> Iterator[list[Any]]:
    if call.chunk > 0:
        cuts = [*range(0, len(poses), call.chunk), len(poses)]
    else:
        cuts, total = [0], 0
        for i, pose in enumerate(poses):
            if total and total + rows_of(pose) > -call.chunk:
                cuts.append(i)
                total = 0
            total += rows_of(pose)
        cuts.append(len(poses))
    for start, stop in pairwise(cuts):
        yield poses[start:stop]


def _leaves_of(output: Tensor) -> set[int]:
    """The ids of the leaves that a tensor's graph leads to."""
    found: set[int] = set()
    seen: set[Any] = set()
    waiting = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        waiting += [parent for parent, _ in node.next_functions]
    return found


def plain_loss(world: World) -> Tensor:
    """The loss of an ordinary training step, for what happens between calls."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 2, 4, generator=generator, dtype=torch.float64).to(world.dtype)
    out = predict(world.modules, x, joined=True) / world.case.magnitude
    return (out - 0.3).square().sum()
