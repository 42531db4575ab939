"""The things of one case, made of its seed: the model, hooks that write a log, poses, a rule."""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from posegrad import AttentionPooling, Best, Boltzmann, Budget, Max, Mean, Min, Sum, TopK
from tests.fuzz.calls_draw import Call, Case
from tests.fuzz.calls_models import FEATURES, Head, Model, Trunk

__all__ = ["Poses", "World", "chunk_size_of", "collate_of", "predict", "rows_of"]


@dataclass
class Labelled:
    """A pose as a dataclass, with something that is no tensor."""

    x: Tensor
    name: str = "pose"


@dataclass
class Poses:
    """The poses of one call: `items` in their order, and the tensors that require grad."""

    items: list[Any]
    stacked: Tensor | None
    leaves: dict[str, Tensor]

    def handed(self, form: str) -> Any:
        """As the user hands them over."""
        if self.stacked is not None:
            return self.stacked
        return (pose for pose in self.items) if form == "generator" else self.items


class World:
    """One copy of everything a case is about; two of them are equal to the last bit."""

    def __init__(self, case: Case) -> None:
        self.case = case
        _seed(case.seed)
        self.dtype = {"float64": torch.float64, "float32": torch.float32}[case.dtype]
        trunk, head = Trunk(list(case.stages)), Head(case.outputs, case.magnitude)
        if case.tied_head:
            head.linear.weight = trunk.lift.weight
        self.modules: list[nn.Module] = [trunk, head]
        if not case.split:
            self.modules = [Model(trunk, head, case.forces)]
        self.encoder = nn.Linear(FEATURES, FEATURES)
        for module in (*self.modules, self.encoder):
            module.to(self.dtype)
        self._set_mode(trunk, head)
        self._freeze()
        self.log: list[tuple[str, str, Tensor]] = []
        self.forwards = 0
        self.rules: dict[tuple[str, float], Any] = {}
        self.trained: dict[str, Tensor] = {}
        self.leaves: dict[str, Tensor] = {}
        for spec in dict.fromkeys(c.rule for step in case.script for c in step.calls):
            self._add_rule(*spec)
        self._hook()
        if case.grads_before:
            for parameter in self.parameters().values():
                parameter.grad = torch.ones_like(parameter) * 0.5
        _seed(case.seed + 1)

    def parameters(self) -> dict[str, Tensor]:
        """Every parameter there is, of the model, the encoder and the rules, once."""
        found: dict[int, tuple[str, Tensor]] = {}
        for number, module in enumerate((*self.modules, self.encoder)):
            for name, parameter in module.named_parameters():
                found.setdefault(id(parameter), (f"{number}.{name}", parameter))
        return {**dict(found.values()), **self.trained}

    def buffers(self) -> dict[str, Tensor]:
        """Every buffer by its place."""
        return {
            f"{number}.{name}": buffer
            for number, module in enumerate(self.modules)
            for name, buffer in module.named_buffers(remove_duplicate=False)
        }

    def parts(self) -> list[nn.Module]:
        """Every module."""
        return [part for module in self.modules for part in module.modules()]

    def poses(self, call: Call, label: str) -> Poses:
        """The poses of a call, the same in every world."""
        generator = torch.Generator().manual_seed(call.seed)
        ragged = call.form == "ragged"
        sizes = [call.rows + (i * 7 + call.seed) % 3 * ragged for i in range(call.poses)]
        raw = [
            torch.randn(n, FEATURES, generator=generator, dtype=torch.float64).to(self.dtype)
            for n in sizes
        ]
        if call.duplicates:
            raw[-1] = raw[0]
        leaves: dict[str, Tensor] = {}
        stacked = None
        if call.form == "stacked":
            stacked = self._required(torch.stack(raw), call.grad, leaves, f"{label} poses")
            tensors = list(stacked.unbind(0))
        else:
            once: dict[int, Tensor] = {}
            for i, x in enumerate(raw):
                if id(x) not in once:
                    once[id(x)] = self._required(x, call.grad, leaves, f"{label} pose {i}")
            tensors = [once[id(x)] for x in raw]
        shift = torch.randn(FEATURES, generator=generator, dtype=torch.float64).to(self.dtype)
        shifts = [shift + i for i in range(call.poses)]
        if call.shared:
            shift = self._required(shift, call.grad or "leaf", leaves, f"{label} shared")
            shifts = [shift] * call.poses
        items = [_wrapped(call.form, x, s) for x, s in zip(tensors, shifts, strict=True)]
        self.leaves.update(leaves)
        return Poses(items, stacked, leaves)

    def _required(self, x: Tensor, grad: str, leaves: dict[str, Tensor], name: str) -> Tensor:
        if grad == "leaf":
            leaves[name] = x.requires_grad_()
        return torch.tanh(self.encoder(x)) if grad == "upstream" else x

    def _set_mode(self, trunk: nn.Module, head: nn.Module) -> None:
        for module in (trunk, head):
            module.train(self.case.mode != "eval")
        if self.case.mode == "mixed":
            trunk.stages[0].eval()

    def _freeze(self) -> None:
        own = [p for module in self.modules for p in module.parameters()]
        for number in self.case.frozen:
            own[number % (len(own) - 1)].requires_grad_(False)

    def _add_rule(self, name: str, sharpness: float) -> None:
        rule = _rule(name, sharpness, self.case, self.dtype)
        self.rules[name, sharpness] = rule
        if isinstance(rule, nn.Module):
            for key, parameter in rule.named_parameters():
                self.trained[f"rule {name} {sharpness} {key}"] = parameter

    def _hook(self) -> None:
        trained = [(n, p) for n, p in self.parameters().items() if p.requires_grad]
        linears = [m for m in self.parts() if type(m) is nn.Linear]
        for kind, number in self.case.hooks:
            if kind in ("forward", "pre", "full"):
                _hook_module(self, linears[number % len(linears)], kind)
            else:
                name, parameter = trained[number % len(trained)]
                _hook_parameter(self, name, parameter, kind)


