"""Two traces, held against each other: what must agree, what the limits allow to differ."""

from collections.abc import Iterator

import torch
from torch import Tensor

from posegrad import PosegradError, StaleParametersError
from tests.fuzz.calls_draw import Call, Case
from tests.fuzz.calls_run import Snapshot

__all__ = ["Verdict", "judged"]


class Verdict:
    """What came of a case: "same", "refused", "void", "silent" or "crash", and why."""

    def __init__(self, kind: str, why: str = "", compared: int = 0, calls: int = 0) -> None:
        self.kind, self.why, self.compared, self.calls = kind, why, compared, calls

    def __str__(self) -> str:
        return f"{self.kind}: {self.why}"


def judged(case: Case, plain: list[Snapshot], tested: list[Snapshot]) -> Verdict:
    """Compares the traces action by action, up to the first difference or error."""
    compared = calls = 0
    for number, (expected, found) in enumerate(zip(plain, tested, strict=False)):
        calls += found.label.startswith("combine")
        if found.error is not None or expected.error is not None:
            return _raised(case, plain, tested, number, compared, calls)
        if expected.label != found.label:
            return Verdict("silent", f"{found.label} instead of {expected.label}", compared, calls)
        for difference in _differences(case, expected, found):
            compared += 1
            if difference:
                where = f"step {found.step}, {found.label}: {difference}"
                return Verdict("silent", where, compared, calls)
    return Verdict("same", "", compared, calls)


def _raised(
    case: Case,
    plain: list[Snapshot],
    tested: list[Snapshot],
    number: int,
    compared: int,
    calls: int,
) -> Verdict:
    expected, found = plain[number], tested[number]
    if found.error is None and case.script[found.step].kind == "stale":
        retained = case.script[found.step].calls[0].schedule == "retain"
        kind = "void" if retained else "silent"
        return Verdict(kind, "backward after parameters were changed", compared, calls)
    if expected.error is not None and not isinstance(found.error, StaleParametersError):
        return Verdict("void", f"plain autograd: {_one_line(expected.error)}", compared, calls)
    error = found.error
    assert error is not None
    name = type(error).__name__
    where = f"step {found.step}, {found.label}: {_one_line(error)}"
    if not _allowed(case, found, error):
        return Verdict("crash", where, compared, calls)
    if spoilt := _spoilt(tested[number - 1] if number else None, found):
        return Verdict("silent", f"after {where}: {spoilt}", compared, calls)
    return Verdict("refused", name, compared, calls)


def _allowed(case: Case, found: Snapshot, error: Exception) -> bool:
    """Whether docs/limits.md says so."""
    calls = case.script[found.step].calls
    schedules = {call.schedule for call in calls}
    name = type(error).__name__
    if name == "ReplayError":
        return case.foreign and bool(schedules & {"recompute", "auto"})
    if name == "StaleParametersError":
        return found.changed
    if name == "PerPoseLossError":
        return any(_streams(c) and c.loss[0] != "prediction" for c in calls)
    if name == "ValueError":
        return "cannot stream" in str(error) and "stream" in schedules
    if name == "NonFinitePredictionError":
        return False
    return isinstance(error, PosegradError) and name == "NotDifferentiableError" and not found.exact


def _streams(call: Call) -> bool:
    return call.schedule in ("stream", "auto") and call.rule[0] in (
        "Min", "Max", "Boltzmann", "Mean", "Sum",
    )  # fmt: skip


def _spoilt(before: Snapshot | None, after: Snapshot) -> str:
    """What a refusal in backward changed though it must not."""
    if before is None or not before.label.startswith(("combine", "between")):
        return ""
    if after.label == "pair raised":
        return ""  # autograd may have been through the other call already
    for name, old in before.gradients.items():
        if name.startswith("rule"):
            continue  # autograd hands a rule its gradient before the poses are asked for theirs
        new = after.gradients.get(name)
        if (old is None) != (new is None) or (old is not None and not torch.equal(old, new)):
            return f".grad of {name} changed"
    for name, buffer in before.buffers.items():
        if not torch.equal(buffer, after.buffers[name]) or not after.identity[name]:
            return f"buffer {name} changed"
    flags = ("torch's random state", "hooks of modules", "fast path")
    return next((f"{f} changed" for f in flags if before.exact[f] != after.exact[f]), "")


def _differences(case: Case, expected: Snapshot, found: Snapshot) -> Iterator[str]:
    """For each thing compared what is wrong with it, or an empty string."""
    for name, value in expected.exact.items():
        other = found.exact[name]
        yield "" if value == other else f"{name}: {_short(other)} instead of {_short(value)}"
    for name, tensor in expected.close.items():
        yield _distance(case, name, found.close[name], tensor, *_ease(case))
    yield from _buffers(case, expected, found)
    yield from _gradients(case, expected, found)
    yield from _hooks(case, expected, found)
    yield _forwards(case, expected, found)


