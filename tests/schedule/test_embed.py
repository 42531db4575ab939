"""`Engine.embed`: an ordinary tensor, whose gradient is that of plain autograd."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from posegrad import (
    Engine,
    HigherOrderError,
    Min,
    NonFinitePredictionError,
    NoPosesError,
    PosesMixError,
    ReplayError,
    StaleParametersError,
)
from posegrad.testing import peak_live_bytes
from tests.device import DEVICE
from tests.models import BATCHED_ONLY, FEATURES, MODELS
from tests.schedule.test_work import Tallied

D = 4


def _encoder(name: str) -> nn.Module:
    """A model of the table, with vectors for predictions."""
    model = MODELS[name]()
    width = 3 if name == "vector" else 1
    return nn.Sequential(model, nn.Linear(width, D), nn.Tanh()).double()


def _contrast(x: Tensor, y: Tensor) -> Tensor:
    """InfoNCE: pair i is told from all pairs of x_i and y_j, both ways."""
    similarities = 4 * nn.functional.normalize(x) @ nn.functional.normalize(y).T  # [m, m]
    own = torch.arange(len(x))
    both = nn.functional.cross_entropy(similarities, own)
    return both + nn.functional.cross_entropy(similarities.T, own)


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "all pairs": lambda z: _contrast(z, z.roll(1, 0)),
    "norm of the mean": lambda z: z.mean(0).square().sum(),
    "nearest pair": lambda z: torch.pdist(torch.cat([z, z[:1] + 1])).min(),
    "one pose": lambda z: z[-1].exp().sum(),
    "several reductions": lambda z: z.amax(0).sum() * z.square().mean() + z[0, 0],
}


def _plain(model: nn.Module, poses: Tensor, chunk_size: int) -> Tensor:
    return torch.cat([model(chunk) for chunk in poses.split(chunk_size)])


def _state(model: nn.Module, *leaves: Tensor) -> dict[str, Any]:
    """All that a step may change; a parameter that nothing needs has no gradient, or zeros."""
    tensors = {**dict(model.named_parameters()), **{str(i): t for i, t in enumerate(leaves)}}
    grads = {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in tensors.items()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    return {"grads": grads, "buffers": buffers, "random state": torch.get_rng_state()}


def _stepped(
    model: nn.Module, poses: Tensor, loss: Callable[[Tensor], Tensor], embed: Any
) -> dict[str, Any]:
    """What a step from one seed leaves behind, and the embeddings."""
    model, leaf = copy.deepcopy(model), poses.clone().requires_grad_()
    torch.manual_seed(3)
    embeddings = embed(model, leaf)
    loss(embeddings).backward()
    return _state(model, leaf) | {"embeddings": embeddings.detach()}


@given(
    name=st.sampled_from(sorted(MODELS)),
    loss=st.sampled_from(sorted(LOSSES)),
    count=st.integers(2, 9),
    chunk_size=st.integers(1, 10),
    seed=st.integers(0, 2**31),
)
def test_any_loss_of_embeddings_is_that_of_plain_autograd(
    name: str, loss: str, count: int, chunk_size: int, seed: int
) -> None:
    torch.manual_seed(seed)
    if name in BATCHED_ONLY:
        count, chunk_size = count + count % 2, 2
    model, poses = _encoder(name), torch.randn(count, FEATURES, dtype=torch.float64)

    def embed(model: nn.Module, poses: Tensor) -> Tensor:
        return Engine(model, chunk_size=chunk_size).embed(poses)

    def plain(model: nn.Module, poses: Tensor) -> Tensor:
        return _plain(model, poses, chunk_size)

    found = _stepped(model, poses, LOSSES[loss], embed)
    expected = _stepped(model, poses, LOSSES[loss], plain)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["mlp", "dropout", "batch norm, training"])
def test_two_encoders_learn_from_pairs(name: str) -> None:
    encoders = [_encoder(name), _encoder(name)]
    batches = [torch.randn(8, FEATURES, dtype=torch.float64) for _ in encoders]
    twins = copy.deepcopy(encoders)

    torch.manual_seed(2)
    _contrast(*(_plain(m, x, 2) for m, x in zip(twins, batches, strict=True))).backward()
    torch.manual_seed(2)
    engines = [Engine(encoder, chunk_size=2) for encoder in encoders]
    _contrast(*(e.embed(x) for e, x in zip(engines, batches, strict=True))).backward()

    for encoder, twin in zip(encoders, twins, strict=True):
        torch.testing.assert_close(_state(encoder), _state(twin), rtol=1e-9, atol=1e-11)


def test_one_encoder_sees_both_views() -> None:
    model = _encoder("dropout")
    views = torch.randn(2, 6, FEATURES, dtype=torch.float64)
    twin = copy.deepcopy(model)
    torch.manual_seed(2)
    _contrast(*(_plain(twin, view, 2) for view in views)).backward()
    torch.manual_seed(2)
    engine = Engine(model, chunk_size=2)
    _contrast(*map(engine.embed, views)).backward()
    torch.testing.assert_close(_state(model), _state(twin), rtol=1e-9, atol=1e-11)


def test_embeddings_serve_several_losses() -> None:
    model, poses = _encoder("dropout"), torch.randn(6, FEATURES, dtype=torch.float64)
    twin = copy.deepcopy(model)

    def losses(embeddings: Tensor) -> None:
        embeddings.square().sum().backward(retain_graph=True)
        (embeddings[:2].sin().sum() + embeddings.mean()).backward()

    torch.manual_seed(2)
    losses(_plain(twin, poses, 4))
    torch.manual_seed(2)
    losses(Engine(model, chunk_size=4).embed(poses))
    torch.testing.assert_close(_state(model), _state(twin), rtol=1e-9, atol=1e-11)


def test_embeddings_may_be_changed_in_place() -> None:
    model, poses = _encoder("mlp"), torch.randn(6, FEATURES, dtype=torch.float64)
    twin = copy.deepcopy(model)
    for embeddings in (Engine(model, chunk_size=4).embed(poses), _plain(twin, poses, 4)):
        embeddings.div_(embeddings.detach().norm(dim=1, keepdim=True)).sin_()
        LOSSES["all pairs"](embeddings).backward()
    torch.testing.assert_close(_state(model), _state(twin), rtol=1e-9, atol=1e-11)


def test_embeddings_and_a_combined_prediction_share_a_loss() -> None:
    model, poses = _encoder("mlp"), torch.randn(6, FEATURES, dtype=torch.float64)
    twin = copy.deepcopy(model)
    engine = Engine(model, chunk_size=2)
    prediction, _ = engine.combine(poses, Min(2.0))
    (prediction.sum() + LOSSES["all pairs"](engine.embed(poses))).backward()
    (Min(2.0)(twin(poses)).sum() + LOSSES["all pairs"](twin(poses))).backward()
    torch.testing.assert_close(_state(model), _state(twin), rtol=1e-9, atol=1e-11)


def test_a_list_is_walked_and_a_mapping_is_sliced() -> None:
    model, poses = _encoder("mlp"), torch.randn(5, FEATURES, dtype=torch.float64)
    expected = model(poses)
    torch.testing.assert_close(Engine(model).embed(list(poses)), expected)
    engine = Engine(model, predict=lambda model, batch: model(batch["x"]), chunk_size=2)
    torch.testing.assert_close(engine.embed({"x": poses}), expected)


def test_images_embed_as_images() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh()).double()
    poses = torch.randn(5, 1, 4, 4, dtype=torch.float64)
    twin = copy.deepcopy(model)
    embeddings = Engine(model, chunk_size=2).embed(poses)
    assert embeddings.shape == (5, 2, 2, 2)
    embeddings.square().sum().backward()
    twin(poses).square().sum().backward()
    torch.testing.assert_close(_state(model), _state(twin))


def test_it_has_no_gradient_under_no_grad() -> None:
    model, poses = _encoder("mlp"), torch.randn(5, FEATURES, dtype=torch.float64)
    with torch.no_grad():
        found = Engine(model, chunk_size=2).embed(poses)
    assert not found.requires_grad
    torch.testing.assert_close(found, model(poses).detach())


def test_autocast_is_replayed() -> None:
    model, poses = _encoder("dropout").float(), torch.randn(8, FEATURES)
    twin = copy.deepcopy(model)
    for own, embed in ((model, Engine(model, chunk_size=4).embed), (twin, None)):
        torch.manual_seed(2)
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            embeddings = embed(poses) if embed else _plain(own, poses, 4)
        assert embeddings.dtype == torch.bfloat16
        embeddings.float().square().sum().backward()
    torch.testing.assert_close(_state(model)["grads"], _state(twin)["grads"], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("used", [1, 5, 32])
def test_it_does_the_work_of_a_rule_that_combines_nothing(used: int) -> None:
    """So poses that the loss does not need are not scored again."""
    model = Tallied()
    engine, poses = Engine(model, chunk_size=1), torch.randn(32)
    engine.embed(poses[:2])  # the first group is looked at closer
    counts = []
    for embed in (engine.embed, lambda poses: engine.combine(poses, lambda y: y).prediction):
        model.counts.clear()
        embed(poses)[:used].sum().backward()
        counts.append(dict(model.counts))
    assert counts[0] == counts[1]


def test_memory_does_not_grow_with_the_poses() -> None:
    model = nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 2))
    engine = Engine(model, chunk_size=16)

    def peak(m: int) -> int:
        poses = torch.randn(m, 64)
        with peak_live_bytes() as measured:
            engine.embed(poses).square().sum().backward()
        model.zero_grad()
        return measured.bytes

    peak(32)  # the first group is looked at closer
    assert peak(2048) <= peak(64) + 2048 * 2 * 4 * 8  # a few tensors of their size


def test_a_changed_parameter_is_refused() -> None:
    model, poses = _encoder("mlp"), torch.randn(5, FEATURES, dtype=torch.float64)
    embeddings = Engine(model, chunk_size=2).embed(poses)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    nn.init.zeros_(model[1].weight)
    with pytest.raises(StaleParametersError, match=r"or embed\(\) and backward\(\): 1\.weight"):
        embeddings.sum().backward()
    assert all(p.grad is None for p in model.parameters())


def test_changed_poses_are_refused() -> None:
    model, poses = _encoder("mlp"), torch.randn(5, FEATURES, dtype=torch.float64)
    embeddings = Engine(model).embed(list(poses))
    poses[3] = 0
    with pytest.raises(ReplayError, match="modified in place"):
        embeddings.sum().backward()


def test_second_derivatives_need_one_chunk() -> None:
    model, poses = _encoder("mlp"), torch.randn(5, FEATURES, dtype=torch.float64)

    def curvature(embeddings: Tensor) -> Tensor:
        weight = model[1].weight
        (first,) = torch.autograd.grad(embeddings.exp().sum(), weight, create_graph=True)
        return torch.autograd.grad(first.square().sum(), weight)[0]

    expected = curvature(model(poses))
    torch.testing.assert_close(curvature(Engine(model, chunk_size=5).embed(poses)), expected)
    with pytest.raises(HigherOrderError, match=r"embed\(\), a chunk_size that takes all"):
        curvature(Engine(model, chunk_size=2).embed(poses))


def test_bad_input_is_refused_as_by_combine() -> None:
    engine = Engine(_encoder("mlp"))
    poses = torch.randn(5, FEATURES, dtype=torch.float64)
    with pytest.raises(NoPosesError, match="There are no poses"):
        engine.embed([])
    with pytest.raises(NonFinitePredictionError, match=r"poses 2, predictions \[nan"):
        engine.embed(poses.index_fill(0, torch.tensor([2]), torch.nan))
    with pytest.raises(PosesMixError, match="depends on the poses that are scored together"):
        Engine(_encoder("batch norm, training")).embed(poses)
