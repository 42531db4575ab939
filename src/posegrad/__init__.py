"""Exact gradients through groups of poses, without keeping their graphs."""

from posegrad.combination import (
    AttentionPooling,
    Best,
    Boltzmann,
    Combination,
    Max,
    Mean,
    Min,
    OnlineForm,
    Sum,
    TopK,
)
from posegrad.engine import Engine
from posegrad.errors import (
    ClosedEngineError,
    HigherOrderError,
    MissingExtraError,
    NonFinitePredictionError,
    NoPosesError,
    NotDifferentiableError,
    PerPoseLossError,
    PosegradError,
    ReentrantCheckpointError,
    ReplayError,
    ShapeMismatchError,
    StaleFactorError,
    StaleParametersError,
    UnsupportedModuleError,
    UntrackedTensorError,
)
from posegrad.jacobian import PoseJacobian
from posegrad.schedule._plan import Plan
from posegrad.schedule._session import Combined

__version__ = "0.1.0"

__all__ = [
    "AttentionPooling",
    "Best",
    "Boltzmann",
    "ClosedEngineError",
    "Combination",
    "Combined",
    "Engine",
    "HigherOrderError",
    "Max",
    "Mean",
    "Min",
    "MissingExtraError",
    "NoPosesError",
    "NonFinitePredictionError",
    "NotDifferentiableError",
    "OnlineForm",
    "PerPoseLossError",
    "Plan",
    "PoseJacobian",
    "PosegradError",
    "ReentrantCheckpointError",
    "ReplayError",
    "ShapeMismatchError",
    "StaleFactorError",
    "StaleParametersError",
    "Sum",
    "TopK",
    "UnsupportedModuleError",
    "UntrackedTensorError",
    "__version__",
]
