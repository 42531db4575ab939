"""What one seed stands for: a model, poses, a rule, hooks and a script of calls, as plain data."""

import random
from dataclasses import dataclass, field, fields
from typing import Any

from tests.fuzz.calls_models import FOREIGN, MANY, ONCE, SEQUENCES, STAGES
from tests.schedules import SCHEDULES

WAYS = ("auto", *SCHEDULES)


@dataclass(frozen=True)
class Call:
    """One call of combine.

    Args:
        seed: Of its poses.
        poses: How many.
        rows: Of each pose, or of the smallest if they are ragged.
        form: What they are handed over as.
        grad: Which of their tensors require grad: "", "leaf" or "upstream".
        shared: Whether one tensor is in all poses.
        duplicates: Whether some poses come twice.
        chunk: Poses in a chunk, or a budget if negative.
        rule: Its name and its number.
        groups: "", "sizes" or "ids".
        schedule: As for the engine.
        loss: What it is a loss of, its kind and its size.
        engine: Which of two engines.
    """

    seed: int
    poses: int
    rows: int
    form: str
    grad: str
    shared: bool
    duplicates: bool
    chunk: int
    rule: tuple[str, float]
    groups: str
    schedule: str
    loss: tuple[str, str, float]
    engine: int


@dataclass(frozen=True)
class Step:
    """A line of the script: `kind`, its calls, what happens before backward, how it runs."""

    kind: str
    calls: tuple[Call, ...] = ()
    between: tuple[str, ...] = ()
    backward: str = "backward"


@dataclass(frozen=True)
class Case:
    """Everything that a seed determines."""

    seed: int
    dtype: str
    autocast: bool
    stages: tuple[tuple[str, dict[str, Any]], ...]
    split: bool
    forces: str
    outputs: int
    magnitude: float
    mode: str
    tied_head: bool
    frozen: tuple[int, ...]
    hooks: tuple[tuple[str, int], ...]
    grads_before: bool
    script: tuple[Step, ...] = field(default=())

    def has(self, *names: str) -> bool:
        """Whether one of these stages is in the model."""
        return any(name in names or o.get("of") in names for name, o in self.stages)

    @property
    def foreign(self) -> bool:
        """Whether a forward depends on what the engine cannot know.

        That of a module that is used twice, and reaches a buffer by another name, depends on what
        the first use wrote there.
        """
        renamed = any(
            name == "twice" and options.get("kind") in ("held twice", "numpy view")
            for name, options in self.stages
        )
        return renamed or self.has(*FOREIGN)

    @property
    def steps(self) -> bool:
        """Whether parameters move."""
        hooked = any(kind == "after: step" for kind, _ in self.hooks)
        return hooked or any(step.kind in ("step", "plain") for step in self.script)


def draw(seed: int) -> Case:
    """The case of a seed."""
    rng = random.Random(seed)
    autocast = rng.random() < 0.03
    dtype = "float32" if autocast or rng.random() < 0.12 else "float64"
    forces = rng.choice(["forces", "both"]) if rng.random() < 0.1 else ""
    ragged = not forces and rng.random() < 0.2
    stages = _stages(rng, ragged, forces)
    if any("batch norm" in (name, o.get("of")) for name, o in stages):
        dtype, autocast = "float64", False  # two rows and their mean leave float32 no digits
    outputs = 1 if forces == "forces" or rng.random() < 0.75 else 4
    case = Case(
        seed=seed,
        dtype=dtype,
        autocast=autocast,
        stages=stages,
        split=not forces and rng.random() < 0.2,
        forces=forces,
        outputs=outputs,
        magnitude=10.0 ** rng.randint(-8, 8) if rng.random() < 0.5 else 1.0,
        mode=rng.choices(["train", "eval", "mixed"], [6, 2, 1])[0],
        tied_head=rng.random() < 0.1 and outputs == 4,
        frozen=tuple(rng.randrange(12) for _ in range(rng.choice([0, 0, 0, 1, 3]))),
        hooks=_hooks(rng),
        grads_before=rng.random() < 0.3,
    )
    return Case(**{**_shallow(case), "script": _script(rng, case, ragged)})


