"""A drawn program: its text, its model, its engine, its steps; each step run, read, compared."""

import random
import warnings
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from posegrad import Engine
from posegrad.errors import PosegradError
from tests.fuzz.programs_drawn import Program, Step, Text
from tests.fuzz.programs_names import names
from tests.fuzz.programs_oracle import Rows, Tolerance, row_norms
from tests.fuzz.programs_readings import AFTER, READINGS, Comparison, Scene

__all__ = ["Failure", "Run", "Tally"]


@dataclass(frozen=True)
class Failure:
    """What went wrong, and where."""

    kind: str  # silent, crash, refused, disagreement, state
    seed: int
    step: int
    what: str

    def __str__(self) -> str:
        return f"seed {self.seed} step {self.step}: {self.kind}: {self.what}"


@dataclass
class Tally:
    """What was counted."""

    programs: int = 0
    comparisons: int = 0
    excused: int = 0
    slow: int = 0
    invalid: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        kinds = (
            ", ".join(f"{kind}: {n}" for kind, n in sorted(self.found.items()) if n) or "no failure"
        )
        return (
            f"{self.programs} programs, {self.comparisons} comparisons, {kinds}; "
            f"{self.excused} excused by conditioning, {self.slow} warned of mixing without cause, "
            f"{sum(self.invalid.values())} that torch itself refuses"
        )


