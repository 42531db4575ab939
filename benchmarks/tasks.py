"""What is asked of one batch, and the ways to it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec

from torch import nn

from benchmarks.backpack_ways import backpack_rows
from benchmarks.exact import Exact, largest_difference
from benchmarks.opacus_ways import (
    clipped_flat,
    clipped_ghost,
    expanded,
    functorch,
    hooked,
    opacus_rows,
    packed,
)
from benchmarks.per_pose import (
    Bind,
    Found,
    Step,
    autograd_rows,
    joined,
    of_rows,
    plain,
    plain_step,
    posegrad,
    posegrad_clipped,
    posegrad_matrix,
    posegrad_rows,
    vmap_rows,
)
from benchmarks.settings import Row
from benchmarks.torchjd_ways import autojac_rows, torchjd

__all__ = ["REQUIREMENTS", "TASKS", "Method", "Task", "missing"]


@dataclass(frozen=True)
class Method:
    """A way of doing a task.

    Attributes:
        bind: Makes its step for a network, which nothing else may use.
        package: What it needs beside torch and posegrad.
        unfit: Why it is not run on a kind of case.
    """

    bind: Bind
    package: str | None = None
    unfit: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """Something to find for one batch.

    Attributes:
        text: What, in words.
        errors: How far what was found is from what is exact.
        ways: How.
        unit: What their time is divided by.
    """

    text: str
    errors: Callable[[Found, Exact], Row]
    ways: Mapping[str, Method]
    unit: Bind = plain


def _products(found: Found, exact: Exact) -> Row:
    gramian, gradient = found
    assert gramian is not None
    return {
        "gramian_error": float((gramian - exact.gramian).norm() / exact.gramian.norm()),
        "gradient_error": largest_difference(packed(gradient, 0), exact.gradient),
    }


def _rows(found: Found, exact: Exact) -> Row:
    flat = {name: rows.flatten(1) for name, rows in packed(found[1], 1).items()}
    return {"rows_error": largest_difference(flat, exact.rows)}


def _clipped(found: Found, exact: Exact) -> Row:
    return {"gradient_error": largest_difference(packed(found[1], 0), exact.clipped)}


_ONE_SIZE = {"ragged": "poses differ in size"}
_ONE_ROW = {"ragged": "a row an atom, not a pose"}
_NO_BATCH = {"ragged": "no dimension counts poses"}
_LOOP = dict.fromkeys(("mlp", "convolutions", "encoder", "large"), "not run: m backwards")
_SLOW = {"large": "not run: minutes a call"}
_NO_GROUP_NORM = _ONE_ROW | {"convolutions": "no GroupNorm"}
_NO_LAYER_NORM = dict.fromkeys(("encoder", "large"), "no LayerNorm")

_ROWS: dict[str, Method] = {
    "vmap(grad)": Method(vmap_rows, None, _ONE_SIZE),
    "Opacus hooks": Method(partial(opacus_rows, hooked), "opacus", _ONE_ROW),
    "Opacus functorch": Method(partial(opacus_rows, functorch), "opacus", _ONE_ROW),
    "expanded weights": Method(partial(opacus_rows, expanded), "opacus", _ONE_ROW),
    "BackPACK": Method(backpack_rows, "backpack", _NO_GROUP_NORM | _NO_LAYER_NORM),
    "TorchJD autojac": Method(autojac_rows, "torchjd"),
    "rows by autograd.grad": Method(autograd_rows, None, _LOOP),
}


def _of(then: Callable[[Bind, nn.Module], Step], *names: str) -> dict[str, Method]:
    """Ways that begin with rows."""
    found = {name: _ROWS[name] for name in names or _ROWS}
    return {n: Method(partial(then, way.bind), way.package, way.unfit) for n, way in found.items()}


TASKS: dict[str, Task] = {
    "gramian": Task(
        "Forward, Gramian of the per-pose gradients, weighted gradient",
        _products,
        {
            "posegrad": Method(posegrad),
            "TorchJD, batch_dim=0": Method(partial(torchjd, 0), "torchjd", _NO_BATCH),
            "TorchJD, batch_dim=None": Method(partial(torchjd, None), "torchjd", _SLOW),
            **_of(
                of_rows, "TorchJD autojac", "vmap(grad)", "Opacus hooks", "rows by autograd.grad"
            ),
        },
    ),
    "rows": Task(
        "Forward, all per-pose gradients, a tensor for each parameter",
        _rows,
        {"posegrad": Method(posegrad_rows), **_ROWS},
    ),
    "matrix": Task(
        "Forward, all per-pose gradients in one matrix",
        _rows,
        {"posegrad": Method(posegrad_matrix), **_of(joined)},
    ),
    "clipping": Task(
        "Forward, the sum of the per-pose gradients, each clipped, in .grad; the unit is a plain "
        "step that leaves its own there",
        _clipped,
        {
            "posegrad": Method(posegrad_clipped),
            "Opacus, ghost clipping": Method(clipped_ghost, "opacus", _ONE_ROW),
            "Opacus, flat clipping": Method(clipped_flat, "opacus", _ONE_ROW),
        },
        plain_step,
    ),
}

REQUIREMENTS = {
    "torchjd": "torchjd>=0.18",
    "opacus": "opacus>=1.6",
    "backpack": "backpack-for-pytorch>=1.7",
}


def missing(requirements: Mapping[str, str] = REQUIREMENTS) -> dict[str, str]:
    """The peers that are not installed, and the command that does."""
    return {
        package: f"pip install '{requirement}'"
        for package, requirement in requirements.items()
        if find_spec(package) is None
    }
