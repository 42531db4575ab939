"""Plain autograd in float64: the oracle every schedule is held against."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from posegrad.combination._base import Rule, as_combination, outcome
from posegrad.engine import Engine
from posegrad.schedule._batch import as_batch
from posegrad.schedule._chunks import ChunkSize, Portion, in_chunks, sizes_of
from posegrad.schedule._division import sliced
from posegrad.schedule._plan import SCHEDULES, Request
from posegrad.schedule._poses import Pose, map_tensors

__all__ = ["assert_matches_autograd"]

Loss = Callable[[Tensor, Tensor], Tensor]


def assert_matches_autograd(
    model: nn.Module | Sequence[nn.Module],
    poses: Iterable[Pose] | Tensor,
    rule: Rule,
    *,
    groups: Tensor | Sequence[int] | None = None,
    schedules: Sequence[str] | None = None,
    loss: Loss | None = None,
    predict: Callable[..., Tensor] | None = None,
    collate: Callable[[list[Pose]], Any] | None = None,
    chunk_size: ChunkSize = "auto",
    tolerance: float = 1e-10,
) -> None:
    r"""Asserts that `Engine.combine` gives this model the numbers plain autograd gives it.

    Compares, in float64 and under one seed: the combined and the per-pose predictions, the gradient
    of every parameter, of the rule's parameters and of pose tensors that require grad, the buffers
    afterwards, and the state of the random generator afterwards. Everything runs on copies: the
    model, the poses and their `.grad` are not touched.

    Args:
        model: The model, or a sequence of modules for `predict`.
        poses: As for `Engine.combine`; at least one.
        rule: A combination rule or a function of the predictions.
        groups: As for `Engine.combine`.
        schedules: Which to check. Default: all that serve the rule.
        loss: From `(prediction, per_pose)` to a number. Default: one that uses both, or only the
            prediction under `stream`.
        predict: As for `Engine`.
        collate: As for `Engine`.
        chunk_size: As for `Engine`.
        tolerance: Largest difference allowed, absolute, and relative beyond 1.

    Raises:
        AssertionError: naming the schedule and the first tensor that differs, and by how much.

    Note:
        Costs a step of plain autograd and two of the engine for each schedule.

    Example:
        >>> assert_matches_autograd(nn.Linear(3, 1), torch.randn(5, 3), Min(scale=10.0))
    """
    case = _Case(
        modules=[model] if isinstance(model, nn.Module) else list(model),
        poses=list(poses) if as_batch(poses) is None else poses,
        rule=as_combination(rule),
        options={"predict": predict, "collate": collate, "chunk_size": chunk_size},
        groups=groups,
    )
    for schedule in schedules if schedules is not None else _serving(case.rule):
        chosen = loss if loss is not None else _loss_of(per_pose=schedule != "stream")
        expected = _plain(case.copy(), chosen)
        for nth, found in zip(
            ("first", "second"), _engine(case.copy(), chosen, schedule), strict=True
        ):
            for name, value in expected.items():
                what = f"schedule={schedule!r}, {name}, {nth} time"
                _assert_close(found[name], value, tolerance, what)


def _assert_close(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    torch.testing.assert_close(
        found, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}"
    )


@final
@dataclass
class _Case:
    modules: list[nn.Module]
    poses: Any  # a batch or a list
    rule: nn.Module
    options: dict[str, Any]
    groups: Tensor | Sequence[int] | None
    leaves: Sequence[Tensor] = ()

    def copy(self) -> "_Case":
        """The same case in float64, sharing nothing with this one."""
        modules, rule = copy.deepcopy((self.modules, self.rule))
        twins: dict[int, Tensor] = {}

        def twin(tensor: Tensor) -> Tensor:
            if id(tensor) not in twins:
                new = tensor.detach().clone()
                new = new.double() if new.is_floating_point() else new
                twins[id(tensor)] = new.requires_grad_(tensor.requires_grad)
            return twins[id(tensor)]

        poses = map_tensors(twin, self.poses)
        for module in (*modules, rule):
            module.double().zero_grad()
        leaves = [t for t in twins.values() if t.requires_grad]
        return _Case(modules, poses, rule, self.options, self.groups, leaves)

    def combined(self, per_pose: Tensor) -> Tensor:
        """The rule's result, group by group."""
        if self.groups is None:
            return outcome(self.rule(per_pose))[0]
        if isinstance(self.groups, Tensor):
            ids = self.groups.tolist()
        else:
            ids = [group for group, size in enumerate(self.groups) for _ in range(size)]
        members = [[i for i, own in enumerate(ids) if own == g] for g in range(max(ids) + 1)]
        return torch.stack([outcome(self.rule(per_pose[own]))[0] for own in members])

    def buffers(self) -> list[tuple[nn.Module, str, Tensor]]:
        """Every buffer and where it lives; a model may change it by being run, or replace it."""
        parts = [part for module in self.modules for part in module.modules()]
        return [(part, name, b) for part in parts for name, b in part.named_buffers(recurse=False)]

    def trained(self) -> list[Tensor]:
        """Everything a gradient flows to."""
        return [*(p for m in (*self.modules, self.rule) for p in m.parameters()), *self.leaves]

    def results(self, prediction: Tensor, per_pose: Tensor) -> dict[str, Tensor]:
        """Everything that must agree, by name."""
        named: dict[str, Tensor] = {"prediction": prediction, "per_pose": per_pose}
        parts = {f"module {i}": m for i, m in enumerate(self.modules)} | {"rule": self.rule}
        for part, module in parts.items():
            for name, parameter in module.named_parameters():
                named[f"{part}, {name}.grad"] = _gradient(parameter)
            named |= {f"{part}, {name}": b.clone() for name, b in module.named_buffers()}
        for i, leaf in enumerate(self.leaves):
            named[f"pose tensor {i}.grad"] = _gradient(leaf)
        return named | {"random state": torch.get_rng_state()}


