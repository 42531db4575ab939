"""The engine: runs the poses of a group and delivers their combined gradient."""

from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import replace
from itertools import chain, islice
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from posegrad.combination import Combination
from posegrad.combination._base import Rule, as_combination
from posegrad.errors import (
    ClosedEngineError,
    NoPosesError,
    ShapeMismatchError,
    UnsupportedModuleError,
)
from posegrad.schedule._inputs import Inputs
from posegrad.schedule._plan import Plan, Request, choose, describe
from posegrad.schedule._poses import Pose, each_pose, in_chunks
from posegrad.schedule._replay import scales_float16
from posegrad.schedule._session import Combined, Scorer, Session
from posegrad.schedule.recompute import recompute
from posegrad.schedule.retain import retain
from posegrad.schedule.store import store
from posegrad.schedule.stream import stream

__all__ = ["Engine"]

_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")


class Engine:
    r"""Scores groups of poses and gives their combined prediction exact gradients.

    A model scores one pose, :math:`\hat y_i = f_\theta(X_i)`; a rule combines m of them. The
    gradient of any loss of the result is :math:`w^\top J`, with one weight for each pose and row i
    of J the gradient of :math:`\hat y_i`. The engine finds w first and differentiates only what w
    needs, one pose at a time, so that m graphs are never alive together.

    Nothing is added to the model: no hooks, no attributes. The engine draws no random numbers.

    Args:
        modules: The model; or several modules, none inside another, together with `predict`.
        predict: Called as `predict(*modules, pose)` to score a pose. Default: `model(pose)`.
        collate: Joins a list of poses into what the model takes, e.g. `torch.stack` or PyG's
            `Batch.from_data_list`. The model must then return one row per pose, `[c, ...]`.
        chunk_size: How many poses are scored together, and so how many graphs are alive at once.
            A stacked tensor needs no `collate`; a list does.

    Raises:
        TypeError: if a module is not an `nn.Module`.
        ValueError: if there is no module, several without `predict`, or `chunk_size` < 1.
        UnsupportedModuleError: if one module is inside another, or is wrapped for distributed
            training.

    Example:
        >>> model = nn.Linear(3, 1)
        >>> engine = Engine(model)
        >>> prediction, per_pose = engine.combine(torch.randn(5, 3), Min(scale=1000.0))
        >>> prediction.shape, per_pose.shape
        (torch.Size([]), torch.Size([5]))
        >>> (prediction - 1.0).square().backward()
        >>> model.weight.grad.shape
        torch.Size([1, 3])
    """

    def __init__(
        self,
        *modules: nn.Module,
        predict: Callable[..., Tensor] | None = None,
        collate: Callable[[list[Pose]], Any] | None = None,
        chunk_size: int = 1,
    ) -> None:
        _check_modules(modules)
        if predict is None and len(modules) > 1:
            raise ValueError(
                f"The engine has {len(modules)} modules and cannot know how a pose passes through "
                f"them. Pass predict=lambda first, second, pose: ...."
            )
        if isinstance(chunk_size, bool) or int(chunk_size) != chunk_size or chunk_size < 1:
            raise ValueError(f"chunk_size is {chunk_size}, but it must be a whole number from 1.")
        self.modules = modules
        self.predict = predict if predict is not None else _call
        self.collate = collate
        self.chunk_size = int(chunk_size)
        self._closed = False
        self._seasoned = False  # whether a group has been through without a complaint

    def combine(
        self,
        poses: Iterable[Pose] | Tensor,
        rule: Rule,
        *,
        schedule: str = "auto",
        skip_below: float = 0.0,
    ) -> Combined:
        r"""Scores the poses of one group and combines their predictions.

        Both results carry gradients for any loss: call `backward()` on it as usual. Gradients
        flow to the model's parameters, to the rule's, and to tensors inside the poses that require
        grad. They accumulate into `.grad` in backward, as those of any loss do.

        Args:
            poses: A list, tuple, generator or other iterable of poses, or a stacked tensor whose
                rows are poses. A pose is whatever the model takes: a tensor, a tuple, a dict, a
                dataclass, a PyG Data.
            rule: A combination rule, or any function from predictions `[m, ...]` to `[...]`.
            schedule: `"retain"`, `"store"`, `"stream"`, `"recompute"`; `"auto"` takes the cheapest
                that serves the rule. All give the same numbers; see `plan`.
            skip_below: Leave poses out of the gradient whose weight is below this share of the
                largest. The error is at most `skip_below * max|w|` times the sum of the norms of
                the gradients left out; 0 is exact.

        Returns:
            `(prediction, per_pose)`. Under `torch.no_grad()`, without gradients and at the cost of
            m forwards.

        Raises:
            NoPosesError: if there are none.
            NonFinitePredictionError: if predictions are nan or infinite; names the poses.
            ShapeMismatchError: if predictions do not fit the chunk or each other.
            NotDifferentiableError: if predictions cannot carry a gradient.
            UntrackedTensorError: if a prediction depends on a tensor that requires grad and is
                neither a parameter nor part of its pose.
            ClosedEngineError: after `close()`.
            ValueError: if the schedule is unknown or cannot serve the call.

        In backward:
            StaleParametersError: if a parameter was changed since.
            PerPoseLossError: if the loss depends on `per_pose` under `stream`.
            ReplayError: if a pose scored again gives another prediction (`recompute`).
            HigherOrderError: if a second derivative is asked for (not under `retain`).

        Shape:
            predictions of shape `[...]` for a pose give `per_pose` `[m, ...]` and a `prediction`
            `[...]`. A prediction of one number counts as `[]`, be it `[1]` or `[1, 1]`.

        Note:
            Time in forwards F and backwards B, memory beyond the poses: `stream` m (F + B), one
            graph and K sums of parameter size; `recompute` m F + k (F + B), one graph, where k
            poses have a weight that is not exactly zero; `store` m (F + B), m gradients; `retain`
            m (F + B), m graphs.

        Example:
            >>> engine = Engine(nn.Linear(3, 1))
            >>> prediction, per_pose = engine.combine([torch.ones(3), torch.zeros(3)], Mean())
            >>> bool(prediction == per_pose.mean())
            True
        """
        self._check_open()
        rule = as_combination(rule)
        scorer = self._scorer(poses)
        chunks = in_chunks(each_pose(poses), self.chunk_size)
        opening = list(islice(chunks, 2))
        if not opening:
            raise NoPosesError(
                "There are no poses: a combination of none is undefined.\n"
                "Leave compounds without poses out of the loop."
            )
        request = self._request(rule, schedule, skip_below, len(opening))
        name, _ = choose(request)
        return self._run(name, request, scorer, chain(opening, chunks))

    def plan(
        self, poses: Sized | Tensor, rule: Rule, *, schedule: str = "auto", skip_below: float = 0.0
    ) -> Plan:
        """What `combine` would do with these poses and this rule, without scoring any.

        Args:
            poses: As for `combine`, but with a length.
            rule: As for `combine`.
            schedule: As for `combine`.
            skip_below: As for `combine`.

        Returns:
            A `Plan`; print it. It supposes that a prediction is one number.

        Raises:
            TypeError: if `poses` has no length, as a generator.
            NoPosesError: if there are none.

        Example:
            >>> print(Engine(nn.Linear(3, 1)).plan(torch.zeros(64, 3), Mean()))
            schedule   stream (the rule's weights separate)
            poses      64 in 64 chunks
            forwards   64
            backwards  1 to 64
            holds      1 running sum: 0.00 MiB
        """
        self._check_open()
        if not isinstance(poses, Sized):
            raise TypeError(
                f"plan() needs to know how many poses there are, and a {type(poses).__name__} does "
                f"not say. Pass a list or a stacked tensor."
            )
        count = len(poses)
        if count == 0:
            raise NoPosesError("There are no poses to plan for.")
        chunks = -(-count // self.chunk_size)
        request = self._request(as_combination(rule), schedule, skip_below, chunks)
        size = sum(
            p.numel() * p.element_size() for p in self._parameters().values() if p.requires_grad
        )
        return describe(request, poses=count, chunks=chunks, parameter_bytes=size)

    def close(self) -> None:
        """Ends the engine's life; using it afterwards raises `ClosedEngineError`.

        There is nothing to undo on the model. `with Engine(model) as engine:` closes at the end.

        Example:
            >>> engine = Engine(nn.Linear(3, 1))
            >>> engine.close()
        """
        self._closed = True

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(
        self, name: str, request: Request, scorer: Scorer, chunks: Iterator[list[Pose]]
    ) -> Combined:
        if name == "retain" or not torch.is_grad_enabled():
            return retain(scorer, chunks, request.rule)
        session = Session(scorer, chunks, Inputs(self._parameters()), wary=not self._seasoned)
        if name == "stream":
            name, _ = choose(_informed(request, session.first().predictions))
        if name == "stream":
            combined = stream(session, request.rule)
        elif name == "store":
            combined = store(session, request.rule)
        else:
            combined = recompute(session, request.rule, skip_below=request.skip_below)
        self._seasoned = True
        return combined

    def _scorer(self, poses: Iterable[Pose] | Tensor) -> Scorer:
        if isinstance(poses, Tensor) and poses.ndim == 0:
            raise ShapeMismatchError(
                "The poses are a tensor without dimensions; its rows would be the poses.\n"
                "Pass a stacked tensor [m, ...] or a list of poses."
            )
        collate = self.collate
        if collate is None and self.chunk_size > 1:
            if not isinstance(poses, Tensor):
                raise ValueError(
                    f"chunk_size is {self.chunk_size} and the poses come as a "
                    f"{type(poses).__name__}, so the engine must know how to join them. Pass "
                    f"Engine(..., collate=torch.stack), PyG's Batch.from_data_list, or a stacked "
                    f"tensor of poses."
                )
            collate = torch.stack
        return Scorer(self.modules, self.predict, collate, self.chunk_size)

    def _request(self, rule: Combination, schedule: str, skip: float, chunks: int) -> Request:
        scales = scales_float16(self.modules)
        return Request(rule, schedule, skip, one_chunk=chunks == 1, scales_float16=scales)

    def _parameters(self) -> dict[str, nn.Parameter]:
        """All parameters by dotted name; those of several modules under `0.`, `1.`, ..."""
        prefixes = [f"{i}." for i in range(len(self.modules))] if len(self.modules) > 1 else [""]
        named = {
            prefix + name: parameter
            for prefix, module in zip(prefixes, self.modules, strict=True)
            for name, parameter in module.named_parameters()
        }
        lazy = [name for name, parameter in named.items() if is_lazy(parameter)]
        if lazy:
            raise UnsupportedModuleError(
                f"Not initialised yet: {', '.join(lazy)}. The engine cannot follow a parameter "
                f"that does not exist. Score one pose with the model first."
            )
        return named

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedEngineError("This engine was closed. Make a new one: Engine(model).")


def _informed(request: Request, predictions: Tensor) -> Request:
    """The request with what only a first prediction tells: its size, and what the rule trains."""
    with torch.enable_grad():
        trained = request.rule(predictions.detach()).requires_grad
    return replace(request, components=predictions[0].numel(), rule_is_trained=trained)


def _call(model: nn.Module, pose: Pose) -> Any:
    return model(pose)


def _check_modules(modules: tuple[nn.Module, ...]) -> None:
    if not modules:
        raise ValueError("The engine has no module. Pass the model: Engine(model).")
    for i, module in enumerate(modules):
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"Module {i} is a {type(module).__name__}, not an nn.Module. Pass the model "
                f"itself; a function that calls it belongs into predict=."
            )
        for name, part in module.named_modules():
            _check_not_wrapped(name or f"module {i}", part)
            inside = next((j for j, m in enumerate(modules) if m is part and j != i), None)
            if inside is not None:
                raise UnsupportedModuleError(
                    f"Module {inside} is inside module {i} (as {name or 'the same object'}), so "
                    f"its parameters would be counted twice. Pass the outer one only."
                )


def _check_not_wrapped(name: str, module: nn.Module) -> None:
    kinds = {c.__name__ for c in type(module).__mro__ if c.__module__.startswith("torch.")}
    found = kinds.intersection(_WRAPPERS)
    if found:
        raise UnsupportedModuleError(
            f"{name} is wrapped by {found.pop()}, which averages gradients over processes when its "
            f"own forward runs with a graph. The engine scores poses without one, so the gradients "
            f"would silently stay local.\n"
            f"Until posegrad supports it: Engine(wrapped.module), then all-reduce each .grad "
            f"yourself before optimizer.step()."
        )
