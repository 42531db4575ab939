"""What the author of a rule or a model runs to check it; the project's own tests use the same."""

from posegrad.testing._gradient_rules import assert_aggregation, assert_weighting
from posegrad.testing._memory import PeakBytes, peak_live_bytes
from posegrad.testing._oracle import assert_matches_autograd
from posegrad.testing._rules import assert_combination
from posegrad.testing._strategies import poses, predictions, rules

__all__ = [
    "PeakBytes",
    "assert_aggregation",
    "assert_combination",
    "assert_matches_autograd",
    "assert_weighting",
    "peak_live_bytes",
    "poses",
    "predictions",
    "rules",
]
