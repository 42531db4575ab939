"""Every reading of a Jacobian, set beside the rows of plain autograd."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from posegrad import Clip, Engine, PoseJacobian
from tests.fuzz.programs_oracle import Rows, Tolerance, row_norms

__all__ = ["AFTER", "READINGS", "Comparison", "Scene"]

Slack = Mapping[str, Tensor]


@dataclass(frozen=True)
class Comparison:
    """An error, and how large it may be if rows may be off by as much as `slack` says."""

    label: str
    error: Tensor
    bound: Callable[[Slack], Tensor]

    def fails(self, slack: Slack) -> bool:
        return not bool((self.error <= self.bound(slack)).all())

    def worst(self, slack: Slack) -> str:
        error, bound = self.error.reshape(-1), self.bound(slack).reshape(-1)
        i = int((error - bound).nan_to_num(torch.inf).argmax())
        return f"{self.label}[{i}] is off by {error[i]:.3g} (may be by {bound[i]:.3g})"


@dataclass(frozen=True)
class Scene:
    """What a reading is taken from.

    Args:
        expected: The rows by plain autograd.
        shape: That of the output.
        parameters: Those that the Jacobian has columns for.
        number: Where weights and such are drawn from.
    """

    expected: Rows
    shape: torch.Size
    parameters: Mapping[str, nn.Parameter]
    number: int
    tolerance: Tolerance

    def drawn(self, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.number)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def weights(self) -> Tensor:
        """Of mixed signs; for every second number of such sizes that all rows count the same."""
        norms = self.expected.norms
        w = self.drawn(len(norms))
        return w / torch.where(self.usual & (norms > 0), norms, 1) if self.number % 2 else w

    @property
    def usual(self) -> Tensor:
        """The rows that can be squared, `[M]`."""
        norms, limits = self.expected.norms, self.tolerance
        squared = (norms > limits.smallest) & (norms < limits.largest)
        return self.expected.finite & ((norms == 0) | squared)

    def generalized(self, gram: Tensor) -> Tensor:
        n = len(self.shape)
        order = [*range(n), *reversed(range(n, 2 * n))]
        return gram.reshape(*self.shape, *self.shape).permute(order)

    def flat(self, gram: Tensor) -> Tensor:
        """From `shape + reversed(shape)` to `[M, M]`."""
        n = len(self.shape)
        assert gram.shape == (*self.shape, *reversed(self.shape)), gram.shape
        order = [*range(n), *reversed(range(n, 2 * n))]
        return gram.permute(order).reshape(self.shape.numel(), -1)


def _block(scene: Scene, name: str, found: Tensor) -> Comparison:
    expected, fine = scene.expected.blocks[name], scene.expected.finite
    error = (found.double() - expected)[fine]
    return Comparison(f"rows of {name}", row_norms(error), lambda slack: slack[name][fine])


def _total(slack: Slack) -> Tensor:
    return torch.stack(list(slack.values())).sum(0)


def _matrix(scene: Scene, J: PoseJacobian) -> list[Comparison]:
    found = J.matrix()
    assert found.shape == scene.expected.matrix.shape, found.shape
    widths = [block.shape[1] for block in scene.expected.blocks.values()]
    parts = found.split(widths, 1)
    return [_block(scene, n, part) for n, part in zip(scene.expected.blocks, parts, strict=True)]


def _one_block(scene: Scene, J: PoseJacobian) -> list[Comparison]:
    names = list(scene.parameters)
    name = names[scene.number % len(names)]
    found = J.block(name)
    assert found.shape == (*scene.shape, *scene.parameters[name].shape), found.shape
    return [_block(scene, name, found.reshape(scene.shape.numel(), scene.parameters[name].numel()))]


def _lengths(scene: Scene, J: PoseJacobian) -> list[Comparison]:
    found, fine = J.norms(), scene.usual
    assert found.shape == scene.shape, found.shape
    error = (found.reshape(-1).double() - scene.expected.norms)[fine].abs()
    return [Comparison("norms", error, lambda slack: _total(slack)[fine])]


def _pairs(scene: Scene, gram: Tensor, label: str) -> list[Comparison]:
    fine, rows, norms = scene.usual, scene.expected.matrix, scene.expected.norms
    rows, norms = rows[fine], norms[fine]
    error = (scene.flat(gram).double()[fine][:, fine] - rows @ rows.T).abs()

    def bound(slack: Slack) -> Tensor:
        off = _total(slack)[fine]
        return torch.outer(norms, off) + torch.outer(off, norms) + torch.outer(off, off)

    return [Comparison(label, error, bound)]


def _gramian(scene: Scene, J: PoseJacobian) -> list[Comparison]:
    return _pairs(scene, J.gramian(), "gramian")


def _item(scene: Scene, J: PoseJacobian) -> list[Comparison]:
    count = scene.shape.numel()
    i = scene.number % count
    index = torch.unravel_index(torch.tensor(i), scene.shape) if scene.shape else ()
    found = J[tuple(map(int, index))]
    if not scene.expected.finite.all():
        return []
    return [
        Comparison(
            f"J[{i}] of {name}",
            (gradient.double().reshape(-1) - scene.expected.blocks[name][i]).norm()[None],
            lambda slack, name=name: slack[name][i : i + 1],
        )
        for name, gradient in found.items()
    ]


def _sums(
    scene: Scene, weights: Tensor, found: Mapping[str, Tensor | None], label: str, base: float = 0.0
) -> list[Comparison]:
    """Weighted sums of rows; `base` is what `.grad` held before, in each number."""
    result = []
    for name, rows in scene.expected.blocks.items():
        gradient = found[name]
        flat = rows.new_zeros(rows.shape[1]) if gradient is None else gradient.reshape(-1).double()
        error = (flat - base - weights @ rows).norm()[None]
        more = 1e-12 * base
        result.append(
            Comparison(
                f"{label} of {name}",
                error,
                lambda slack, name=name, more=more: (weights.abs() @ slack[name])[None] + more,
            )
        )
    return result


def _combined(scene: Scene, J: PoseJacobian) -> list[Comparison]:
    w = scene.weights()
    found = J.combine(w.reshape(scene.shape))
    if not scene.expected.finite.all():
        return []
    return _sums(scene, w, found, "combine")


def _deposited(
    scene: Scene, step: Callable[[], Tensor | None]
) -> tuple[dict[str, Tensor | None], float]:
    """What a step leaves in `.grad`, which held nothing or ones; it is None again."""
    base = float(scene.number % 3 == 0)
    for p in scene.parameters.values():
        p.grad = torch.ones_like(p) if base else None
    try:
        step()
        found = {name: p.grad for name, p in scene.parameters.items()}
    finally:
        for p in scene.parameters.values():
            p.grad = None
    if not base:
        for name, gradient in found.items():
            assert (gradient is None) == (name in scene.expected.unused), f".grad of {name}"
    return found, base


def _backward(scene: Scene, J: PoseJacobian) -> list[Comparison]:
    w = scene.weights()
    found, base = _deposited(scene, lambda: J.backward(w.reshape(scene.shape)))
    if not scene.expected.finite.all():
        return []
    return _sums(scene, w, found, "backward", base)


def _compute_gramian(scene: Scene, engine: Engine, output: Tensor) -> list[Comparison]:
    return _pairs(scene, engine.compute_gramian(output), "compute_gramian")


def _clipped(scene: Scene, engine: Engine, output: Tensor) -> list[Comparison]:
    norms = scene.expected.norms
    if not (scene.usual.all() and output.ndim):  # of a single number a warning is right
        return []
    longest = float(norms.median()) * 0.9 or 1.0
    found, base = _deposited(scene, lambda: engine.backward(output, Clip(longest)))
    weights = (longest / norms).clamp(max=1)
    return _sums(scene, weights, found, "clip", base)


READINGS = {
    "matrix": _matrix,
    "block": _one_block,
    "norms": _lengths,
    "gramian": _gramian,
    "item": _item,
    "combine": _combined,
    "backward": _backward,
}
"""Of a Jacobian."""

AFTER = {"compute_gramian": _compute_gramian, "clip": _clipped}
"""Of an engine and an output whose graph is kept until then."""
