"""Schedule `stream`: differentiate each pose while its graph exists; keep only running sums."""

from typing import final

import torch
from torch import Tensor

from posegrad.combination import Combination, OnlineForm
from posegrad.combination._groups import Groups, groups_of
from posegrad.errors import PerPoseLossError
from posegrad.schedule._attach import Gradients
from posegrad.schedule._gradients import GradientSum
from posegrad.schedule._result import Combined, attached
from posegrad.schedule._run import Chunk, Run

__all__ = ["stream"]


def stream(run: Run, rule: Combination) -> Combined:
    """Combines gradients as the poses pass, the way online softmax combines values.

    Memory: K sums of parameter size, or K d n for n groups and predictions of d numbers, and one
    graph. Time: m forwards and at most m backwards; a pose whose weight is exactly zero
    beside those already seen is never differentiated. Serves losses of the combined prediction
    only.
    """
    form = rule.online()
    assert form is not None  # or another schedule would have been chosen
    groups = groups_of(rule)
    sums = [_OnlineSums(run, form) for _ in range(1 if groups is None else groups.count)]

    def scored() -> list[Tensor]:
        values: list[Tensor] = []
        for chunk in run.chunks(with_graph=True):
            _push(chunk, sums, run.groups)
            values.append(chunk.predictions.detach())
            del chunk  # its graph must be gone before the next one grows
        run.check_differentiable()
        return values

    per_pose = run.group(scored)
    with torch.no_grad():
        prediction = run.apply(lambda: rule(per_pose))

    def pullback(saved: Gradients, cotangents: Gradients) -> Gradients:
        on_prediction, on_poses = cotangents
        if on_poses is not None and bool((on_poses != 0).any()):
            raise PerPoseLossError(
                "The loss depends on per_pose, but schedule='stream' (which 'auto' takes for rules "
                "whose weights separate) kept only the gradient of the combined prediction.\n"
                "Pass schedule='recompute' (memory of one pose) or 'store' (no second forward) to "
                "combine()."
            )
        return _weighted(saved, on_prediction, len(run.inputs.tensors))

    members = [torch.arange(len(per_pose), device="cpu")] if groups is None else groups.members()
    gradients = [
        gradient
        for own, index in zip(sums, members, strict=True)
        for gradient in own.finish(per_pose[index.to(per_pose.device)])
    ]
    return Combined(*attached(run, [prediction, per_pose], pullback, gradients))


def _push(chunk: Chunk, sums: "list[_OnlineSums]", groups: Groups | None) -> None:
    """Adds the poses of a chunk to the sums of their groups."""
    count = chunk.portion.count
    if groups is None:
        return sums[0].push(chunk, torch.arange(count, device="cpu"), last=True)
    own = list(groups.within(chunk.start, count))
    for group, places in own:
        sums[group].push(chunk, places, last=group == own[-1][0])
    return None


def _weighted(gradients: Gradients, cotangent: Tensor | None, count: int) -> Gradients:
    """The vector-Jacobian product of the combined prediction, from its d stored gradients."""
    totals: list[Tensor | None] = [None] * count
    if cotangent is None:
        return totals
    for i, gradient in enumerate(gradients):
        if gradient is not None:
            component, number = divmod(i, count)
            term = gradient * cotangent.reshape(-1)[component].to(gradient.dtype)
            before = totals[number]
            totals[number] = term if before is None else before.add_(term)
    return totals


