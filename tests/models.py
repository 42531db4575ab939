"""Models that score poses of six numbers, one for each way a model can be awkward."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

FEATURES = 6


class Passed(torch.autograd.Function):
    """The identity, whose poses must be probed for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        return cotangents[0].clone()


class Step(nn.Module):
    """A function of its modules, its free parameters and x."""

    def __init__(self, function: Callable[..., Tensor], *modules: nn.Module, **free: Tensor):
        super().__init__()
        self.function = function
        self.modules_used = nn.ModuleList(modules)
        self.free = nn.ParameterDict(free)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.modules_used, **self.free)


class PairDistances(nn.Module):
    """A tiny network on the distances between two atoms' three coordinates each."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 1))

    def forward(self, pose: Tensor) -> Tensor:
        atoms = pose.unflatten(-1, (-1, 3))  # [..., atoms, 3]
        distances = (atoms.unsqueeze(-2) - atoms.unsqueeze(-3)).square().sum(-1)
        return self.filter(distances.unsqueeze(-1)).sum(dim=(-3, -2))


class Tied(nn.Module):
    """One linear layer, used forwards and, transposed, backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, 4)

    def forward(self, pose: Tensor) -> Tensor:
        hidden = torch.tanh(self.linear(pose))
        return (hidden @ self.linear.weight).sum(-1, keepdim=True)


class UnusedAndFrozen(nn.Module):
    """A parameter that nothing uses and one that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, 4)
        self.frozen = nn.Linear(4, 1)
        self.frozen.requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, pose: Tensor) -> Tensor:
        return self.frozen(torch.sin(self.linear(pose)))


class Routed(nn.Module):
    """Each pose goes through one of two experts, chosen by its first number."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(FEATURES, 1), nn.Linear(FEATURES, 1)])

    def forward(self, pose: Tensor) -> Tensor:
        first, second = (expert(pose) for expert in self.experts)
        return torch.where(pose[..., :1] > 0, first, second.square())


class Checkpointed(nn.Module):
    """The first half is checkpointed, without reentry."""

    def __init__(self, *, reentrant: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Dropout(0.2))
        self.head = nn.Linear(8, 1)
        self.reentrant = reentrant

    def forward(self, pose: Tensor) -> Tensor:
        pose = pose.detach().requires_grad_() if self.reentrant else pose
        return self.head(checkpoint(self.body, pose, use_reentrant=self.reentrant))


class Counting(nn.Module):
    """A buffer that counts forwards, and a prediction that depends on the count."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, 1)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, pose: Tensor) -> Tensor:
        if self.training:
            self.count.add_(1)
        return self.linear(pose) * (1 + self.count)


class Encoder(nn.Module):
    """A transformer over the numbers of a pose; has a fast path without gradients."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.lift = nn.Linear(1, 8)

    def forward(self, pose: Tensor) -> Tensor:
        tokens = self.lift(pose.reshape(-1, FEATURES, 1))  # [c, T, 8]
        return self.encoder(tokens).sum(dim=(1, 2)).reshape(*pose.shape[:-1], 1)


class Recurrent(nn.Module):
    """A GRU over the numbers of a pose."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(1, 5, batch_first=True)

    def forward(self, pose: Tensor) -> Tensor:
        out, _ = self.gru(pose.reshape(-1, FEATURES, 1))
        return out[:, -1].sum(-1).reshape(*pose.shape[:-1], 1)


class BatchNorm(nn.BatchNorm1d):
    """Batch norm that also takes a single pose without a batch dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.ndim > 1 else super().forward(x[None])[0]


class Centred(nn.Module):
    """Poses that are scored together are compared with their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, 1)

    def forward(self, pose: Tensor) -> Tensor:
        score = self.linear(pose)
        return (score - score.mean(dim=0, keepdim=True)).square() if pose.ndim > 1 else score


class Gated(nn.Module):
    """Predictions do not depend on the neighbours yet, but the gate's gradient does."""

    def __init__(self, features: int = FEATURES) -> None:
        super().__init__()
        self.linear = nn.Linear(features, 1)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.gate * x.mean(0).sum()


def _mlp(*middle: nn.Module, out: int = 1) -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), *middle, nn.Tanh(), nn.Linear(8, out))


def _eval(model: nn.Module) -> nn.Module:
    return model.eval()


# name: how to make it. Every model takes [6] and [c, 6], unless it is in BATCHED_ONLY.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": _mlp,
    "vector": lambda: _mlp(out=3),
    "dropout": lambda: _mlp(nn.Dropout(0.4)),
    "in-place": lambda: nn.Sequential(
        nn.Linear(FEATURES, 8),
        nn.ReLU(inplace=True),
        nn.Linear(8, 8),
        nn.SiLU(True),
        nn.Linear(8, 1),
    ),
    "batch norm, training": lambda: _mlp(nn.BatchNorm1d(8), nn.Dropout(0.2)),
    "batch norm, evaluation": lambda: _eval(_mlp(BatchNorm(8), nn.Dropout(0.2))),
    "batch norm, no statistics": lambda: _mlp(nn.BatchNorm1d(8, track_running_stats=False)),
    "layer norm": lambda: _mlp(nn.LayerNorm(8)),
    "spectral norm": lambda: nn.Sequential(spectral_norm(nn.Linear(FEATURES, 4)), nn.Linear(4, 1)),
    "weight norm": lambda: nn.Sequential(weight_norm(nn.Linear(FEATURES, 4)), nn.Linear(4, 1)),
    "pair distances": PairDistances,
    "tied": Tied,
    "unused and frozen": UnusedAndFrozen,
    "routed": Routed,
    "checkpointed": Checkpointed,
    "counting": Counting,
    "encoder": Encoder,
    "encoder, evaluation": lambda: _eval(Encoder()),
    "recurrent": Recurrent,
    "centred": Centred,
}

# Batch statistics need at least two poses in a chunk.
BATCHED_ONLY = {"batch norm, training", "batch norm, no statistics"}
