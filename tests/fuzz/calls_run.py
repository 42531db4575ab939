"""Runs a case's script on one side and writes down everything that can be seen after each line."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.fuzz.calls_draw import Call, Step
from tests.fuzz.calls_sides import Plain, Scored, Side, plain_loss
from tests.fuzz.calls_world import World

__all__ = ["Snapshot", "trace"]

TINY = {torch.float64: 1e-250, torch.float32: 1e-30}


@dataclass
class Snapshot:
    """What there is to see after one action.

    Args:
        label: The action.
        step: The line of the script it belongs to.
        close: Tensors to compare up to rounding, by name; None where there is none.
        gradients: The `.grad` of every leaf.
        exact: What must be the same to the bit.
        identity: Whether each buffer is still the object that it was at the last snapshot.
        log: The calls of hooks since then: by parameter, in their order.
        forwards: How often a module with a hook ran.
        optional: Leaves that only poses of weight zero use, or that of which that is not sure.
        scales: The natural size of each leaf's gradient.
        error: What was raised.
        changed: Whether a parameter is not what it was when the call was combined.
    """

    label: str
    step: int
    close: dict[str, Tensor | None] = field(default_factory=dict)
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    exact: dict[str, Any] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    identity: dict[str, bool] = field(default_factory=dict)
    log: dict[str, list[tuple[str, Tensor]]] = field(default_factory=dict)
    forwards: int = 0
    optional: set[str] = field(default_factory=set)
    scales: dict[str, float] = field(default_factory=dict)
    error: Exception | None = None
    changed: bool = False


def trace(side: Side) -> list[Snapshot]:
    """Runs the script; ends with the line that raised, if one did."""
    return _Runner(side).run()


class _Runner:
    def __init__(self, side: Side) -> None:
        self.side, self.world = side, side.world
        self.plain = isinstance(side, Plain)
        self.found: list[Snapshot] = []
        self.buffers = self.world.buffers()
        self.scales: dict[str, float] = {}
        self.unsure: set[str] = set()
        self._live: set[str] = set()
        self.logged = self.ran = self.step = 0
        self.held: dict[str, Tensor] = {}
        if self.plain:
            self._probe(self.world.parameters())
        tensors = [p for p in self.world.parameters().values() if p.requires_grad]
        self.optimizer = torch.optim.SGD(tensors, lr=0.1)

    def run(self) -> list[Snapshot]:
        for number, step in enumerate(self.world.case.script):
            self.step = number
            try:
                self._run(step)
            except Exception as error:
                self._note(f"{step.kind} raised", error=error)
                break
        return self.found

    def _run(self, step: Step) -> None:
        {
            "call": self._call,
            "pair": self._pair,
            "no_grad": self._no_grad,
            "stale": self._stale,
        }.get(step.kind, self._simple)(step)

    def _call(self, step: Step) -> None:
        (call,) = step.calls
        scored = self._combined(call, f"{self.step}")
        loss = _loss(call, scored, self.world)
        with self._between(step, call):
            if step.backward == "grad":
                return self._grad(loss, scored)
            if step.backward == "inputs":
                inputs = [p for p in self._leaves().values() if p.requires_grad][::2]
                self._backward(scored, loss, inputs=inputs)
            else:
                self._backward(scored, loss, retain_graph=step.backward == "twice")
            if step.backward == "twice":
                self._backward(scored, loss)
        return None

    def _pair(self, step: Step) -> None:
        first, second = step.calls
        one = self._combined(first, f"{self.step} first")
        loss = _loss(first, one, self.world)
        with self._between(step, first):
            two = self._combined(second, f"{self.step} second")
        other = _loss(second, two, self.world)
        if step.backward == "joined":
            self._backward([one, two], loss + 0.5 * other)
        elif step.backward == "in order":
            self._backward(one, loss)
            self._backward(two, other)
        else:
            self._backward(two, other)
            self._backward(one, loss)

    def _no_grad(self, step: Step) -> None:
        with torch.no_grad():
            self._combined(step.calls[0], f"{self.step}")

    def _stale(self, step: Step) -> None:
        (call,) = step.calls
        scored = self._combined(call, f"{self.step}")
        loss = _loss(call, scored, self.world)
        with torch.no_grad():
            for parameter in self.world.parameters().values():
                if parameter.requires_grad:
                    parameter.mul_(1.01)
        self._backward(scored, loss)

    def _simple(self, step: Step) -> None:
        if step.kind == "zero_grad":
            self.optimizer.zero_grad(set_to_none=self.step % 2 == 0)
        elif step.kind == "flip":
            self._flip()
        elif step.kind == "plain":
            plain_loss(self.world).backward()
            self._step()
        else:
            self._step()
        if step.kind != "flip":
            self.unsure = {n for n in self.unsure if self._leaves()[n].grad is not None}
        self._note(step.kind)

    def _step(self) -> None:
        with_grad = [p for p in self.world.parameters().values() if p.grad is not None]
        for parameter in with_grad:
            parameter.grad = _copy(parameter.grad) if parameter.requires_grad else None
        torch.nn.utils.clip_grad_norm_(with_grad, 0.1)
        for rule in (p for n, p in self.world.trained.items() if p.ndim == 0):
            rule.grad = None  # a scale must stay positive
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _flip(self) -> None:
        for part in self.world.parts():
            part.train(not part.training) if not list(part.children()) else None

    @contextmanager
    def _between(self, step: Step, call: Call) -> Iterator[None]:
        flipped = False
        for what in step.between:
            if what == "draw":
                torch.rand(3)
            elif what == "pass":
                with torch.no_grad():
                    plain_loss(self.world)
            elif what == "flip":
                self._flip()
                flipped = True
            else:
                with torch.no_grad():
                    self.side.combine(call, f"{self.step} between")
            self._note(f"between: {what}")
        yield
        if flipped:
            self._flip()

    def _combined(self, call: Call, label: str) -> Scored:
        self.held = {n: p.detach().clone() for n, p in self.world.parameters().items()}
        scored = self.side.combine(call, label)
        if self.plain:
            self._probe({n: t for n, t in self.world.leaves.items() if n.startswith(label)})
        parts = {"prediction": scored.prediction, "per_pose": scored.per_pose}
        self._note(
            f"combine {label}",
            close={name: t.detach().clone() for name, t in parts.items()},
            graph={name: t.requires_grad for name, t in parts.items()},
        )
        return scored

    def _backward(self, scored: Scored | list[Scored], loss: Tensor, **how: Any) -> None:
        before = {name: leaf.grad is None for name, leaf in self._leaves().items()}
        loss.backward(**how)
        optional = self._weigh([scored] if isinstance(scored, Scored) else scored)
        if "inputs" in how:
            asked = {id(tensor) for tensor in how["inputs"]}
            self._live = {n for n in self._live if id(self._leaves()[n]) in asked}
        if not self._retained():
            self.unsure |= {name for name in optional if before[name]}
        self.unsure -= self._live
        self._note("backward", optional=optional)

    def _grad(self, loss: Tensor, scored: Scored) -> None:
        leaves = {n: t for n, t in self._leaves().items() if t.requires_grad}
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        optional = self._weigh([scored])
        gradients = {f"slope of {n}": g for n, g in zip(leaves, found, strict=True)}
        named = {f"slope of {n}" for n in optional}
        self._note("grad", slopes=gradients, optional=optional | named)

    def _weigh(self, calls: list[Scored]) -> set[str]:
        """The names of leaves that carry no weight, for sure or perhaps; notes those that do."""
        live = set().union(*(scored.live(TINY[self.world.dtype]) for scored in calls))
        touched = set().union(*(scored.touched() for scored in calls))
        names = {id(leaf): name for name, leaf in self._leaves().items()}
        self._live = {names[i] for i in live if i in names}
        return {names[i] for i in touched - live if i in names}

    def _retained(self) -> bool:
        """Whether this line of the script runs as plain autograd."""
        calls = self.world.case.script[self.step].calls
        return {call.schedule for call in calls} == {"retain"}

    def _leaves(self) -> dict[str, Tensor]:
        return {**self.world.parameters(), **self.world.leaves}

    def _probe(self, leaves: dict[str, Tensor]) -> None:
        """Notes the size of gradients as they come, before any hook of the user's sees them."""

        def noting(name: str) -> Any:
            def note(gradient: Tensor) -> None:
                dense = gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()
                size = float(dense.abs().max()) if dense.numel() else 0.0
                self.scales[name] = max(size, self.scales.get(name, 0.0))

            return note

        for name, leaf in leaves.items():
            if leaf.requires_grad:
                own = leaf._backward_hooks
                leaf._backward_hooks = None
                leaf.register_hook(noting(name))
                if own:
                    for key, hook in own.items():
                        leaf._backward_hooks[key] = hook

    def _note(
        self,
        label: str,
        *,
        close: dict[str, Tensor | None] | None = None,
        slopes: dict[str, Tensor | None] | None = None,
        graph: Any = None,
        optional: set[str] | None = None,
        error: Exception | None = None,
    ) -> None:
        world = self.world
        buffers = world.buffers()
        log: dict[str, list[tuple[str, Tensor]]] = {}
        for name, kind, value in world.log[self.logged :]:
            log.setdefault(name, []).append((kind, value))
        parameters = world.parameters()
        close = dict(close or {})
        close |= {f"value of {n}": p.detach().clone() for n, p in parameters.items()}
        gradients = {n: _copy(t.grad) for n, t in self._leaves().items()}
        self.found.append(
            Snapshot(
                label,
                self.step,
                close=close,
                gradients={**gradients, **{n: _copy(g) for n, g in (slopes or {}).items()}},
                exact={**_surroundings(world, self.plain), "graph": graph},
                buffers={n: b.detach().clone() for n, b in buffers.items()},
                identity={n: b is self.buffers.get(n) for n, b in buffers.items()},
                log=log,
                forwards=world.forwards - self.ran,
                optional=(optional or set()) | self.unsure,
                scales=dict(self.scales),
                error=error,
                changed=any(not torch.equal(p, self.held[n]) for n, p in parameters.items())
                if self.held
                else False,
            )
        )
        self.buffers, self.logged, self.ran = buffers, len(world.log), world.forwards