def described(case: Case) -> str:
    """A case, a line for each thing that was drawn."""
    lines = [f"{key}: {value}" for key, value in _shallow(case).items() if key != "script"]
    for number, step in enumerate(case.script):
        between = f" between: {', '.join(step.between)}" if step.between else ""
        lines.append(f"step {number}: {step.kind}, {step.backward}{between}")
        lines += [f"    {call}" for call in step.calls]
    return "\n".join(lines)


def _shallow(case: Case) -> dict[str, Any]:
    return {f.name: getattr(case, f.name) for f in fields(case)}


def _stages(
    rng: random.Random, ragged: bool, forces: str
) -> tuple[tuple[str, dict[str, Any]], ...]:
    rare = FOREIGN | ONCE
    names = [n for n in STAGES if not (ragged and n in SEQUENCES) and n not in rare]
    if forces:
        names = [n for n in names if n not in ("attention", "embedding", "experts")]
    found = [rng.choice(names) for _ in range(rng.randint(1, 3))]
    if rng.random() < 0.06:
        found.append(rng.choice(sorted(rare)))
    return tuple((name, _options(rng, name)) for name in found)


def _options(rng: random.Random, name: str) -> dict[str, Any]:
    if name == "twice":
        of = rng.choice(["counter", "code book", "batch norm", "noise", "spectral norm", "mlp"])
        return {"of": of, **_options(rng, of)}
    kinds = {
        "noise": ["module", "alpha", "functional", "randn", "bernoulli", "randint"],
        "counter": [
            "in place", "data", "replaced", "sometimes", "sometimes replaced", "made late",
            "held twice", "view", "numpy view",
        ],
        "code book": ["data", "in place", "replaced"],
        "foreign": ["numpy", "random", "generator", "count"],
        "recurrent": ["lstm", "gru"],
        "attention": ["layer", "plain", "weights"],
    }  # fmt: skip
    big = rng.random() < 0.08
    everything = {
        "activation": rng.choice(["tanh", "relu in place", "gelu", "silu in place"]),
        "width": MANY if big else 6,
        "momentum": rng.choice([0.1, 0.5, None]),
        "track": rng.random() < 0.85,
        "kind": rng.choice(kinds.get(name, [""])),
        "size": rng.choice([0.1, 1e-3]) if name == "foreign" else (MANY if big else 3),
        "count": rng.choice([2, 3]) if name == "experts" else (2100 if big else 4),
        "padding": rng.random() < 0.5,
        "max_norm": rng.choice([None, 0.7, 5.0]),
        "sparse": rng.random() < 0.15,
        "dropout": rng.choice([0.0, 0.3]),
        "drawn": rng.random() < 0.3,
    }
    wanted = {
        "mlp": ["activation"],
        "batch norm": ["width", "momentum", "track"],
        "noise": ["kind"],
        "counter": ["kind", "size"],
        "code book": ["kind", "count"],
        "embedding": ["padding", "max_norm", "sparse"],
        "foreign": ["kind", "size"],
        "recurrent": ["kind", "dropout"],
        "attention": ["kind", "dropout"],
        "experts": ["count", "drawn"],
    }
    return {key: everything[key] for key in wanted.get(name, [])}


def _hooks(rng: random.Random) -> tuple[tuple[str, int], ...]:
    if rng.random() < 0.45:
        return ()
    kinds = ["clamp", "scale", "count", "after: count", "after: step", "forward", "pre", "full"]
    weights = [2, 2, 3, 3, 1, 1, 1, 1]
    chosen = rng.choices(kinds, weights, k=rng.randint(1, 4))
    return tuple((kind, rng.randrange(40)) for kind in chosen)


