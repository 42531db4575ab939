"""Plain records, of which each step makes dozens."""

from dataclasses import dataclass
from typing import TypeVar, dataclass_transform

__all__ = ["record"]

C = TypeVar("C", bound=type)


@dataclass_transform(frozen_default=True, eq_default=False)
def record(cls: C) -> C:
    """A dataclass that only type checkers see as frozen, and that equals only itself.

    Its fields are set once. Checking that at run time would take longer than making the record.
    """
    return dataclass(eq=False)(cls)  # type: ignore[return-value]
