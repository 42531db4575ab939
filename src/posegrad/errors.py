"""Every exception posegrad raises.

Each is a `PosegradError` and the built-in that fits, and each message says three things: what was
found (path, index, shape, value), why it cannot work, and what to do about it. None of them leaves
a changed `.grad`, a hook or a graph behind.
"""

from collections.abc import Sequence

__all__ = [
    "ClosedEngineError",
    "HigherOrderError",
    "MissingExtraError",
    "NoPosesError",
    "NonFiniteGradientError",
    "NonFinitePredictionError",
    "NotDifferentiableError",
    "PerPoseLossError",
    "PosegradError",
    "RankError",
    "ReentrantCheckpointError",
    "ReplayError",
    "ShapeMismatchError",
    "StaleFactorError",
    "StaleParametersError",
    "UnsupportedModuleError",
    "UntrackedTensorError",
    "listed",
]


def listed(found: Sequence[object]) -> str:
    """The first five of what was found, for a message, and how many more there are."""
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    return ", ".join(map(str, found[:5])) + more


class PosegradError(Exception):
    """Base of every exception of this library."""


class NoPosesError(PosegradError, ValueError):
    """A group without poses: nothing can be combined."""


class NonFinitePredictionError(PosegradError, FloatingPointError):
    """Some predictions are nan or infinite; so would be the combination and its gradient."""


class NonFiniteGradientError(PosegradError, FloatingPointError):
    """Gradients of some poses are nan or infinite, and a rule is asked to weigh them."""


class ShapeMismatchError(PosegradError, ValueError):
    """Predictions that do not fit the poses, each other, or the rule."""


class NotDifferentiableError(PosegradError, RuntimeError):
    """Predictions that carry no gradient: not floating point, or cut from every parameter."""


class PerPoseLossError(PosegradError, RuntimeError):
    """A loss of `per_pose` reached a schedule that kept only the combined gradient."""


class ReplayError(PosegradError, RuntimeError):
    """A pose scored again gave another prediction: its gradient would belong to another model."""


class StaleParametersError(PosegradError, RuntimeError):
    """A parameter changed between `combine` and `backward`."""


class StaleFactorError(PosegradError, RuntimeError):
    """A tensor the forward saved was changed in place before the Jacobian was used."""


class UntrackedTensorError(PosegradError, RuntimeError):
    """A tensor that requires grad is neither a parameter of the engine nor part of a pose."""


class RankError(PosegradError, RuntimeError):
    """Another process of the group failed or did not come, so this one cannot go on.

    Attributes:
        known_at: The step at which the other failed, after which it tells nothing more.
    """

    known_at: str | None = None


class ReentrantCheckpointError(PosegradError, RuntimeError):
    """Reentrant checkpointing inside the model: no path but plain `backward` can serve it."""


class HigherOrderError(PosegradError, RuntimeError):
    """A second derivative through a schedule that keeps no graph."""


class UnsupportedModuleError(PosegradError, TypeError):
    """A module the engine must not run: its gradients would be silently wrong."""


class ClosedEngineError(PosegradError, RuntimeError):
    """An engine used after `close()`."""


class MissingExtraError(PosegradError, ImportError):
    """An optional package is not installed; the message holds the exact pip line."""
