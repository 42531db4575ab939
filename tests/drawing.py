"""How many examples a property test draws, in parts of what the profile says."""

from hypothesis import settings

__all__ = ["times"]


def times(factor: float) -> settings:
    """Fewer where each is dear or there is a test for every row of a table, more where neither."""
    return settings(max_examples=max(1, round(factor * settings.default.max_examples)))
