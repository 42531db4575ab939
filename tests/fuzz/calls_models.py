"""Stages of random stateful models: each turns rows `[R, 4]` into rows, and most keep a state."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

FEATURES = 4
MANY = 8200  # above what the engine compares by value

Options = dict[str, Any]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu in place": torch.relu_,
    "gelu": F.gelu,
    "silu in place": lambda x: F.silu(x, inplace=True),
}


def _linear() -> nn.Linear:
    return nn.Linear(FEATURES, FEATURES)


class Mlp(nn.Module):
    """Two layers around an activation, in place or not."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.up = nn.Linear(FEATURES, 6)
        self.down = nn.Linear(6, FEATURES)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down(ACTIVATIONS[self.activation](self.up(x)))


class Normed(nn.Module):
    """A wide layer between two batch norms or group norms."""

    def __init__(self, norm: nn.Module, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(FEATURES, width)
        self.norm = norm
        self.down = nn.Linear(width, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.norm(self.up(x))))


NOISES: dict[str, Callable[[Tensor], Tensor]] = {
    "functional": lambda x: F.dropout(x, 0.4),
    "randn": lambda x: x + 0.3 * torch.randn_like(x),
    "bernoulli": lambda x: x * torch.bernoulli(torch.full_like(x, 0.7)),
    "randint": lambda x: x * (1 + torch.randint(0, 3, (1,)).to(x)),
}


class Noise(nn.Module):
    """Random numbers of torch's generator, drawn in every way."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.drop = {"module": nn.Dropout(0.3), "alpha": nn.AlphaDropout(0.3)}.get(kind)

    def forward(self, x: Tensor) -> Tensor:
        if self.drop is not None:
            return self.drop(x)
        return NOISES[self.kind](x) if self.training else x


class Counter(nn.Module):
    """A buffer that scales the rows and is moved by them, in every way a buffer can be."""

    state: Tensor

    def __init__(self, kind: str, size: int) -> None:
        super().__init__()
        self.kind = kind
        self.linear = _linear()
        self.register_buffer("state", None if kind == "made late" else torch.zeros(size))
        if kind == "view":
            self.register_buffer("part", self.state[: max(1, size // 2)])
        if kind == "held twice":
            self.held = [self.state]

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        if self.kind == "made late" and self.state is None:
            self.state = 0.1 * x.detach().abs().mean().reshape(1)
        read = self.part if self.kind == "view" else self.state
        factor = 1 + 0.1 * torch.tanh(read.mean())
        with torch.no_grad():
            self._move(x.detach().abs().mean())
        if self.kind == "view":  # reads what was just written through the other name
            factor = factor + 0.1 * self.part.mean()
        return x * factor

    def _move(self, by: Tensor) -> None:
        if self.kind.startswith("sometimes") and not bool(by > 0.6):
            return
        match self.kind:
            case "in place" | "made late" | "view":
                self.state.add_(by)
            case "data":
                self.state.data.add_(by)
            case "replaced":
                self.state = 0.7 * self.state + by
            case "sometimes":
                self.state.mul_(0.5).add_(by)
            case "sometimes replaced":
                self.state = self.state + by
            case "held twice":
                self.held[0].add_(by)
            case "numpy view":
                self.state.numpy()[...] += float(by)


class CodeBook(nn.Module):
    """Vector quantisation with codes that follow the rows: straight through, as in VQ-VAE."""

    codes: Tensor

    def __init__(self, kind: str, count: int) -> None:
        super().__init__()
        self.kind = kind
        self.linear = _linear()
        self.register_buffer("codes", torch.randn(count, FEATURES))
        self.register_buffer("used", torch.zeros(count, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        picked = torch.cdist(x.detach(), self.codes).argmin(dim=1)
        quantised = self.codes[picked]
        if self.training:
            self._follow(x.detach(), picked)
        return x * quantised.tanh() + (quantised - x).detach() + x

    def _follow(self, x: Tensor, picked: Tensor) -> None:
        moved = self.codes.clone()
        moved[picked] = 0.8 * moved[picked] + 0.2 * x
        if self.kind == "data":
            self.codes.data.copy_(moved)
        elif self.kind == "in place":
            with torch.no_grad():
                self.codes.copy_(moved)
        else:
            self.codes = moved
        self.used.data += torch.bincount(picked, minlength=len(self.used))


class Tied(nn.Module):
    """One weight used forwards and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x)) @ self.linear.weight


