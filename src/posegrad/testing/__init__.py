"""What the author of a rule or a model runs to check it; the project's own tests use the same."""

from posegrad.testing._memory import PeakBytes, peak_live_bytes

__all__ = ["PeakBytes", "peak_live_bytes"]
