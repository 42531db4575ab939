"""Plain records, of which a step makes dozens."""

from dataclasses import dataclass
from typing import TypeVar, dataclass_transform

__all__ = ["record"]

C = TypeVar("C", bound=type)


@dataclass_transform(frozen_default=True, eq_default=False)
def record(cls: C) -> C:
    """A dataclass that is frozen to the type checker alone, and equal to nothing but itself.

    Its fields are set once and never again; a check of that at run time takes longer than all else
    that is done to make one.
    """
    return dataclass(eq=False)(cls)  # type: ignore[return-value]
