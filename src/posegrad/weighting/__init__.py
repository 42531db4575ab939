"""Rules that look at gradients: from the Jacobian of a group to one gradient.

One rule per file; `_base.py` holds what a rule is, `_rules.py` what else may be passed as one.
"""

from posegrad.weighting._base import Aggregation, GradientRule, Step, Weighting
from posegrad.weighting.adaptive_clip import AdaptiveClip
from posegrad.weighting.clip import Clip
from posegrad.weighting.median import Median
from posegrad.weighting.projected import Projected
from posegrad.weighting.sign_agreement import SignAgreement
from posegrad.weighting.trimmed_mean import TrimmedMean

__all__ = [
    "AdaptiveClip",
    "Aggregation",
    "Clip",
    "GradientRule",
    "Median",
    "Projected",
    "SignAgreement",
    "Step",
    "TrimmedMean",
    "Weighting",
]
