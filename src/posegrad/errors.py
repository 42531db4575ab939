"""Every exception posegrad raises.

Each is a `PosegradError` and the built-in that fits, and each message says three things: what was
found (path, index, shape, value), why it cannot work, and what to do about it. None of them leaves
a changed `.grad`, a hook or a graph behind.
"""

from collections.abc import Sequence
from typing import final

__all__ = [
    "CotangentBypassError",
    "HigherOrderError",
    "IllConditionedError",
    "ListeningError",
    "MissingExtraError",
    "NoPosesError",
    "NonFiniteGradientError",
    "NonFinitePredictionError",
    "NotDifferentiableError",
    "PerPoseLossError",
    "PosegradError",
    "PosesError",
    "PosesMixError",
    "RankError",
    "ReentrantCheckpointError",
    "ReplayError",
    "ShapeMismatchError",
    "StaleFactorError",
    "StaleParametersError",
    "UnsupportedModuleError",
    "UntrackedTensorError",
    "described",
    "listed",
]


def described(found: object) -> str:
    """Something of the wrong kind, for a message: its type, and the length of a sequence."""
    kind = type(found).__name__
    return f"a {kind} of {len(found)}" if isinstance(found, tuple | list) else f"a {kind}"


def listed(found: Sequence[object]) -> str:
    """The first five of what was found, for a message, and how many more there are."""
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    return ", ".join(map(str, found[:5])) + more


class PosegradError(Exception):
    """Base of every exception of this library.

    Never raised itself.
    """


@final
class NoPosesError(PosegradError, ValueError):
    """A group without poses: nothing can be combined.

    Raised by `Engine.combine`, `Engine.plan`, `Engine.gather` and `Engine.jacobian` for an empty
    iterable of poses, an empty group, an empty output.
    """


@final
class PosesError(PosegradError, TypeError):
    """Poses that come as one object that is no batch of them.

    Raised by `Engine.combine`, `Engine.gather` and `Engine.plan` for a container whose tensors do
    not have the same dimension 0, or that holds what cannot be sliced, and for a single graph of
    PyTorch Geometric.
    """


@final
class PosesMixError(PosegradError, RuntimeError):
    """The prediction of a pose depends on the poses that are scored together with it.

    Raised by `Engine.combine` and `Engine.gather` for a batch that the engine itself divides,
    without `chunk_size`; names the modules in front of which poses mix. Raised by rules with noise,
    whose noise would then hide no pose; names the parameters.
    """


@final
class NonFinitePredictionError(PosegradError, FloatingPointError):
    """Some predictions are nan or infinite; so would be the combination and its gradient.

    Raised by `Engine.combine`, and where a combination rule weighs the rows of a Jacobian; names
    the poses.
    """


@final
class NonFiniteGradientError(PosegradError, FloatingPointError):
    """Gradients of some poses are nan or infinite, and a rule is asked to weigh them.

    Raised by `Engine.backward` and `Jacobian.backward` for a rule that looks at gradients,
    without `scaler=`; also if the rule's own weights are not finite. Names the rows.
    """


@final
class IllConditionedError(PosegradError, ArithmeticError):
    """A system of equations with the Gramian that has no definite solution.

    Raised by `Jacobian.solve` if rows depend on each other, or nearly so, and the damping does not
    make up for it: the solution would be made of rounding errors.
    """


@final
class ShapeMismatchError(PosegradError, ValueError):
    """Predictions, weights or groups that do not fit the poses, each other, or the rule.

    Raised by `Engine.combine` and `Engine.gather` for predictions that are not one row per pose or
    not all of one shape, and for `groups` of another number of poses; by products with a Jacobian
    for weights that are not of its output's shape; for what a rule returns, if that is not of the
    shape that its base class asks for.
    """


@final
class NotDifferentiableError(PosegradError, RuntimeError):
    """Predictions that carry no gradient: not floating point, or cut from every parameter.

    Raised by `Engine.combine` (under `recompute` the latter in backward), `Engine.gather` and
    `Engine.jacobian`.
    """


@final
class PerPoseLossError(PosegradError, RuntimeError):
    """A loss of `per_pose` reached a schedule that kept only the combined gradient.

    Raised in backward, under `stream`; names the schedules that serve such a loss.
    """


@final
class ReplayError(PosegradError, RuntimeError):
    """A pose scored again gave another prediction: its gradient would belong to another model.

    Raised in backward, under `recompute`, if the two predictions differ in any bit on a CPU, or by
    more than 64 units of rounding elsewhere, or if the pose was changed in place. Raised in combine
    if a buffer was changed in a way that a replay cannot repeat.
    """


@final
class StaleParametersError(PosegradError, RuntimeError):
    """A parameter changed between `combine`, or `Engine.loss`, and `backward`.

    Raised in backward, which compares the versions that autograd counts; names the parameters.
    """


@final
class StaleFactorError(PosegradError, RuntimeError):
    """A tensor the forward saved was changed in place before the Jacobian was used.

    Raised by `Engine.jacobian`, `Engine.gather` and every product with a Jacobian.
    """


@final
class UntrackedTensorError(PosegradError, RuntimeError):
    """A tensor that requires grad is neither a parameter of the engine nor part of a pose.

    Raised by `Engine.combine`, because its gradient would be lost. Raised by `Engine.loss` with
    `outside="error"`; and for rules with noise, because its gradient would get no noise.
    """


@final
class RankError(PosegradError, RuntimeError):
    """Another process of the group failed or did not come, so this one cannot go on.

    Raised by every call that ranks make together, and in its backward; names the ranks.

    Attributes:
        known_at: The step at which the other process failed. That process is past it, so no rank
            exchanges anything for it again.
    """

    known_at: str | None = None


@final
class ReentrantCheckpointError(PosegradError, RuntimeError):
    """Reentrant checkpointing inside the model: no path but plain `backward` can serve it.

    Raised by `Engine.combine`, `Engine.gather` and `Engine.jacobian`, for any function whose
    backward deposits gradients by itself.
    """


@final
class ListeningError(PosegradError, RuntimeError):
    """Rows that cannot be read from a backward that somebody else runs.

    Raised by `Engine.listen` for an output whose rows do not follow from one backward, or only with
    saved tensors that a checkpoint hands out once; by `Listening.jacobian` if there was no backward
    since, or only part of one.
    """


@final
class CotangentBypassError(PosegradError, RuntimeError):
    """Gradients reached the parameters past the output that is listened to.

    Raised by `Listening.jacobian`; names the operator at which an auxiliary loss, or a hook that
    changes gradients, came in. The backward itself was not disturbed.
    """


@final
class HigherOrderError(PosegradError, RuntimeError):
    """A second derivative through a schedule that keeps no graph.

    Raised in the second backward, except under `retain`; for `Engine.loss` in a backward with
    `create_graph=True`.
    """


@final
class UnsupportedModuleError(PosegradError, TypeError):
    """A module the engine must not run: its gradients would be silently wrong.

    Raised when an engine is made (one module inside another, parts wrapped by DDP, FSDP1), in
    `Engine.combine` and `Engine.jacobian` (lazy or complex parameters, a compiled graph that can be
    used only once), and for rules that cannot work on such a model.
    """


@final
class MissingExtraError(PosegradError, ImportError):
    """An optional package is not installed; the message holds the exact pip line.

    Raised by what needs the package: the strategies of `posegrad.testing`, the import of
    `posegrad.interop.torchjd`. `import posegrad` never raises it.
    """
