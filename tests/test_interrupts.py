"""Ctrl-C at any point: `.grad`, hooks, flags, buffers and torch's own state are as before the call.

Each test makes one call again and again and raises KeyboardInterrupt at another point of it, at the
beginning of a function or of a line: of ours, of torch's context managers, of contextlib. Python
itself looks for signals where a function begins, a call returns and a loop starts over, which is
within those lines or before the next. A few points of each call are tried;
`POSEGRAD_PROFILE=soak` tries all.
"""

import contextlib
import os
import random
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import pytest
import torch
import torch.amp.autocast_mode
import torch.autograd.grad_mode
import torch.utils._device
from torch import Tensor, nn

import posegrad
from posegrad import Clip, Engine, Min
from posegrad._threads import thread_state
from tests.device import DEVICE
from tests.models import FEATURES
from tests.schedules import SCHEDULES

POINTS = None if os.environ.get("POSEGRAD_PROFILE") == "soak" else 12
WATCHED = [
    str(Path(posegrad.__file__).parent),
    torch.amp.autocast_mode.__file__,
    torch.autograd.grad_mode.__file__,
    torch.utils._device.__file__,
    contextlib.__file__,
]

pytestmark = pytest.mark.filterwarnings("ignore:The predictions of different poses depend")


class Doubled(torch.autograd.Function):
    """A function in Python, whose backward may write to `.grad` for all the engine knows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return 2 * cotangent


class Model(nn.Module):
    """Everything that has to be put back: random numbers, buffers, a hook, a frozen parameter."""

    def __init__(self, *, mixes: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, 5)
        self.norm = nn.BatchNorm1d(5) if mixes else nn.LayerNorm(5)
        self.dropout = nn.Dropout(0.3)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.head = nn.Linear(5, 1)
        self.register_buffer("count", torch.zeros(()))
        self.linear.weight.register_hook(lambda gradient: 3 * gradient)
        self.linear.weight.grad = torch.ones_like(self.linear.weight)

    def forward(self, poses: Tensor) -> Tensor:
        self.count += 1
        hidden = self.dropout(torch.tanh(self.norm(self.linear(poses))))
        return self.head(Doubled.apply(self.frozen(hidden))).squeeze(-1)


class Job(NamedTuple):
    """Calls of an engine, one after another.

    Args:
        calls: Those to be cut short; each is given what the one before returned.
        draws: Whether a call runs the model's forward.
        mixes: Whether the model has batch norm.
        warm: Whether the engine has seen such a batch before.
        casts: Whether it all is under autocast.
    """

    calls: list[Callable[[Engine, Any], Any]]
    draws: list[bool]
    mixes: bool = True
    warm: bool = False
    casts: bool = False


def _combined(schedule: str, **options: Any) -> Job:
    def combine(engine: Engine, poses: Tensor) -> Tensor:
        return engine.combine(poses, Min(2.0), schedule=schedule).prediction

    def backward(engine: Engine, prediction: Tensor) -> None:
        prediction.backward()

    return Job([combine, backward], [True, False], **options)


def _embedded(engine: Engine, poses: Tensor) -> Tensor:
    return engine.embed(poses)


def _contrasted(engine: Engine, embeddings: Tensor) -> None:
    embeddings.square().sum().backward()


def _output(engine: Engine, poses: Tensor) -> Tensor:
    (model,) = engine.modules
    return model(poses)


def _read(of_output: Callable[[Engine, Tensor], Any], **options: Any) -> Job:
    return Job([_output, of_output], [True, False], **options)


def _by_rows(engine: Engine, output: Tensor) -> None:
    engine.jacobian(output).backward(torch.arange(4.0))


def _clipped(engine: Engine, output: Tensor) -> None:
    engine.backward(output, Clip(0.5))


def _loss(engine: Engine, output: Tensor) -> Tensor:
    return engine.loss(output, Clip(0.5))


def _differentiated(engine: Engine, loss: Tensor) -> None:
    (2 * loss).backward()


def _gramian(engine: Engine, output: Tensor) -> None:
    engine.compute_gramian(output)
    output.sum().backward()


def _gathered(engine: Engine, poses: Tensor) -> None:
    engine.gather(poses).backward(torch.arange(4.0))


def _listening(engine: Engine, output: Tensor) -> None:
    with engine.listen(output):
        pass
    output.mean().backward()  # plain: cut short, one that is heard leaves `.grad` in part, too


JOBS = {
    **{f"combine, {name}": _combined(name) for name in SCHEDULES},
    "combine, stream, autocast": _combined("stream", casts=True),
    "combine, recompute, autocast": _combined("recompute", casts=True),
    "combine, recompute, again": _combined("recompute", warm=True),
    "loss": Job([_output, _loss, _differentiated], [True, False, False], mixes=False),
    "loss, poses mix, again": Job(
        [_output, _loss, _differentiated], [True, False, False], warm=True
    ),
    "jacobian, poses mix": _read(_by_rows),
    "jacobian, poses mix, again": _read(_by_rows, warm=True),
    "jacobian": _read(_by_rows, mixes=False),
    "jacobian, again": _read(_by_rows, mixes=False, warm=True),
    "jacobian, autocast": _read(_by_rows, mixes=False, casts=True),
    "J.backward(Clip)": _read(_clipped, mixes=False),
    "compute_gramian": _read(_gramian, mixes=False),
    "gather": Job([_gathered], [True]),
    "embed": Job([_embedded, _contrasted], [True, False]),
    "listen": _read(_listening, mixes=False),
    "listen, again": _read(_listening, mixes=False, warm=True),
    "listen, autocast": _read(_listening, mixes=False, casts=True),
}


class Cutter:
    """Raises KeyboardInterrupt at one point of what is called, or lists the places of all points.

    Args:
        at: The number of the point, from 1; 0 to list them.
    """

    def __init__(self, at: int) -> None:
        self.places: list[tuple[CodeType, int]] = []
        self._lists = at == 0
        self._left = at
        self._watched: dict[CodeType, bool] = {}

    def entered(self, frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        if code not in self._watched:
            self._watched[code] = any(code.co_filename.startswith(path) for path in WATCHED)
        if not self._watched[code]:
            return None
        self._step(frame)
        return self._went_on

    def _went_on(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            self._step(frame)
        return self._went_on

    def _step(self, frame: FrameType) -> None:
        if self._lists:
            self.places.append((frame.f_code, frame.f_lineno))
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt


def _made(job: Job) -> tuple[Engine, Tensor]:
    torch.manual_seed(0)
    engine = Engine(Model(mixes=job.mixes), chunk_size=2)
    poses = torch.randn(4, FEATURES)
    if job.warm:
        kept = engine.modules[0].linear.weight.grad
        _run(job, engine, poses, Cutter(0))
        engine.modules[0].zero_grad()
        engine.modules[0].linear.weight.grad = kept
    return engine, poses


def _run(job: Job, engine: Engine, poses: Tensor, cutter: Cutter) -> None:
    """Makes the calls; what an interrupted one leaves behind is as it found it."""
    found: Any = poses
    torch.manual_seed(1)
    with torch.autocast(DEVICE.type, torch.bfloat16) if job.casts else contextlib.nullcontext():
        for call, draws in zip(job.calls, job.draws, strict=True):
            before = _state(engine.modules[0], draws=draws)
            tracer = sys.gettrace()
            try:
                sys.settrace(cutter.entered)
                found = call(engine, found)
                sys.settrace(tracer)
            except KeyboardInterrupt:
                sys.settrace(tracer)
                assert _state(engine.modules[0], draws=draws) == before
                raise


def _gradients(model: nn.Module) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """Every `.grad`, and its value."""
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {name: (g, None if g is None else g.clone()) for name, g in grads.items()}


def _state(model: nn.Module, *, draws: bool) -> dict[str, object]:
    """What a call has to leave alone, less what running the forward draws and moves."""
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    state: dict[str, object] = {
        "hooks": {name: dict(p._backward_hooks or {}) for name, p in parameters.items()},
        "trained": [name for name, p in parameters.items() if p.requires_grad],
        "parameters": {name: id(p) for name, p in parameters.items()},
        "buffers": {name: id(buffer) for name, buffer in buffers.items()},
        "training": [module.training for module in model.modules()],
        "thread": thread_state(),
        "inference": torch.is_inference_mode_enabled(),
        "device": torch.get_default_device(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "warnings": list(warnings.filters),
    }
    if not draws:
        state["values"] = {name: buffer.tolist() for name, buffer in buffers.items()}
        state["random"] = torch.get_rng_state().tolist()
    return state


def _assert_none_or_all_added(
    model: nn.Module,
    before: dict[str, tuple[Tensor | None, Tensor | None]],
    expected: dict[str, Tensor],
) -> None:
    """No `.grad` is touched; or, right at the end, autograd has added to all of them."""
    for name, p in model.named_parameters():
        held, value = before[name]
        assert p.grad is held or held is None, name
        before[name] = p.grad, value
    added = [name for name, (held, value) in before.items() if not _same(held, value)]
    assert added in ([], list(expected))
    for name in added:
        held, value = before[name]
        torch.testing.assert_close(held, expected[name] + (0 if value is None else value))


def _same(first: Tensor | None, second: Tensor | None) -> bool:
    return first is second or (
        first is not None and second is not None and torch.equal(first, second)
    )


def _is_cut(job: Job, engine: Engine, poses: Tensor, cutter: Cutter) -> bool:
    """Makes the calls until they are cut short.

    Returns:
        Whether they were; also if Python threw the interrupt away, as it does where it happens
        while a generator is collected.
    """
    ignored: list[type | None] = []
    before, sys.unraisablehook = sys.unraisablehook, lambda found: ignored.append(found.exc_type)
    try:
        _run(job, engine, poses, cutter)
    except KeyboardInterrupt:
        return True
    finally:
        sys.unraisablehook = before
    return ignored == [KeyboardInterrupt]


def _deposited(job: Job, engine: Engine, poses: Tensor) -> dict[str, Tensor]:
    engine.modules[0].zero_grad()
    _run(job, engine, poses, Cutter(0))
    return {name: g for name, (g, _) in _gradients(engine.modules[0]).items() if g is not None}


def _picked(job: Job) -> list[int]:
    """The numbers of the points to cut a job at: all, or one at each of some places."""
    counter = Cutter(0)
    _run(job, *_made(job), counter)
    if POINTS is None:
        return list(range(1, len(counter.places) + 1))
    by_place: dict[tuple[CodeType, int], list[int]] = {}
    for number, place in enumerate(counter.places, start=1):
        by_place.setdefault(place, []).append(number)
    draw = random.Random(0)
    return [draw.choice(numbers) for numbers in draw.sample(list(by_place.values()), POINTS)]


@pytest.mark.parametrize("name", JOBS)
def test_an_interrupt_leaves_everything_as_it_was(name: str) -> None:
    job = JOBS[name]
    expected = _deposited(job, *_made(job))
    for at in _picked(job):
        engine, poses = _made(job)
        before = _gradients(engine.modules[0])
        assert _is_cut(job, engine, poses, Cutter(at)), at
        _assert_none_or_all_added(engine.modules[0], before, expected)
        found = _deposited(job, engine, poses)  # by the same engine
        torch.testing.assert_close(found, expected)