def _copy(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    return (tensor.to_dense() if tensor.is_sparse else tensor).detach().clone()


def _surroundings(world: World, plain: bool) -> dict[str, Any]:
    parts = world.parts()
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in parts
    ]
    own = [
        (len(p._backward_hooks or ()) - (plain and p.requires_grad),
         len(getattr(p, "_post_accumulate_grad_hooks", None) or ()))
        for p in world.parameters().values()
    ]  # fmt: skip
    return {
        "torch's random state": torch.get_rng_state().sum().item(),
        "NumPy's random state": str(np.random.get_state()[1:3]),
        "Python's random state": hash(random.getstate()),
        "training flags": [m.training for m in parts],
        "requires_grad": {n: p.requires_grad for n, p in world.parameters().items()},
        "hooks of modules": hooks,
        "hooks of parameters": own,
        "grad mode": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "multithreading": torch._C._is_multithreading_enabled(),
    }


def _loss(call: Call, scored: Scored, world: World) -> Tensor:
    of, kind, size = call.loss
    unit = world.case.magnitude
    prediction, per_pose = scored.prediction / unit, scored.per_pose / unit
    shapes = {
        "square": lambda y: (y - 0.7).square(),
        "sine": torch.sin,
        "linear": lambda y: 1.3 * y,
    }
    total = torch.zeros((), dtype=world.dtype)
    if of != "per_pose":
        each = shapes[kind](prediction)
        if call.groups and call.seed % 2:
            each = each[:1]  # a loss of one group
        total = total + each.sum() + 0.1 * each.mean().sin()
    if of != "prediction":
        steps = torch.arange(per_pose.numel(), dtype=world.dtype).reshape(per_pose.shape)
        signs = torch.cos(3 * steps + 1).masked_fill(steps.remainder(5) == call.seed % 5, 0)
        total = total + (signs * shapes[kind](per_pose)).sum()
    return size * total