class Run:
    """A program on one engine."""

    def __init__(self, program: Program, tally: Tally) -> None:
        self.program, self.tally = program, tally
        self.text = Text.of(program)
        self.code = compile(str(self.text), f"<program {program.seed}>", "exec")
        self.model = self.text.model()
        self.tolerance = Tolerance.of(self.text.draft.single)
        batch = {"auto": "auto", "none": None, "stated": self.text.batch}[program.batch_dim]
        if program.batch_dim == "stated" and batch is None:
            batch = "auto"
        check = "first" if self.text.draft.mixes and program.check == "never" else program.check
        self.engine = Engine(self.model, check=check, batch_dim=batch)
        self.failures: list[Failure] = []

    def all(self) -> list[Failure]:
        self.tally.programs += 1
        for number, step in enumerate(self.program.steps):
            try:
                output, stated = self.output(self.model, step)
            except Exception as error:
                self.tally.invalid[f"{type(error).__name__}: {str(error)[:90]}"] += 1
                break
            self.number = number
            self.step(step, output, stated)
            if self.failures:
                break
        return self.failures

    def output(
        self, model: nn.Module, step: Step, unit: float = 0.0
    ) -> tuple[Tensor, list[Tensor]]:
        """The output of a step; if there is a unit, of numbers that differ by about as much."""
        stated: list[Tensor] = []
        given = names(step.seed, step.magnitude, stated)
        exec(self.code, given)
        x = _data(step, self.program.width)
        if unit:
            x = x + unit * torch.where(x == 0, 1, x) * torch.randn(x.shape, dtype=x.dtype)
        model.train(step.training)
        self._freeze(model, step)
        torch.manual_seed(step.seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, of what the text does
            return given["program"](model, x), stated

    def _freeze(self, model: nn.Module, step: Step) -> None:
        r = random.Random(step.seed)
        for p in model.parameters():
            p.requires_grad_(r.random() >= step.frozen)

    def wanted(self, step: Step, model: nn.Module) -> dict[str, nn.Parameter]:
        r = random.Random(step.seed + 1)
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        return {n: p for n, p in trainable.items() if r.random() < step.only}

    def step(self, step: Step, output: Tensor, stated: list[Tensor]) -> None:
        wanted = self.wanted(step, self.model)
        if not wanted or not output.requires_grad or not output.numel():
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                expected = Rows.of(output, wanted)
            except Exception as error:
                self.tally.invalid[f"backward: {type(error).__name__}: {str(error)[:90]}"] += 1
                return
        if expected.unused == wanted.keys():
            return
        scene = Scene(expected, output.shape, wanted, step.seed, self.tolerance)
        asked: dict[str, Any] = {"retain_graph": step.keeps}
        if step.only < 1:
            asked["params"] = [*wanted] if step.by_name else [*wanted.values()]
        if step.stated and stated and self._is_true(stated[0]):
            asked["pose_index"] = stated if step.by_name else stated[0]
        before = _state(self.model)
        J = self._tried(step, lambda: self.engine.jacobian(output, **asked), "jacobian")
        self._pardon(step, scene)
        self._unchanged(before, "jacobian")
        if J is None:
            return
        for name in step.readings:
            self._compared(step, scene, name, lambda name=name: READINGS[name](scene, J))
            self._unchanged(before, name)
        whole = all(
            p.requires_grad is False or n in wanted for n, p in self.model.named_parameters()
        )
        for name in step.after if whole else ():
            self._compared(
                step, scene, name, lambda name=name: AFTER[name](scene, self.engine, output)
            )
            self._unchanged(before, name)

    def _is_true(self, owners: Tensor) -> bool:
        """Whether they can be stated: the output's poses are theirs, no other rows as many.

        Of an output `[k, m]` only if it is said that poses are second.
        """
        if self.text.batch != 0 and self.program.batch_dim != "stated":
            return False
        sizes = {n for p in self.model.parameters() for n in (*p.shape, p.numel())}
        return not self.text.draft.regroups and len(owners) not in sizes

    def _fail(self, kind: str, what: str) -> None:
        self.failures.append(Failure(kind, self.program.seed, self.number, what))
        self.tally.found[kind] += 1

    def _tried(self, step: Step, call: Callable[[], Any], what: str) -> Any:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                return call()
            except PosegradError as error:
                self._fail("refused", f"{what}: {type(error).__name__}: {str(error)[:160]}")
            except Exception as error:
                text = str(error).strip().splitlines() or [""]
                self._fail("crash", f"{what}: {type(error).__name__}: {text[0][:160]}")
            finally:
                self._warned(caught, what)
        return None

    def _warned(self, caught: Collection[warnings.WarningMessage], what: str) -> None:
        for one in caught:
            message = str(one.message)
            if message.startswith("The predictions of different poses depend"):
                self.tally.slow += not self.text.draft.mixes
            elif "do not add up" in message:
                single = self.text.draft.single
                self._fail(
                    "disagreement32" if single else "disagreement", f"{what}: {message[:160]}"
                )
            elif not message.startswith("Gradients are nan or infinite"):  # rows are compared
                self._fail("warning", f"{what}: {message[:160]}")

    def _compared(
        self, step: Step, scene: Scene, name: str, read: Callable[[], list[Comparison]]
    ) -> None:
        comparisons = self._tried(step, read, name) or []
        self._pardon(step, scene)
        self.tally.comparisons += len(comparisons)
        slack = scene.expected.slack(self.tolerance)
        failed = [one for one in comparisons if one.fails(slack)]
        if not failed:
            return
        moved = self._moved(step, scene)
        wider = {n: s + self.tolerance.times * moved[n] for n, s in slack.items()}
        still = [one for one in failed if one.fails(wider)]
        if still:
            self._fail("silent", still[0].worst(wider))
        else:
            self.tally.excused += 1

    def _pardon(self, step: Step, scene: Scene) -> None:
        """Drops a disagreement about gradients that are zero but for rounding."""
        if not self.failures or not self.failures[-1].kind.startswith("disagreement"):
            return
        if scene.expected.residue > 1e-3 * self.tolerance.own or self._is_rounding(step, scene):
            self.tally.found[self.failures.pop().kind] -= 1
            self.tally.excused += 1

    def _is_rounding(self, step: Step, scene: Scene) -> bool:
        """Whether some gradient is zero, or would be but for the last digits of the numbers."""
        moved, expected = self._moved(step, scene), scene.expected
        return any(
            bool(
                self.tolerance.times * moved[n].max() >= self.tolerance.own * row_norms(block).max()
            )
            for n, block in expected.blocks.items()
            if n not in expected.unused
        )

    def _moved(self, step: Step, scene: Scene) -> dict[str, Tensor]:
        """What a change of the last digits of all numbers does to the rows."""
        model, unit = self.text.model(), self.tolerance.unit
        moved = {n: torch.zeros(len(b)).double() for n, b in scene.expected.blocks.items()}
        for trial, factor in enumerate((3.0, 7.0, 1.0)):
            model.load_state_dict(self.model.state_dict())
            torch.manual_seed(trial)
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1 + unit * torch.randn_like(p))
            output, _ = self.output(model, step, unit)
            if output.shape != scene.shape:
                return {n: torch.full_like(s, torch.inf) for n, s in moved.items()}
            other = Rows.of(output, self.wanted(step, model), factor)
            for n, distance in scene.expected.distance(other).items():
                moved[n] = torch.maximum(moved[n], distance)
        return moved

    def _unchanged(self, before: object, what: str) -> None:
        if _state(self.model) != before:
            self._fail("state", f"{what} left something changed")


def _data(step: Step, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(step.seed)
    x = torch.randn(step.count, step.rows, width, generator=generator, dtype=torch.float64)
    if step.data == "twins":
        x[-1] = x[0]
    elif step.data == "one zero":
        x[0] = 0
    elif step.data == "all zero":
        x.zero_()
    elif step.data == "one small":
        x[-1] *= 1e-12
    elif step.data == "one large":
        x[0] *= 1e6
    return x


def _state(model: nn.Module) -> object:
    """All that a reading must leave alone."""
    parameters = [
        (p.requires_grad, p._version, p.grad is None, bool(p._backward_hooks))
        for p in model.parameters()
    ]
    return (
        parameters,
        [(b._version, b.sum().item()) for b in model.buffers()],
        [one.training for one in model.modules()],
        torch.get_rng_state().numpy().tobytes(),
        random.getstate()[1],
        torch.is_grad_enabled(),
    )