class Checkpointed(nn.Module):
    """A part that backward computes again."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(FEATURES, 6), nn.Dropout(0.2), nn.Tanh())
        self.head = nn.Linear(6, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, x, use_reentrant=False))


class _Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(x, slope)
        return x * torch.sigmoid(slope * x)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        x, slope = ctx.saved_tensors
        gate = torch.sigmoid(slope * x)
        inner = gate * (1 - gate)
        return cotangent * (gate + slope * x * inner), (cotangent * x * x * inner).sum()


class Custom(nn.Module):
    """An autograd function of the user's, with a trained slope."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(1.3))

    def forward(self, x: Tensor) -> Tensor:
        return _Swish.apply(x, self.slope)


class Looked(nn.Module):
    """An embedding of what the rows fall into."""

    def __init__(self, padding: bool, max_norm: float | None, sparse: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(
            5, FEATURES, padding_idx=0 if padding else None, max_norm=max_norm, sparse=sparse
        )

    def forward(self, x: Tensor) -> Tensor:
        kinds = (x.detach()[:, 0] * 3).floor().long().remainder(5)
        return x + self.table(kinds)


class Initialised(nn.Module):
    """Parameters that the first rows set, as in ActNorm."""

    ready: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(FEATURES))
        self.register_buffer("ready", torch.zeros((), dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            self.scale.data.copy_(1 / (1 + x.detach().std(dim=0, unbiased=False)))
            self.ready.fill_(True)
        return x * self.scale


class Foreign(nn.Module):
    """Random numbers and counts that torch knows nothing of."""

    def __init__(self, kind: str, size: float) -> None:
        super().__init__()
        self.kind, self.size = kind, size
        self.count = 0
        self.generator = torch.Generator().manual_seed(5)
        self.linear = _linear()

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        drawn = {
            "numpy": lambda: float(np.random.rand()),
            "random": random.random,
            "generator": lambda: float(torch.rand((), generator=self.generator)),
            "count": lambda: 1 / self.count,
        }[self.kind]()
        return self.linear(x) * (1 + self.size * drawn)


class Kept(nn.Module):
    """A layer, and a number that is kept."""

    state: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = _linear()
        self.register_buffer("state", torch.zeros(()))


class WarmedUp(Kept):
    """A buffer that a count in Python begins to move with the fourth forward."""

    count = 0

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x) * (1 + 0.1 * self.state)
        self.count += 1
        if self.count > 3:
            self.state.add_(0.5)
        return out


class Graded(Kept):
    """A mean that is kept of what is trained on: only where a graph is made."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x) * (1 + 0.1 * torch.tanh(self.state))
        if torch.is_grad_enabled():
            self.state.add_(out.detach().abs().mean())
        return out


class Twice(nn.Module):
    """One stage that is run twice in a forward."""

    def __init__(self, of: str, **options: Any) -> None:
        super().__init__()
        self.stage = STAGES[of](**options)

    def forward(self, x: Tensor) -> Tensor:
        return self.stage(torch.tanh(self.stage(x)))


class Burdened(nn.Module):
    """A parameter that nothing uses and a layer that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(3))
        self.frozen = _linear().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sin(self.frozen(x))


class Recurrent(nn.Module):
    """LSTM or GRU over the rows of each pose."""

    sequence = True

    def __init__(self, kind: str, dropout: float) -> None:
        super().__init__()
        cell = {"lstm": nn.LSTM, "gru": nn.GRU}[kind]
        layers = 2 if dropout else 1
        self.cell = cell(FEATURES, FEATURES, layers, batch_first=True, dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0]


class Attention(nn.Module):
    """Attention among the rows of each pose, with dropout of its weights."""

    sequence = True

    def __init__(self, kind: str, dropout: float) -> None:
        super().__init__()
        if kind == "layer":
            self.part = nn.TransformerEncoderLayer(FEATURES, 2, 6, dropout, batch_first=True)
        else:
            self.part = nn.MultiheadAttention(FEATURES, 2, dropout, batch_first=True)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "layer":
            return self.part(x)
        return x + self.part(x, x, x, need_weights=self.kind == "weights")[0]


