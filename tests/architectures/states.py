"""Modules of the table with a state or a coupling; and calls that are no plain call."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from posegrad import Engine
from tests.architectures.models import WIDTH, mlp
from tests.architectures.row import M, batch, draw, score, steps
from tests.device import DEVICE

PLAIN = batch(WIDTH)


# Batches whose poses know each other


class Centred(nn.Module):
    """Activations relative to their mean over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(WIDTH, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.head(torch.tanh(x - x.mean(0)))


def contrastive(model: nn.Module, seed: int) -> Tensor:
    one, other = (nn.functional.normalize(model(draw(seed + i, M, WIDTH))) for i in (0, 100))
    return nn.functional.cross_entropy(one @ other.T / 0.1, torch.arange(M), reduction="none")


# Order and shape


class Sorting(nn.Module):
    """Scores the poses in the order of their first numbers, and puts them back."""

    def __init__(self, *, back: bool) -> None:
        super().__init__()
        self.body, self.back = mlp(), back

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        y = self.body(x[order])
        return y[order.argsort()] if self.back else y


def loop(model: nn.Module, seed: int) -> Tensor:
    return torch.stack([model(pose).squeeze() for pose in draw(seed, M, WIDTH)])


def pairs(model: nn.Module, seed: int) -> Tensor:
    one, other = model(draw(seed, M, WIDTH)), model(draw(seed + 100, M, WIDTH))
    return (one - other).square().sum(1)


def masked(model: nn.Module, seed: int) -> Tensor:
    x = draw(seed, M, WIDTH)
    return score(model(x))[x[:, 0] > x[:, 0].median()]


# States


class Counting(nn.Module):
    """A buffer that every forward changes, and that matters."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean.mul_(0.9).add_(x.mean(0))
        return self.body(x - self.mean)


class Unused(nn.Module):
    """One layer that nothing uses and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.unused = mlp(nn.Linear(5, 5)), nn.Linear(2, 2)
        self.body[1].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Dictionary(nn.Module):
    """Named inputs to named outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.aside = nn.Linear(WIDTH, 3), nn.Linear(2, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor, *, extra: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(self.left(x) + self.right(extra))
        return {"energy": hidden.sum(1), "aside": self.aside(hidden)}


class Pair(Dictionary):
    """Two inputs to a tuple."""

    def forward(self, x: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
        found = super().forward(x, extra=extra)
        return found["aside"], found["energy"]


class Hooked(nn.Module):
    """A hook on an activation changes its gradient."""

    def __init__(self, hook: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.head, self.hook = nn.Linear(WIDTH, 5), nn.Linear(5, 1), hook

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x))
        hidden.register_hook(self.hook)
        return self.head(hidden)


def clip(g: Tensor) -> Tensor:
    """As a whole, which no linear backward does."""
    return g * (0.1 / g.norm()).clamp(max=1.0)


class InPart(nn.Module):
    """One part of a model is compiled."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.body, self.head = torch.compile(nn.Linear(WIDTH, 5), backend=backend), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


def under_autocast(model: nn.Module, seed: int) -> Tensor:
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        y = model(draw(seed, M, WIDTH, dtype=torch.float32))
    return y.float().squeeze(1)


def after_another_forward(model: nn.Module, seed: int) -> Tensor:
    model(draw(seed + 50, M + 2, WIDTH))
    return PLAIN(model, seed)


def with_another_engine(model: nn.Module, seed: int) -> Tensor:
    output = PLAIN(model, seed)
    Engine(model).jacobian(PLAIN(model, seed + 50)).gramian()
    return output


def two_forwards(model: nn.Module, seed: int) -> Tensor:
    first, second = PLAIN(model, seed + 50), PLAIN(model, seed)
    Engine(model).jacobian(first)
    return second


def replaced(model: nn.Module, seed: int) -> Tensor:
    model[0] = nn.Linear(WIDTH, 5, dtype=torch.float64)
    return PLAIN(model, seed)


def copied(model: nn.Module, seed: int) -> Tensor:
    return PLAIN(copy.deepcopy(model), seed)


def thawing(model: nn.Module, seed: int) -> Tensor:
    model[0].requires_grad_(seed % 2 == 1)
    return PLAIN(model, seed)


def without_graph(model: nn.Module, seed: int) -> Tensor:
    with torch.no_grad():
        return PLAIN(model, seed)


def changed_in_place(model: nn.Module, seed: int) -> Tensor:
    x = draw(seed, M, WIDTH)
    y = score(model(x))
    x.zero_()
    return y


# Calls


def forces(model: nn.Module, seed: int) -> Tensor:
    x = draw(seed, M, WIDTH).requires_grad_()
    (force,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return force.square().sum(1)


def vmapped(model: nn.Module, seed: int) -> Tensor:
    return torch.func.vmap(model)(draw(seed, M, WIDTH)).squeeze(1)


def functional(model: nn.Module, seed: int) -> Tensor:
    doubled = {name: 2 * p for name, p in model.named_parameters()}
    return torch.func.functional_call(model, doubled, (draw(seed, M, WIDTH),)).squeeze(1)


def offloaded(model: nn.Module, seed: int) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return PLAIN(model, seed)


def after_training(model: nn.Module, seed: int) -> Tensor:
    steps(model, PLAIN, range(seed + 50, seed + 53))
    return PLAIN(model, seed)


def other_sizes(model: nn.Module, seed: int) -> Tensor:
    return score(model(draw(seed, (M, 70, 1)[seed % 3], WIDTH)))


def sharing(model: nn.Module, seed: int) -> Tensor:
    order = torch.tensor([3, 1, 0, 5, 4, 2])
    order[1] = order[0] if seed % 2 == 0 else order[1]
    return PLAIN(model, seed)[order]


def switching(model: nn.Module, seed: int) -> Tensor:
    return PLAIN(model.train(seed % 2 == 0), seed)
