"""One training step on `m` docked poses as one group: every scheme side by side.

Time: all methods in one process, round after round in changing order, so that a slow minute hits
all of them; what counts is the ratio to plain autograd within a round. Memory: a fresh process for
each case. Gradients: against plain autograd in float64, in the same run.

The limit is what no exact scheme can avoid: one forward for each pose and one backward for each
pose whose weight is not zero, both measured here.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.exact import gradients, largest_difference
from benchmarks.methods import JOINED, METHODS, RULES, SIDE_BY_SIDE, TARGET, Bound
from benchmarks.models import MODELS
from benchmarks.peers import plain
from benchmarks.rounds import seconds, shuffled
from benchmarks.settings import Memory, Row, Settings
from examples.docked_poses._require import DEMO, require
from examples.docked_poses.precision import double_precision

__all__ = ["DOCKED", "MEMORY", "NAMES", "run", "run_docked"]

LIMIT = "limit"

ENDS = ("Min(1000)", "Mean")
"""Nearly all weights are zero; none is. What lies between them is run where it takes minutes."""

MEMORY = Memory(
    "benchmarks.multipose_memory",
    ("model", "method", "rule", "poses"),
    of=lambda row: row["rule"] in ENDS,
)


NAMES = tuple(name for name, model in MODELS.items() if not model.joined)
"""The models of the suite `multipose`."""

DOCKED = ("SchNet", "SchNet, joined")
"""The models of the suite `docked`."""


def run(models: Sequence[str], settings: Settings) -> dict[str, Any]:
    """Run the suite.

    Args:
        models: Names out of `NAMES`.
        settings: How.

    Returns:
        What goes into the JSON file.
    """
    if "PIGNet2" in models:
        require("pignet2", install=DEMO)
    cases = [_Case(name, m, _rules(name)) for name in models for m in MODELS[name].sizes]
    return _run("multipose", cases, settings)


def run_docked(models: Sequence[str], settings: Settings) -> dict[str, Any]:
    """Run the suite `docked`: 64 poses as a list and as a batch, default options beside peers.

    Args:
        models: Names out of `DOCKED`.
        settings: How.

    Returns:
        What goes into the JSON file.
    """
    cases = [_Case(name, 64, (*ENDS, "Boltzmann(kT)"), SIDE_BY_SIDE) for name in models]
    return _run("docked", cases, settings)


@dataclass(frozen=True)
class _Case:
    """A model, a number of poses, and what is run on them."""

    model: str
    poses: int
    rules: Sequence[str]
    methods: Sequence[str] = tuple(METHODS)


def _run(suite: str, cases: Sequence[_Case], settings: Settings) -> dict[str, Any]:
    settings.prepare()
    rows: list[Row] = []
    limits: list[Row] = []
    with tqdm(total=len(cases) * settings.rounds) as bar:
        for case in cases:
            name = case.model
            bar.set_description(f"{name}, {case.poses} poses")
            group = _Group(case, settings)
            timed, floors = group.time(settings.rounds, bar.update)
            rows += [{"model": name, **row} for row in timed]
            limits += [{"model": name, **floor} for floor in floors]
    texts = {case.model: MODELS[case.model].text for case in cases}
    return settings.result(suite, rows, limits=limits, models=texts)


def _rules(model: str) -> tuple[str, ...]:
    return tuple(RULES) if model == "SchNet" else ENDS


@dataclass(frozen=True)
class _Method:
    network: nn.Module
    step: Bound


class _Group:
    """One model and one number of poses."""

    def __init__(self, case: _Case, settings: Settings) -> None:
        model = self.model = MODELS[case.model]
        self.rules = case.rules
        self.stopwatch, self.device = settings.stopwatch, settings.device
        self.network = model.make().to(self.device)
        self.poses = [model.to(p, self.device, torch.float32) for p in model.poses(case.poses)]
        self.group = model.group(self.poses)
        # A copy for each method: nothing one of them hangs on its model slows another.
        copies = {name: copy.deepcopy(self.network) for name in case.methods}
        known = JOINED if model.joined else METHODS
        self.methods = {
            n: _Method(copies[n], known[n](copies[n], model.predict)) for n in case.methods
        }

    def time(self, rounds: int, tick: Callable[[], object]) -> tuple[list[Row], list[Row]]:
        """Timed rows and limits."""
        m = len(self.poses)
        floors = [_Floor(rule, m) for rule in self.rules]
        rows: dict[tuple[str, str], Row] = {
            (rule, name): {"poses": m, "rule": rule, "method": name, "seconds": []}
            for rule in self.rules
            for name in self.methods
        }
        for rule in self.rules:
            self._compare(rule, {name: rows[rule, name] for name in self.methods})
        for turn in range(rounds):
            for rule, floor in zip(self.rules, floors, strict=True):
                for name in shuffled([*self.methods, LIMIT], turn):
                    if name == LIMIT:
                        floor.add(*self._floor_times())
                    else:
                        rows[rule, name]["seconds"].append(self._seconds(name, rule))
            tick()
        return list(rows.values()), [floor.row() for floor in floors]

    def _seconds(self, name: str, rule: str) -> float:
        method, combine = self.methods[name], RULES[rule]()
        method.network.zero_grad()
        return seconds(partial(method.step, self.group, combine, TARGET), self.stopwatch)

    def _compare(self, rule: str, rows: Mapping[str, Row]) -> None:
        """Largest relative difference of each method's gradient from float64; warms all up."""
        exact = self._reference(rule)
        for name, method in self.methods.items():
            method.network.zero_grad()
            method.step(self.group, RULES[rule](), TARGET)
            rows[name]["gradient_error"] = largest_difference(gradients(method.network), exact)

    def _reference(self, rule: str) -> dict[str, Tensor]:
        exact = copy.deepcopy(self.network).double()
        exact.zero_grad()
        poses = [
            self._single(self.model.to(pose, self.device, torch.float64)) for pose in self.poses
        ]
        with double_precision():
            plain(exact, self.model.predict, poses, RULES[rule](), TARGET)
        return gradients(exact)

    def _floor_times(self) -> tuple[float, list[float], Tensor]:
        """Seconds of the forwards without graph, of each backward, and the predictions `[m]`."""
        predictions: list[Tensor] = []
        with torch.no_grad():
            forwards = self.stopwatch(lambda: predictions.extend(map(self._score, self.poses)))

        self.network.zero_grad()
        backwards = [self.stopwatch(self._score(pose).backward) for pose in self.poses]
        self.network.zero_grad()
        return forwards, backwards, torch.stack(predictions)

    def _score(self, pose: Any) -> Tensor:
        return self.model.predict(self.network, self._single(pose)).squeeze()

    def _single(self, pose: Any) -> Any:
        """A pose as the model takes it."""
        return self.model.group([pose]) if self.model.joined else pose


class _Floor:
    """The limit of one rule: `m` forwards, and the backwards of poses with nonzero weight."""

    def __init__(self, rule: str, m: int) -> None:
        self.rule, self.m, self.needed = rule, m, 0
        self.forwards: list[float] = []
        self.limit: list[float] = []

    def add(self, forwards: float, backwards: list[float], predictions: Tensor) -> None:
        needed = RULES[self.rule]().weights(predictions).ne(0).tolist()  # [m]
        self.needed = sum(needed)
        self.forwards.append(forwards)
        self.limit.append(forwards + sum(b for b, n in zip(backwards, needed, strict=True) if n))

    def row(self) -> Row:
        return {
            "poses": self.m,
            "rule": self.rule,
            "backwards_needed": self.needed,
            "forwards_seconds": self.forwards,
            "limit_seconds": self.limit,
        }