@final
class _OnlineSums:
    """The running sums S[k][component] of one group; `combination/_online.py` has the maths."""

    def __init__(self, run: Run, form: OnlineForm) -> None:
        self._inputs = run.inputs
        self._form = form
        self._sums: list[list[GradientSum]] = []
        self._level: Tensor | None = None

    def push(self, chunk: Chunk, places: Tensor, *, last: bool) -> None:
        """Adds poses of a chunk; if they raise the level, the sums are re-based first.

        Args:
            chunk: The chunk.
            places: Which of its poses belong to this group, `[c]`.
            last: Whether the chunk's graph is not needed afterwards.
        """
        predictions = _on_host(chunk.predictions)[places]  # [c, components]
        self._raise_level(self._form.level(predictions))
        assert self._level is not None
        features = self._form.features(predictions, self._level)  # [K, c, components]
        features = _exact_zeros(features, chunk.predictions.dtype)
        if chunk.portion.count == 1:
            self._push_one(chunk, features[:, 0])
        else:
            self._push_many(chunk, places, features, last=last)

    def finish(self, predictions: Tensor) -> list[Tensor | None]:
        """The gradient of the combined prediction: component by component, input by input."""
        host = _on_host(predictions)
        self._raise_level(self._form.level(host))  # another rank may have seen a higher one
        assert self._level is not None
        coefficients = self._form.coefficients(host, self._level)[:, 0].tolist()
        gradients: list[Tensor | None] = []
        for component, factor in enumerate(coefficients[0]):
            total = self._sums[0][component]
            total.scale(factor)
            for k in range(1, self._form.count):
                total.add(self._sums[k][component], coefficients[k][component])
            gradients += total.delivered(self._inputs.tensors)
        return gradients

    def _raise_level(self, level: Tensor) -> None:
        if self._level is None:
            self._level = level
            self._sums = [[GradientSum() for _ in level] for _ in range(self._form.count)]
            return
        if bool((level <= self._level).all()):
            return
        new = torch.maximum(self._level, level)
        rise, self._level = new - self._level, new
        transfer = self._form.transfer(rise)  # [K, K, components]
        for component in rise.nonzero().flatten().tolist():
            self._rebase(component, transfer[:, :, component].tolist())

    def _rebase(self, component: int, transfer: list[list[float]]) -> None:
        # Lower triangular: from the last sum up, so that each still finds the earlier ones
        # unchanged.
        for k in reversed(range(self._form.count)):
            self._sums[k][component].scale(transfer[k][k])
            for j in range(k):
                if transfer[k][j] != 0:
                    self._sums[k][component].add(self._sums[j][component], transfer[k][j])

    def _push_one(self, chunk: Chunk, features: Tensor) -> None:
        """Adds a single pose: one backward for each component serves all K sums."""
        flat = chunk.predictions.reshape(-1)
        factors = features.tolist()  # [K][components]
        live = [i for i in range(len(flat)) if any(row[i] != 0 for row in factors)]
        for component in live:
            unit = torch.zeros_like(flat)
            unit[component] = 1
            gradients = self._inputs.gradients(
                flat, unit, chunk.leaves, keep_graph=component != live[-1]
            )
            for k, sums in enumerate(self._sums):
                if factors[k][component] != 0:
                    sums[component].add(gradients, factors[k][component])

    def _push_many(self, chunk: Chunk, places: Tensor, features: Tensor, *, last: bool) -> None:
        """Adds several poses: one backward for each sum, with the features as cotangent."""
        predictions = chunk.predictions.reshape(chunk.portion.count, -1)  # [c, components]
        jobs = (features != 0).any(dim=1).nonzero().tolist()
        for k, component in jobs:
            cotangent = torch.zeros_like(predictions)
            weights = features[k, :, component].to(predictions)
            cotangent[places.to(weights.device), component] = weights
            keep = not last or [k, component] != jobs[-1]
            own = _with_weight(chunk, predictions, cotangent)
            self._sums[k][component].add(
                self._inputs.gradients(*own, chunk.leaves, keep_graph=keep)
            )


def _with_weight(chunk: Chunk, predictions: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    """Leaves out poses of zero weight that were scored alone: they are not differentiated."""
    if not chunk.rows:
        return predictions, cotangent
    live = (cotangent != 0).any(dim=1).nonzero().flatten().tolist()
    with torch.enable_grad():
        return torch.cat([chunk.rows[i] for i in live]).reshape(len(live), -1), cotangent[live]


def _on_host(predictions: Tensor) -> Tensor:
    """A few numbers to compute with: [c, components], float64, on the CPU."""
    return predictions.detach().reshape(len(predictions), -1).to("cpu", torch.float64)


def _exact_zeros(features: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros where the weight would be zero or subnormal in the predictions' own precision."""
    tiny = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).tiny
    return features.masked_fill(features.abs() < tiny, 0)
