"""Embeddings of poses that are spread over ranks, and rules of several outputs there."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from posegrad import AttentionPooling, Engine
from tests.device import seeded
from tests.distributed.setting import FEATURES, M, gradients, mine, poses, same_everywhere

D = 4


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), nn.Linear(6, D)).double()


def contrast(x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(x @ y.T, torch.arange(len(x)))


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_every_rank_sees_the_embeddings_of_all(chunk_size: int) -> None:
    """So the pairs of other ranks are negatives, and their gradients arrive where they belong."""
    model, X = encoder(), poses()
    options: dict[str, Any] = {"chunk_size": chunk_size, "process_group": dist.group.WORLD}

    def shared() -> None:
        embeddings = Engine(model, **options).embed(mine(X))
        torch.testing.assert_close(embeddings, model(X))
        contrast(embeddings, embeddings.roll(1, 0)).backward()

    def alone() -> None:
        contrast(model(X), model(X).roll(1, 0)).backward()

    found = gradients([model], shared)
    torch.testing.assert_close(found, gradients([model], alone), rtol=1e-9, atol=1e-11)
    assert same_everywhere(found)


def test_each_rank_may_have_a_loss_of_its_own() -> None:
    """As where each takes its own rows of the matrix of similarities."""
    model, X, count = encoder(), poses(), dist.get_world_size()
    rows = torch.arange(M).tensor_split(count)

    def shared() -> None:
        embeddings = Engine(model, process_group=dist.group.WORLD).embed(mine(X))
        embeddings[rows[dist.get_rank()]].exp().sum().backward()

    def alone() -> None:
        (model(X).exp().sum() / count).backward()

    torch.testing.assert_close(gradients([model], shared), gradients([model], alone))


class Towers(nn.Module):
    """Two encoders of pairs; its forward is their contrastive loss."""

    def __init__(self, embed: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.embed = embed
        self.towers = nn.ModuleList([encoder(), encoder()])

    def forward(self, pairs: Tensor) -> Tensor:
        x, y = (self.embed(t, x) for t, x in zip(self.towers, pairs.unbind(1), strict=True))
        return contrast(x, y)


def in_chunks(model: nn.Module, poses: Tensor) -> Tensor:
    return Engine(model, chunk_size=2).embed(poses)


OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "unused parameters": {"find_unused_parameters": True},
    "static graph": {"static_graph": True},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_embeddings_inside_a_wrapped_module(options: str) -> None:
    """Each rank has pairs of its own; the wrapper averages."""
    count = dist.get_world_size()
    batches = torch.randn(count, 5, 2, FEATURES, generator=seeded(1), dtype=torch.float64)
    ours, plain = Towers(in_chunks), Towers(lambda model, poses: model(poses))
    wrapped = DistributedDataParallel(ours, **OPTIONS[options])

    def alone() -> None:
        (sum(map(plain, batches)) / count).backward()

    for _ in range(2):
        found = gradients([ours], lambda: wrapped(batches[dist.get_rank()]).backward())
        torch.testing.assert_close(found, gradients([plain], alone))


def nonzero(found: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Without those of what no loss needs, which are None or zero."""
    return {name: g for name, g in found.items() if g is not None and bool(g.any())}


class Bag(nn.Module):
    """Logits and attention; the scale is used by the second output alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.pool = AttentionPooling(D, gated=True)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, instances: Tensor) -> tuple[Tensor, ...]:
        attention = self.pool.attention(instances)
        shown = attention.detach(), attention.argmax()
        return self.pool(instances), self.scale * attention, *shown


@pytest.mark.parametrize("schedule", ["auto", "recompute", "store"])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0)])
def test_rules_of_several_outputs(schedule: str, weights: tuple[float, float]) -> None:
    model, rule, X = encoder(), Bag().double(), poses()
    outputs: list[list[Tensor]] = []

    def step(poses: list[Tensor], schedule: str, **options: Any) -> None:
        combined = Engine(model, **options).combine(poses, rule, schedule=schedule)
        assert [tensor.requires_grad for tensor in combined[2:]] == [True, False, False]
        outputs.append([tensor.detach() for tensor in combined])
        of_both = zip(weights, (combined.prediction, combined.extra[0]), strict=True)
        sum(weight * output.exp().sum() for weight, output in of_both if weight).backward()

    def shared() -> None:
        step(list(mine(X)), schedule, process_group=dist.group.WORLD)

    found = gradients([model, rule], shared)
    expected = gradients([model, rule], lambda: step(list(X), "retain"))
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(nonzero(found), nonzero(expected))
    assert same_everywhere(found)