def _rule(name: str, sharpness: float, case: Case, dtype: torch.dtype) -> Any:
    unit = case.magnitude
    scale = torch.tensor(sharpness / unit, dtype=dtype)
    made: dict[str, Callable[[], Any]] = {
        "Min": lambda: Min(sharpness / unit),
        "Max": lambda: Max(scale),
        "Boltzmann": lambda: Boltzmann(unit / sharpness),
        "Mean": Mean,
        "Sum": Sum,
        "Best": lambda: Best(largest=sharpness > 1),
        "TopK": lambda: TopK(2, largest=sharpness > 1),
        "lambda": lambda: lambda p: p.amax(0) / 2 + (p / unit).tanh().mean(0) * unit,
        "trained Min": lambda: Min(nn.Parameter(scale)),
        "trained Boltzmann": lambda: Boltzmann(nn.Parameter(1 / scale)),
        "module": _Midrange,
        "AttentionPooling": lambda: _Unit(AttentionPooling(case.outputs, hidden=3), unit).to(dtype),
    }
    return made[name]()


class _Midrange(nn.Module):
    """A rule that is a module, and no rule of the library's."""

    def forward(self, predictions: Tensor) -> Tensor:
        return (predictions.amin(dim=0) + predictions.amax(dim=0)) / 2


class _Unit(nn.Module):
    """A rule on predictions in their own unit."""

    def __init__(self, rule: nn.Module, unit: float) -> None:
        super().__init__()
        self.rule, self.unit = rule, unit

    def forward(self, predictions: Tensor) -> Tensor:
        return self.unit * self.rule(predictions / self.unit)


