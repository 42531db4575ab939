"""Containers of a batch; models that mix its poses, and models that keep them apart."""

from collections import UserDict, namedtuple
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from tests.models import Gated

__all__ = ["APART", "CONTAINERS", "MIXING", "TOKENS", "centred", "summed"]

Make = Callable[[], nn.Module]
Predict = Callable[[nn.Module, Tensor], Tensor]

Named = namedtuple("Named", ["x", "shift"])


@dataclass(frozen=True)
class Fields:
    x: Tensor
    shift: Tensor
    tag: str = "tag"


class Encoding(UserDict[str, Tensor]):
    """As `BatchEncoding` of transformers."""


class Divisible(MutableMapping[str, Tensor]):
    """As a TensorDict: indexed along the batch, and by name."""

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = tensors
        self.batch_size = next(iter(tensors.values())).shape[:1]

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self.tensors[key]
        return Divisible(**{name: tensor[key] for name, tensor in self.tensors.items()})

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        if tensor.shape[:1] != self.batch_size:
            raise RuntimeError("batch dimension mismatch")
        self.tensors = self.tensors | {name: tensor}

    def __delitem__(self, name: str) -> None:
        raise NotImplementedError

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return self.batch_size[0]

    def split(self, sizes: list[int]) -> list["Divisible"]:
        parts = zip(*(tensor.split(sizes) for tensor in self.tensors.values()), strict=True)
        return [Divisible(**dict(zip(self.tensors, part, strict=True))) for part in parts]


# How two tensors are held, and how the model gets them out.
CONTAINERS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], tuple[Tensor, ...]]]]
CONTAINERS = {
    "dict": (lambda x, s: {"x": x, "shift": s, "n": 3}, lambda b: (b["x"], b["shift"])),
    "encoding": (lambda x, s: Encoding(x=x, shift=s), lambda b: (b["x"], b["shift"])),
    "read only": (lambda x, s: MappingProxyType({"x": x, "s": s}), lambda b: (b["x"], b["s"])),
    "divisible": (lambda x, s: Divisible(x=x, shift=s), lambda b: (b["x"], b["shift"])),
    "named tuple": (Named, lambda b: (b.x, b.shift)),
    "dataclass": (Fields, lambda b: (b.x, b.shift)),
    "nested": (lambda x, s: {"a": Fields(x, s), "b": None}, lambda b: (b["a"].x, b["a"].shift)),
    "past states": (lambda x, s: {"past": ((x, s),)}, lambda b: b["past"][0]),
    "one twice": (lambda x, _: {"x": x, "shift": x}, lambda b: (b["x"], b["shift"])),
}


def _encoder(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.TransformerEncoderLayer(8, 2, 16, **options)


def summed(model: nn.Module, x: Tensor) -> Tensor:
    """One number for each pose."""
    return model(x).pow(3).sum(dim=(1, 2))


def _causal(model: nn.Module, x: Tensor) -> Tensor:
    mask = nn.Transformer.generate_square_subsequent_mask(len(x))
    return model(x, src_mask=mask, is_causal=True).pow(3).sum(dim=(1, 2))


def _standardised(model: nn.Module, x: Tensor) -> Tensor:
    return model((x - x.mean(0)) / (x.std(0) + 1)).sum(dim=(1, 2))


def _over_the_number(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).sum(dim=(1, 2)) / len(x)


class _Placed(nn.Module):
    """Adds what the place of a row in the batch says."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 1)
        self.places = nn.Parameter(torch.randn(6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.places[: len(x)]


class _PlacedBehindAGate(_Placed):
    """Likewise, but the gate is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.gate * self.places[: len(x)]


def centred(model: nn.Module, x: Tensor) -> Tensor:
    """The same of poses that are compared with their mean."""
    return model((x - x.mean(0)).exp()).sum(dim=(1, 2))


TOKENS = torch.randn(6, 7, 8)

# name: how to make the model, how it scores a batch, and what is said of the poses that mix
MIXING: dict[str, tuple[Make, Predict, str]] = {
    "an encoder": (_encoder(), summed, r"of: self_attn \(at "),
    "an encoder, evaluation": (lambda: _encoder()().eval(), summed, "of: self_attn"),
    "a causal encoder": (lambda: _encoder(dropout=0.0)(), _causal, "of: self_attn"),
    "batch statistics": (
        lambda: nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(7), nn.Linear(4, 1)),
        summed,
        r"of: 0 \(at NativeBatchNorm\)",
    ),
    "data": (lambda: nn.Linear(8, 1), _standardised, r"together with it\."),
    "a gate that is zero": (lambda: Gated(8), summed, r"together with it\."),
    "their number": (lambda: nn.Linear(8, 1), _over_the_number, r"together with it"),
    "their place": (_Placed, summed, r"together with it"),
    "their place behind a gate": (_PlacedBehindAGate, summed, r"together with it"),
    "frozen": (lambda: _encoder()().requires_grad_(False), summed, r"together with it\."),
}


class _Experts(nn.Module):
    """Poses of a batch go through one of three experts, which others then do not touch."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(8, 1), nn.Linear(8, 1), nn.Linear(8, 1)])
        self.phase = nn.Parameter(torch.ones(8, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        number = (x[:, 0, 0] > 0).long() + (x[:, 1, 0] > 0).long()
        parts = [expert(x[number == k]) for k, expert in enumerate(self.experts) if k in number]
        order = torch.argsort(number, stable=True).argsort()
        return torch.cat(parts)[order] + (x * self.phase).abs().sum(-1, keepdim=True)


class _Tokens(nn.Module):
    """A table whose gradient is sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 1, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.table((x.abs() * 4).long().clamp(max=8))[..., 0]


class _Counting(nn.Module):
    """Moves a buffer that the scores depend on."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 1)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return self.linear(x) * self.count


class _Noisy(nn.Module):
    """Never gives the same twice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 1)
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + torch.rand((len(x), 1, 1), generator=self.generator)


# name: models that keep poses apart, and what a second forward of theirs would change
APART: dict[str, Make] = {
    "experts": _Experts,
    "sparse": _Tokens,
    "an encoder": _encoder(batch_first=True),
    "dropout": lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 2)),
    "counting": _Counting,
    "noise of its own": _Noisy,
}