def _buffers(case: Case, expected: Snapshot, found: Snapshot) -> Iterator[str]:
    for name, value in expected.buffers.items():
        if name not in found.buffers:
            yield f"buffer {name} is gone"
            continue
        yield _distance(case, f"buffer {name}", found.buffers[name], value, *_ease(case))
        kept = found.identity[name]
        yield "" if kept == expected.identity[name] else f"buffer {name}: another tensor"


def _gradients(case: Case, expected: Snapshot, found: Snapshot) -> Iterator[str]:
    # Poses that count may be scored again without the others of their chunk, which then get none.
    schedules = {call.schedule for step in case.script for call in step.calls}
    picks = schedules & {"recompute", "auto"}
    for name, value in expected.gradients.items():
        other = found.gradients[name]
        if value is None or other is None:
            yield _absence(name, value, other, bool(picks) or name in expected.optional)
        else:
            scale = _scale(case, expected.scales, name.removeprefix("slope of "))
            yield _distance(case, f".grad of {name}", other, value, scale)


def _absence(name: str, value: Tensor | None, other: Tensor | None, optional: bool) -> str:
    if value is None and other is None:
        return ""
    if value is None:
        return f".grad of {name} is there, though plain autograd has none"
    if optional and float(value.abs().max()) < 1e-20:
        return ""
    return f".grad of {name} is None instead of up to {float(value.abs().max()):.3g}"


def _hooks(case: Case, expected: Snapshot, found: Snapshot) -> Iterator[str]:
    for name in expected.log.keys() | found.log.keys():
        want, have = expected.log.get(name, []), found.log.get(name, [])
        if not have and name in expected.optional:
            yield ""
            continue
        if [kind for kind, _ in want] != [kind for kind, _ in have]:
            kinds = [kind for kind, _ in have], [kind for kind, _ in want]
            yield f"hooks of {name} ran as {kinds[0]} instead of {kinds[1]}"
            continue
        scale = _scale(case, expected.scales, name)
        for (kind, a), (_, b) in zip(have, want, strict=True):
            yield _distance(case, f"hook {kind} of {name}", _dense(a), _dense(b), scale)


def _forwards(case: Case, expected: Snapshot, found: Snapshot) -> str:
    schedules = {call.schedule for call in case.script[found.step].calls}
    if case.has("checkpoint") or (schedules & {"recompute", "auto"} and "b" in found.label[:1]):
        return ""
    if schedules & {"recompute", "auto"} and found.label == "grad":
        return ""
    same = expected.forwards == found.forwards
    return "" if same else f"{found.forwards} forwards instead of {expected.forwards}"


def _scale(case: Case, scales: dict[str, float], name: str) -> float:
    """The natural size of a gradient: that of the largest in the same module.

    Behind a norm that takes out a shift or a factor, a gradient may be zero but for rounding,
    whatever flows through it.
    """
    if case.has("batch norm", "group norm", "layer norm", "attention", "weight norm"):
        return 10 * max(scales.values(), default=0.0)
    own, _, _ = name.rpartition(".")
    siblings = [size for key, size in scales.items() if key.rpartition(".")[0] == own]
    return max([scales.get(name, 0.0), *(siblings if own else [])])


def _distance(
    case: Case, name: str, found: Tensor | None, value: Tensor | None, scale: float, ease: float = 1
) -> str:
    """Whether two tensors agree; `ease` is how much of the tolerance is left for values."""
    if found is None or value is None:
        return "" if found is value else f"{name} is missing"
    if found.shape != value.shape or found.dtype != value.dtype:
        return f"{name} is {found.dtype} {list(found.shape)}, not {value.dtype} {list(value.shape)}"
    if not value.numel() or torch.equal(found, value):
        return ""
    relative, natural = _tolerances(case)
    a, b = found.double(), value.double()
    bound = ease * relative * float(b.abs().max()) + natural * scale
    bound += 1e-300 if case.dtype == "float64" else 1e-36  # subnormal numbers have few digits
    error = float((a - b).abs().max())
    if error <= bound:
        return ""
    return f"{name} is off by {error:.3g} of {float(b.abs().max()):.3g} (allowed {bound:.2g})"


def _tolerances(case: Case) -> tuple[float, float]:
    if case.autocast:
        return 0.1, 0.05
    return (1e-9, 1e-12) if case.dtype == "float64" else (1e-3, 1e-5)


def _ease(case: Case) -> tuple[float, float]:
    """Values that no step has moved agree far better than gradients do."""
    return (1.0, 1.0) if case.steps else (0.0, 1e-3)


def _dense(tensor: Tensor) -> Tensor:
    return tensor.to_dense() if tensor.is_sparse else tensor


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) < 60 else text[:57] + "..."


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:150] if str(error) else ''}"
