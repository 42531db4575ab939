"""Markdown tables from a suite's JSON: `python -m benchmarks.table benchmarks/results/….json`."""

from collections.abc import Callable
from typing import Any

from benchmarks.table import (
    bags,
    batches,
    forms,
    multipose,
    operator,
    ordinary,
    overhead,
    processes,
    rules,
    scaling,
)

__all__ = ["SUITES", "markdown"]

SUITES: dict[str, Callable[[dict[str, Any]], str]] = {
    "multipose": multipose.markdown,
    "docked": multipose.markdown,
    "gramian": batches.markdown,
    "rows": batches.markdown,
    "clipping": batches.markdown,
    "bags": bags.markdown,
    "scaling": scaling.markdown,
    "processes": processes.markdown,
    "overhead": overhead.markdown,
    "operator": operator.markdown,
    "forms": forms.markdown,
    "rules": rules.markdown,
    "ordinary": ordinary.markdown,
    "published": ordinary.markdown,
}


def markdown(result: dict[str, Any]) -> str:
    """All tables of a suite's result, with where they come from."""
    return SUITES[result["suite"]](result)
