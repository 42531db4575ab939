"""Combination rules: predictions of a group of poses to one combined prediction.

One rule per file; `_base.py` holds what a rule is, `_online.py` how weights that separate stream.
"""

from posegrad.combination._base import Combination
from posegrad.combination._online import OnlineForm
from posegrad.combination.attention import AttentionPooling
from posegrad.combination.best import Best
from posegrad.combination.boltzmann import Boltzmann
from posegrad.combination.logsumexp import Max, Min
from posegrad.combination.mean import Mean
from posegrad.combination.sum import Sum
from posegrad.combination.topk import TopK

__all__ = [
    "AttentionPooling",
    "Best",
    "Boltzmann",
    "Combination",
    "Max",
    "Mean",
    "Min",
    "OnlineForm",
    "Sum",
    "TopK",
]
