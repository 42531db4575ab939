"""What the tests in process groups have in common: networks, poses, and whose each is."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.device import seeded

__all__ = [
    "DDP_OPTIONS",
    "FEATURES",
    "IDS",
    "M",
    "gradients",
    "mine",
    "network",
    "poses",
    "same_everywhere",
]

FEATURES = 5
M = 11

DDP_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bucket views": {"gradient_as_bucket_view": True},
    "small buckets": {"bucket_cap_mb": 1e-5},
    "find unused": {"find_unused_parameters": True},
    "static graph": {"static_graph": True},
}
"""Of DistributedDataParallel, that change how it collects gradients."""

SHARES = {2: (8, 3), 3: (8, 0, 3), 4: (1, 6, 0, 4)}
"""How many poses each rank has: uneven, and one of three has none."""

IDS = torch.tensor([0, 0, 1, 1, 1, 2, 2, 0, 1, 2, 2])
"""Three groups, each with poses on several ranks."""


def network() -> nn.Module:
    """The same on every rank."""
    torch.manual_seed(0)
    layers = (nn.Linear(FEATURES, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 1))
    return nn.Sequential(*layers).double()


def poses() -> Tensor:
    """Those of all ranks, `[11, 5]`."""
    generator = seeded(1)
    return torch.randn(M, FEATURES, generator=generator, dtype=torch.float64)


def mine(everyone: Tensor) -> Tensor:
    """This rank's part of what all ranks have."""
    return everyone.split(SHARES[dist.get_world_size()])[dist.get_rank()]


def gradients(modules: Sequence[nn.Module], step: Callable[[], object]) -> dict[str, Tensor | None]:
    """What a step leaves in `.grad`, which is None before and after."""
    step()
    named = {f"{i}.{n}": p for i, m in enumerate(modules) for n, p in m.named_parameters()}
    found = {name: p.grad for name, p in named.items()}
    for p in named.values():
        p.grad = None
    return found


def same_everywhere(found: dict[str, Tensor | None]) -> bool:
    """Whether all ranks have the same numbers, to the last bit."""
    everyone: list[dict[str, Tensor | None]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    return all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for other in everyone
        for a, b in zip(other.values(), everyone[0].values(), strict=True)
    )
