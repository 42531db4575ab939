"""The modes, and what becomes of every way in them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from posegrad import ReentrantCheckpointError
from tests.device import DEVICE
from tests.modes.run import FEATURES, Mode, mlp
from tests.modes.ways import JACOBIAN, WAYS

__all__ = ["MODES", "REFUSED", "Refused"]


@dataclass(frozen=True)
class Refused:
    """An error by name.

    Args:
        error: Its class.
        match: What it says.
        instead: What to do, for the page.
    """

    error: type[Exception]
    match: str
    instead: str


class Checkpointed(nn.Module):
    """Half of it runs again in backward, dropout too."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(FEATURES, 8), nn.Dropout(0.3), nn.Tanh())
        self.head = nn.Linear(8, 1)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()  # or a reentrant one would not be differentiated
        return self.head(checkpoint(self.body, x, use_reentrant=self.reentrant))


def _with_dropout() -> nn.Module:
    return nn.Sequential(
        nn.Linear(FEATURES, 8), nn.Dropout(0.3), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 1)
    )


def _partly(backend: str) -> nn.Module:
    body = torch.compile(nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh()), backend=backend)
    return nn.Sequential(body, nn.Linear(8, 1))


def _compiled_inside(backend: str) -> nn.Module:
    """By the method, which compiles a module in its place."""
    model = mlp()
    model[0].compile(backend=backend)
    return model


def _autocast(dtype: torch.dtype) -> Callable[[], Any]:
    return partial(torch.autocast, DEVICE.type, dtype=dtype)


BACKENDS = ("eager", "aot_eager")
_BF16, _FP16 = _autocast(torch.bfloat16), _autocast(torch.float16)
_SCALE = 2.0**10

MODES: dict[str, Mode] = {
    "autocast to bfloat16": Mode(
        "around forward and backward",
        dtype=torch.float32,
        around=_BF16,
        digits=torch.bfloat16,
    ),
    "autocast to bfloat16, forward only": Mode(
        "as PyTorch recommends", dtype=torch.float32, forward=_BF16, digits=torch.bfloat16
    ),
    "autocast to float16, GradScaler": Mode(
        "around forward and backward",
        dtype=torch.float32,
        around=_FP16,
        scale=_SCALE,
        digits=torch.float16,
    ),
    "autocast to float16, GradScaler, forward only": Mode(
        "as PyTorch recommends",
        dtype=torch.float32,
        forward=_FP16,
        scale=_SCALE,
        digits=torch.float16,
    ),
    "parameters in bfloat16": Mode("", dtype=torch.bfloat16, digits=torch.bfloat16),
    "GradScaler": Mode("in float64", scale=_SCALE),
    "checkpoint": Mode(
        "`use_reentrant=False`, dropout inside",
        make={"": partial(Checkpointed, reentrant=False)},
    ),
    "checkpoint, reentrant": Mode(
        "`use_reentrant=True`", make={"": partial(Checkpointed, reentrant=True)}
    ),
    "save_on_cpu": Mode(
        "around the forward only, dropout", make={"": _with_dropout}, forward=save_on_cpu
    ),
    "torch.compile of the model": Mode(
        "",
        make={b: lambda b=b: torch.compile(_with_dropout(), backend=b) for b in BACKENDS}
        | {"dynamic": lambda: torch.compile(mlp(), backend="aot_eager", dynamic=True)},
        dynamic=True,
    ),
    "torch.compile of a submodule": Mode(
        "`torch.compile(part)` and `part.compile()`",
        make={b: partial(_partly, b) for b in BACKENDS}
        | {f"{b}, in place": partial(_compiled_inside, b) for b in BACKENDS},
        dynamic=True,
    ),
    "torch.compile of the rule": Mode("", rule=partial(torch.compile, backend="eager")),
}

_EARLY = Refused(
    ValueError,
    "float16 gradients would underflow",
    'Use `schedule="recompute"` or `"auto"`, or bfloat16: these two differentiate before the '
    "loss is scaled.",
)
_REENTRANT = Refused(
    ReentrantCheckpointError,
    r"use_reentrant=True.*\n?.*Use use_reentrant=False",
    "Checkpoint with `use_reentrant=False`: a reentrant checkpoint works under a plain "
    '`backward()` only. Of the schedules `"retain"` takes it.',
)

# (mode, way): what is raised. Everything else is exact.
REFUSED: dict[tuple[str, str], Refused] = {
    **{
        (mode, schedule): _EARLY
        for mode in MODES
        for schedule in ("store", "stream")
        if "float16," in mode and "bfloat16" not in mode
    },
    **{
        ("checkpoint, reentrant", way): _REENTRANT
        for way in ("store", "stream", "recompute", "auto", "embed", *JACOBIAN)
    },
}

assert all(mode in MODES and way in WAYS for mode, way in REFUSED)
