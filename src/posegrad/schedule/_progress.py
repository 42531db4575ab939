"""The progress bar of a long call."""

from collections.abc import Callable
from importlib import import_module
from typing import Any, final

from posegrad.errors import MissingExtraError

__all__ = ["bar"]


@final
class _Bar:
    """Advances with every call, and closes after the last."""

    def __init__(self, shown: Any) -> None:
        self._shown = shown

    def __call__(self) -> None:
        self._shown.update()
        if self._shown.n >= self._shown.total:
            self._shown.close()


def bar(total: int, unit: str, *, shown: bool) -> Callable[[], None]:
    """A function to call after each of so many steps.

    Args:
        total: The number of steps.
        unit: What a step is.
        shown: Whether to show a bar.

    Raises:
        MissingExtraError: if a bar is to be shown and tqdm is not installed.
    """
    if not shown:
        return lambda: None
    try:
        tqdm = import_module("tqdm").tqdm
    except ImportError as error:
        raise MissingExtraError(
            "progress=True needs tqdm, which is not installed.\n"
            "Run: pip install 'posegrad[progress]'"
        ) from error
    return _Bar(tqdm(total=total, unit=unit))