class Experts(nn.Module):
    """Each pose goes through one expert, which its own numbers or a draw choose."""

    pooled = True

    def __init__(self, count: int, drawn: bool) -> None:
        super().__init__()
        self.experts = nn.ModuleList(_linear() for _ in range(count))
        self.drawn = drawn

    def forward(self, x: Tensor) -> Tensor:
        if self.drawn:
            chances = torch.softmax(x.detach()[:, : len(self.experts)], dim=1)
            route = torch.multinomial(chances, 1)[:, 0]
        else:
            route = (x.detach()[:, 0] * 5).floor().long().remainder(len(self.experts))
        out = 0.1 * x
        for number, expert in enumerate(self.experts):
            rows = (route == number).nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, torch.tanh(expert(x[rows])))
        return out


def _batch_norm(width: int, momentum: float | None, track: bool) -> nn.Module:
    return Normed(nn.BatchNorm1d(width, momentum=momentum, track_running_stats=track), width)


# name: how to make it of its options, which calls_draw.py draws
STAGES: dict[str, Callable[..., nn.Module]] = {
    "linear": _linear,
    "mlp": Mlp,
    "batch norm": _batch_norm,
    "group norm": lambda: Normed(nn.GroupNorm(2, 6), 6),
    "layer norm": lambda: Normed(nn.LayerNorm(6), 6),
    "noise": Noise,
    "counter": Counter,
    "code book": CodeBook,
    "spectral norm": lambda: spectral_norm(_linear()),
    "weight norm": lambda: weight_norm(_linear()),
    "tied": Tied,
    "checkpoint": Checkpointed,
    "custom": Custom,
    "embedding": Looked,
    "initialised": Initialised,
    "foreign": Foreign,
    "warmed up": WarmedUp,
    "graded": Graded,
    "twice": Twice,
    "burdened": Burdened,
    "recurrent": Recurrent,
    "attention": Attention,
    "experts": Experts,
}

SEQUENCES = {"recurrent", "attention"}
FOREIGN = {"foreign"}  # a pose that is scored again gives another prediction
ONCE = {"warmed up", "graded"}  # to be scored once, with its graph, or the state is another one


class Trunk(nn.Module):
    """Stages on the rows of poses, their sum for each pose, stages on that."""

    def __init__(self, stages: list[tuple[str, Options]]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(STAGES[name](**options) for name, options in stages)
        self.lift = _linear()

    def forward(self, x: Tensor, owner: Tensor | None = None, count: int = 1) -> Tensor:
        """From `[c, n, 4]`, or ragged `[N, 4]` with owners, to `[c, 4]`."""
        rows = self.lift(x)
        for stage in self.stages:
            if getattr(stage, "sequence", False):
                rows = stage(rows)
            elif not getattr(stage, "pooled", False):
                rows = stage(rows.reshape(-1, FEATURES)).reshape(rows.shape)
        if owner is None:
            pooled = rows.sum(dim=1)
        else:
            pooled = rows.new_zeros(count, FEATURES).index_add(0, owner, rows)
        for stage in self.stages:
            if getattr(stage, "pooled", False):
                pooled = stage(pooled)
        return pooled


class Head(nn.Module):
    """The last layer, and the unit of the predictions."""

    def __init__(self, outputs: int, magnitude: float) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, outputs)
        self.magnitude = magnitude

    def forward(self, pooled: Tensor) -> Tensor:
        return self.magnitude * self.linear(torch.tanh(pooled))


class Model(nn.Module):
    """A trunk and a head; with forces, what the energy's slope is."""

    def __init__(self, trunk: nn.Module, head: nn.Module, forces: str) -> None:
        super().__init__()
        self.trunk, self.head, self.forces = trunk, head, forces

    def forward(self, x: Tensor, *ragged: Any) -> Tensor:
        if not self.forces:
            return self.head(self.trunk(x, *ragged))
        graph = torch.is_grad_enabled()  # a view made without says that it requires grad, too
        with torch.enable_grad():
            if not (graph and x.requires_grad):
                x = x.detach().requires_grad_()
            energy = self.head(self.trunk(x, *ragged))  # [c, d]
            (slope,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        pushed = (slope * torch.sin(x.detach())).sum(dim=(1, 2)).unsqueeze(1)  # [c, 1]
        return pushed if self.forces == "forces" else energy + 0.5 * pushed
