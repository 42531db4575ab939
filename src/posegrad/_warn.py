"""Warnings that point at the user's line."""

import os
import sys
import warnings

__all__ = ["warn"]

_INSIDE = os.path.join(os.path.dirname(__file__), "")


def warn(message: str) -> None:
    """Warns whoever called the library, however deep inside it this is called."""
    level, frame = 2, sys._getframe(1)  # level 1 would be this function
    while frame.f_code.co_filename.startswith(_INSIDE) and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