def _gradient(leaf: Tensor) -> Tensor:
    """A pose of weight zero gives plain autograd a gradient of zeros, and us none."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _call(model: nn.Module, pose: Pose) -> Any:
    return model(pose)


def _plain(case: _Case, loss: Loss) -> dict[str, Tensor]:
    """All graphs kept, one backward; imports nothing of the engine."""
    predict: Callable[..., Any] = case.options["predict"] or _call
    collate, size, batch = case.options["collate"], case.options["chunk_size"], as_batch(case.poses)
    portions: Iterator[Portion]
    if batch is None:
        chunks = in_chunks(iter(case.poses), 1 if size == "auto" else size)
        how: Any = "alone" if collate is None else "joined"
        portions = (Portion(chunk, len(chunk), how) for chunk in chunks)
    else:
        sizes = sizes_of(batch, max(1, batch.count) if size == "auto" else size)
        portions, collate = sliced(batch, sizes), None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rows = []
        for portion in portions:
            argument = portion.poses[0] if collate is None else collate(portion.poses)
            output = predict(*case.modules, argument)
            rows.append(output.unsqueeze(0) if portion.how == "alone" else output)
        per_pose = torch.cat(rows)  # [m, ...]
        per_pose = per_pose.flatten() if per_pose.numel() == len(per_pose) else per_pose
        prediction = case.combined(per_pose)
        torch.autograd.backward(loss(prediction, per_pose))
        return case.results(prediction.detach(), per_pose.detach())


def _engine(case: _Case, loss: Loss, schedule: str) -> Iterator[dict[str, Tensor]]:
    """The same group twice: an engine looks closer at its first group than at later ones."""
    engine = Engine(*case.modules, **case.options)
    buffers = [(module, name, b, b.clone()) for module, name, b in case.buffers()]
    for _ in range(2):
        for module, name, buffer, value in buffers:
            setattr(module, name, buffer.copy_(value))
        for tensor in case.trained():
            tensor.grad = None
        with torch.random.fork_rng():
            torch.manual_seed(0)
            found = engine.combine(case.poses, case.rule, groups=case.groups, schedule=schedule)
            torch.autograd.backward(loss(found.prediction, found.per_pose))
            yield case.results(found.prediction.detach(), found.per_pose.detach())


def _loss_of(*, per_pose: bool) -> Loss:
    def loss(prediction: Tensor, predictions: Tensor) -> Tensor:
        total = (prediction - 1.5).square().sum() + prediction.sum().sin()  # groups are coupled
        if per_pose:
            steps = torch.arange(
                predictions.numel(), dtype=predictions.dtype, device=predictions.device
            )
            signs = torch.cos(3 * steps + 1).to(predictions)  # mixed signs, none zero
            total = total + (signs.reshape(predictions.shape) * predictions).sum()
        return total

    return loss


def _serving(rule: Any) -> list[str]:
    request = Request(rule, "auto", 0.0, one_chunk=False, scales_float16=False)
    refused = {"auto"} if request.form is not None else {"auto", "stream"}
    return [name for name in SCHEDULES if name not in refused]
