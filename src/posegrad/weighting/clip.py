"""Per-pose clipping, with noise a step of DP-SGD."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from posegrad.combination._checks import number, positive
from posegrad.errors import listed
from posegrad.weighting._base import Jacobian, Step
from posegrad.weighting._clipping import Clipping, finite_norms

__all__ = ["Clip"]

Groups = Mapping[str, tuple[Iterable[str], float | None]]
"""By the name of a group: the parameters in it, and its own greatest norm."""

MODES = ("flat", "automatic")


@final
class Clip(Clipping):
    r"""The sum of the poses' gradients, each shortened to a greatest length.

    .. math::
        g = \sum_i w_i g_i + z, \qquad w_i = \min\left(1, \frac{C}{\lVert g_i \rVert}\right), \qquad
        z \sim \mathcal N(0, \sigma^2 C^2)

    Each pose contributes at most C to the norm of g. With noise this is a step of DP-SGD: divide g
    by the expected number of poses (in the loss or the learning rate), and use a library for the
    privacy accounting. The noise also goes to parameters that no pose of this group uses, because
    which ones these are may tell something. An output `[m, d]` has d gradients per pose, each
    shortened by itself: to bound the pose, reduce them to one loss. With noise, only `[m]` works.

    The noise is that of one optimizer step. Where several gradients are added up for a step, of
    micro-batches or of ranks, `last` says which of them gets it.

    Args:
        max_norm: C, the greatest norm of one pose's gradient, in units of the prediction per
            parameter. Positive and finite.
        by: `"all"` shortens a pose's gradient as a whole. `"parameter"` shortens its part in each
            parameter separately; a dict of `{group: (names of parameters, C)}` its part in each
            group. Of K groups, those whose own C is None get :math:`C / \sqrt K`. The noise has the
            deviation :math:`\sigma \sqrt{\sum_k C_k^2}`. With parts there is no single weight per
            pose, so a backward returns None.
        mode: `"flat"` leaves short gradients as they are; `"automatic"` gives all of them about the
            same length, :math:`w_i = C / (\lVert g_i \rVert + \gamma)`.
        gamma: :math:`\gamma`. Positive and finite.
        noise_multiplier: :math:`\sigma`; 0 for none.
        generator: Where the noise is drawn from; needed if there is any. Its state is in
            `state_dict()`.

    Shape:
        gramian `[M, M]`, of which the diagonal is read; to weights `[M]`.

    Raises:
        ValueError: if a norm or `gamma` is not positive and finite, `noise_multiplier` not zero or
            more, `by` or `mode` unknown, or noise is wanted without a generator; in backward, if
            the groups do not name every trained parameter once.
        ShapeMismatchError: in backward, if there is noise and the output is not `[m]`.
        PosesMixError: likewise, if poses influence each other.

    Warns:
        UserWarning: without noise, of an output of shape `[]`, as a loss that was reduced has.

    Note:
        Needs norms only, no Gramian. Time: a plain step, and the norms; for layers with one row per
        pose these take no more than reading the inputs and cotangents. Memory: by parameter or
        group, what is held of a layer is freed as soon as its gradient is computed.

    References:
        Abadi et al., "Deep learning with differential privacy", CCS 2016, algorithm 1; Goodfellow,
        "Efficient per-example gradient computations" (2015), for the norms; McMahan et al.,
        "Learning differentially private recurrent language models", ICLR 2018, for groups; Bu et
        al., "Automatic clipping", NeurIPS 2023.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> y = model(torch.tensor([[3.0, 4.0], [0.3, 0.4]])).squeeze(1)
        >>> Engine(model).backward(y, Clip(max_norm=1.0))
        tensor([0.2000, 1.0000])
        >>> model.weight.grad
        tensor([[0.9000, 1.2000]])
    """

    def __init__(
        self,
        max_norm: float,
        *,
        by: str | Groups = "all",
        mode: str = "flat",
        gamma: float = 0.01,
        noise_multiplier: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(noise_multiplier, generator)
        self.max_norm = number(positive("max_norm", max_norm))
        self.by = _checked(by)
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} is unknown; it is 'flat' or 'automatic'.")
        self.mode = mode
        self.gamma = number(positive("gamma", gamma))

    def forward(self, gramian: Tensor, predictions: Tensor) -> Tensor:
        return self._shortening(gramian.diagonal().clamp(min=0).sqrt(), self.max_norm)

    def weights(self, jacobian: Jacobian) -> Tensor:
        return self._shortening(finite_norms(jacobian), self.max_norm)

    @property
    def greatest(self) -> float:
        if isinstance(self.by, str):
            return self.max_norm
        return math.hypot(*(norm for _, norm in self._groups(self.by)))

    def clipped(self, jacobian: Jacobian) -> Step:
        if self.by == "all":
            weights = self.weights(jacobian)
            return Step(jacobian.combine(weights), weights)
        gradients: dict[str, Tensor] = {}
        for names, norm in self._groups_of(jacobian.shapes):
            part = jacobian.of(names)
            gradients |= part.combine(self._shortening(finite_norms(part), norm))
            jacobian.release(names)
        return Step({name: gradients[name] for name in jacobian.shapes}, None)

    def _groups_of(self, shapes: Mapping[str, torch.Size]) -> list[tuple[Sequence[str], float]]:
        """The groups of a Jacobian's parameters, and the greatest norm of each."""
        if isinstance(self.by, str):
            share = self.max_norm / math.sqrt(max(len(shapes), 1))
            return [([name], share) for name in shapes]
        groups = self._groups(self.by)
        counts = Counter(name for names, _ in groups for name in names)
        wrong = {
            "unknown": [name for name in counts if name not in shapes],
            "in several groups": [name for name, count in counts.items() if count > 1],
            "in none": [name for name in shapes if name not in counts],
        }
        found = "; ".join(f"{what}: {listed(names)}" for what, names in wrong.items() if names)
        if found:
            raise ValueError(
                f"The groups of Clip(by=...) do not name every trained parameter once. {found}.\n"
                f"What is in no group would not be shortened. The names are those of "
                f"model.named_parameters()."
            )
        return groups

    def _groups(
        self, by: Mapping[str, tuple[Sequence[str], float | None]]
    ) -> list[tuple[Sequence[str], float]]:
        share = self.max_norm / math.sqrt(len(by))
        return [(names, share if norm is None else norm) for names, norm in by.values()]

    def _shortening(self, norms: Tensor, norm: float) -> Tensor:
        if self.mode == "automatic":
            return norms.add(self.gamma).reciprocal_().mul_(norm)
        return norms.div(norm).clamp_(min=1).reciprocal_()  # 1 also for a norm of zero

    def extra_repr(self) -> str:
        told = f"max_norm={self.max_norm:g}, "
        if isinstance(self.by, str):
            told += f"by={self.by!r}, " if self.by != "all" else ""
        else:
            told += f"by={dict(self.by)!r}, "
        told += f"mode='automatic', gamma={self.gamma:g}, " if self.mode == "automatic" else ""
        return told + self._of_noise()


def _checked(by: str | Groups) -> str | dict[str, tuple[tuple[str, ...], float | None]]:
    """How gradients are grouped, with the names in tuples."""
    if isinstance(by, str):
        if by not in ("all", "parameter"):
            raise ValueError(
                f"by={by!r} is unknown; it is 'all', 'parameter', or a dict of "
                f"{{group: (names of parameters, greatest norm)}}."
            )
        return by
    found: dict[str, tuple[tuple[str, ...], float | None]] = {}
    for group, (names, norm) in by.items():
        bound = None if norm is None else number(positive(f"the norm of group {group!r}", norm))
        found[group] = (names,) if isinstance(names, str) else tuple(names), bound
    if not found:
        raise ValueError("by is an empty dict: there is no group to shorten. Pass by='all'.")
    return found