def predict(modules: Iterable[nn.Module], pose: Any, *, joined: bool) -> Tensor:
    """Scores a pose or a chunk: `[c, d]`, or for a pose alone `[d]`."""
    first, *rest = modules
    if isinstance(pose, dict):
        arguments = (pose["x"] + pose["shift"].unsqueeze(-2),)
    elif isinstance(pose, Labelled):
        arguments = (pose.x,)
    elif isinstance(pose, tuple) and len(pose) == 2:
        arguments = (pose[0] + pose[1].unsqueeze(-2),)
    else:
        arguments = pose if isinstance(pose, tuple) else (pose,)
    if not joined:
        arguments = (arguments[0].unsqueeze(0),)
    out = first(*arguments)
    for module in rest:
        out = module(out)
    return out if joined else out[0]


def collate_of(call: Call) -> Callable[[list[Any]], Any] | None:
    """How poses of this call are joined, if they are: a batch always, which the engine slices."""
    if call.chunk == 1 and call.form != "stacked":
        return None
    return partial(_collate, call.form)


def _collate(form: str, poses: list[Any]) -> Any:
    if form == "dict":
        return {key: torch.stack([pose[key] for pose in poses]) for key in ("x", "shift")}
    if form == "tuple":
        return tuple(torch.stack(part) for part in zip(*poses, strict=True))
    if form == "dataclass":
        return Labelled(torch.stack([pose.x for pose in poses]))
    if form == "ragged":
        owner = torch.arange(len(poses)).repeat_interleave(torch.tensor([len(p) for p in poses]))
        return torch.cat(poses), owner, len(poses)
    return torch.stack(poses)


def _wrapped(form: str, x: Tensor, shift: Tensor) -> Any:
    if form == "dict":
        return {"x": x, "shift": shift, "name": "pose"}
    if form == "tuple":
        return x, shift
    return Labelled(x) if form == "dataclass" else x


def chunk_size_of(call: Call) -> Any:
    """As for the engine: a number, or a budget of rows."""
    return call.chunk if call.chunk > 0 else Budget(-call.chunk, rows_of)


def rows_of(pose: Any) -> int:
    """How many rows per pose has."""
    if isinstance(pose, dict):
        return len(pose["x"])
    if isinstance(pose, Labelled):
        return len(pose.x)
    return len(pose[0]) if isinstance(pose, tuple) else len(pose)


def _hook_module(world: World, module: nn.Module, kind: str) -> None:
    def count(*_: Any) -> None:
        world.forwards += 1

    def doubled(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(1.5 * a for a in args)

    def scaled(_: nn.Module, into: Any, out: Any) -> Any:
        return tuple(None if g is None else 0.5 * g for g in into)

    if kind == "forward":
        module.register_forward_hook(count)
    elif kind == "pre":
        module.register_forward_pre_hook(doubled)
    else:
        module.register_full_backward_hook(scaled)


def _hook_parameter(world: World, name: str, parameter: Tensor, kind: str) -> None:
    def before(gradient: Tensor) -> Tensor | None:
        if gradient is None:
            world.log.append((name, f"{kind} got None", torch.zeros(())))
            return None
        world.log.append((name, kind, gradient.detach().clone()))
        if kind == "clamp":
            clamped = (gradient.to_dense() if gradient.is_sparse else gradient).clamp(-0.05, 0.05)
            return clamped.to_sparse() if gradient.is_sparse else clamped
        return 2 * gradient if kind == "scale" else None

    def after(p: Tensor) -> None:
        if p.grad is None:
            world.log.append((name, f"{kind} got None", torch.zeros(())))
            return
        world.log.append((name, kind, p.grad.detach().clone()))
        if kind == "after: step":
            with torch.no_grad():
                p.add_(p.grad, alpha=-0.01 / (1 + float(p.grad.abs().max())))
            p.grad = None

    if kind.startswith("after"):
        parameter.register_post_accumulate_grad_hook(after)
    else:
        parameter.register_hook(before)


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
