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
    NonFiniteGradientError,
    NonFinitePredictionError,
    NoPosesError,
    NotDifferentiableError,
    PerPoseLossError,
    PosegradError,
    PosesError,
    RankError,
    ReentrantCheckpointError,
    ReplayError,
    ShapeMismatchError,
    StaleFactorError,
    StaleParametersError,
    UnsupportedModuleError,
    UntrackedTensorError,
)
from posegrad.jacobian import PoseJacobian, SharedJacobian
from posegrad.multipose import MultiPose
from posegrad.schedule._chunks import Budget
from posegrad.schedule._plan import Plan, ReadingPlan
from posegrad.schedule._session import Combined
from posegrad.weighting import (
    Aggregation,
    Clip,
    Median,
    Projected,
    SignAgreement,
    TrimmedMean,
    Weighting,
)

__version__ = "0.1.0"

__all__ = [
    "Aggregation",
    "AttentionPooling",
    "Best",
    "Boltzmann",
    "Budget",
    "Clip",
    "ClosedEngineError",
    "Combination",
    "Combined",
    "Engine",
    "HigherOrderError",
    "Max",
    "Mean",
    "Median",
    "Min",
    "MissingExtraError",
    "MultiPose",
    "NoPosesError",
    "NonFiniteGradientError",
    "NonFinitePredictionError",
    "NotDifferentiableError",
    "OnlineForm",
    "PerPoseLossError",
    "Plan",
    "PoseJacobian",
    "PosegradError",
    "PosesError",
    "Projected",
    "RankError",
    "ReadingPlan",
    "ReentrantCheckpointError",
    "ReplayError",
    "ShapeMismatchError",
    "SharedJacobian",
    "SignAgreement",
    "StaleFactorError",
    "StaleParametersError",
    "Sum",
    "TopK",
    "TrimmedMean",
    "UnsupportedModuleError",
    "UntrackedTensorError",
    "Weighting",
    "__version__",
]