def _script(rng: random.Random, case: Case, ragged: bool) -> tuple[Step, ...]:
    steps: list[Step] = []
    for _ in range(1 if case.foreign else rng.randint(1, 4)):
        steps.append(_step(rng, case, ragged))
        if rng.random() < 0.4 and not case.foreign:
            steps.append(Step(rng.choice(["step", "zero_grad", "flip", "plain"])))
    if rng.random() < 0.04 and not case.foreign:
        steps.append(Step("stale", (_call(rng, case, ragged),)))
    return tuple(steps)


def _step(rng: random.Random, case: Case, ragged: bool) -> Step:
    stepping = any(kind == "after: step" for kind, _ in case.hooks)
    lonely = case.foreign or stepping
    once = case.has(*ONCE)
    kinds, weights = ["call", "pair", "no_grad"], [7, 0 if lonely else 2, 0 if once else 1]
    kind = rng.choices(kinds, weights)[0]
    count = 2 if kind == "pair" else 1
    calls = tuple(_call(rng, case, ragged) for _ in range(count))
    between: list[str] = []
    if rng.random() < 0.35 and not case.foreign:
        allowed = ["draw"] + ["pass", "no_grad call"] * (not case.has(*ONCE))
        if kind == "call" and not case.has("checkpoint"):
            allowed.append("flip")
        between.append(rng.choice(allowed))
    if kind == "pair":
        return Step(kind, calls, tuple(between), rng.choice(["joined", "in order", "reversed"]))
    modes = ["backward", "twice", "grad", "inputs"]
    chances = [6, 0 if lonely else 2, 1, 1]
    return Step(kind, calls, tuple(between), rng.choices(modes, chances)[0])


def _call(rng: random.Random, case: Case, ragged: bool) -> Call:
    forms = ["stacked", "stacked", "list", "generator", "dict", "tuple", "dataclass"]
    form = "ragged" if ragged else rng.choice(forms)
    if case.forces and form in ("dict", "tuple", "dataclass"):
        form = "list"
    poses = rng.choice([1, 2, 3, 4, 5, 6, 8])
    rule = _rule(rng, case)
    groups = rng.choice(["sizes", "ids"]) if rng.random() < 0.2 else ""
    schedule = rng.choice(WAYS)
    streams = rule[0] in ("Min", "Max", "Boltzmann", "Mean", "Sum")
    if schedule == "stream" and not streams and rng.random() < 0.9:
        schedule = "recompute"
    if case.has(*ONCE):
        schedule = rng.choice(["retain", "store"])
    of = rng.choice(["prediction", "prediction", "both", "per_pose"])
    if schedule == "stream" and rng.random() < 0.9:
        of = "prediction"
    return Call(
        seed=rng.randrange(10**6),
        poses=poses,
        rows=rng.randint(2, 3),
        form=form,
        grad=rng.choices(["", "leaf", "upstream"], [5, 2, 2])[0],
        shared=form in ("dict", "tuple") and rng.random() < 0.4,
        duplicates=rng.random() < 0.2 and poses > 1 and form != "stacked",
        chunk=rng.choice([1, 1, 1, 2, 3, 4, -5, -8]),
        rule=rule,
        groups=groups,
        schedule=schedule,
        loss=(of, rng.choice(["square", "sine", "linear"]), 10.0 ** rng.choice([0, 0, -4, 3])),
        engine=int(rng.random() < 0.25),
    )


def _rule(rng: random.Random, case: Case) -> tuple[str, float]:
    """A rule, and how sharp it is for predictions of magnitude one."""
    if case.autocast:
        return rng.choice(["Mean", "Sum"]), 1.0
    names = ["Min", "Max", "Boltzmann", "Mean", "Sum", "Best", "TopK", "lambda", "trained Min"]
    names += ["trained Boltzmann", "module"] + ["AttentionPooling"] * (2 * (case.outputs > 1))
    sharp = [0.1, 1.0, 30.0, 1e4] if case.dtype == "float64" else [0.1, 1.0, 30.0]
    return rng.choice(names), rng.choice(sharp)
