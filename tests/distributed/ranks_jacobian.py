"""The rows of all ranks are one Jacobian, and every rule sees all of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchjd import aggregation as theirs

from posegrad import (
    Clip,
    Combination,
    Engine,
    Jacobian,
    ListeningError,
    Mean,
    Median,
    NoPosesError,
    PoseJacobian,
    RankError,
    ShapeMismatchError,
    SignAgreement,
    StaleFactorError,
    TrimmedMean,
    UnsupportedModuleError,
)
from posegrad.jacobian import SharedJacobian
from posegrad.testing import peak_live_bytes
from tests.device import seeded
from tests.distributed.setting import M, gradients, mine, network, same_everywhere


def _images() -> nn.Module:
    torch.manual_seed(0)
    body = (nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(12, 1))
    return nn.Sequential(*body).double()


def _tokens() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(20, 1)).double()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP": (network, (5,)),
    "convolutions": (_images, (2, 5)),
    "attention": (_tokens, (5, 4)),
}


def made(name: str, *, in_chunks: bool = False) -> tuple[nn.Module, SharedJacobian, PoseJacobian]:
    make, shape = NETWORKS[name]
    model, generator = make(), seeded(1)
    X = torch.randn(M, *shape, generator=generator, dtype=torch.float64)
    engine = Engine(model, chunk_size=3, process_group=dist.group.WORLD)
    shared = engine.gather(mine(X)) if in_chunks else engine.jacobian(model(mine(X)).squeeze(1))
    return model, shared, Engine(model).jacobian(model(X).squeeze(1))


@pytest.mark.parametrize("in_chunks", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_products_are_those_of_one_process(name: str, in_chunks: bool) -> None:
    _, shared, alone = made(name, in_chunks=in_chunks)
    w = torch.randn(M, generator=seeded(2), dtype=torch.float64)
    close = torch.testing.assert_close
    close(shared.predictions, alone.predictions)
    close(shared.gramian(), alone.gramian())
    close(shared.gramian(torch.float32), alone.gramian(torch.float32))
    close(shared.gramian(per_parameter=True), alone.gramian(per_parameter=True))
    close(shared.norms(), alone.norms())
    close(shared.combine(w), alone.combine(w))
    close(shared.matrix(), alone.matrix())
    close(shared[3], alone[3])
    close(list(shared), list(alone))
    first = next(iter(shared.shapes))
    close(shared.block(first), alone.block(first))
    assert shared.used == alone.used
    assert shared.shapes == alone.shapes
    assert (len(shared), shared.output_shape) == (len(alone), alone.output_shape)
    assert "closed form" in shared.report() or not len(shared.own)
    assert f"ranks={dist.get_world_size()}" in repr(shared)


RULES: dict[str, Callable[[], Any]] = {
    "weights": lambda: torch.arange(M, dtype=torch.float64),
    "Mean": Mean,
    "Clip": lambda: Clip(0.5),
    "Clip with noise": lambda: Clip(0.5, noise_multiplier=1.0, generator=seeded(3)),
    "TrimmedMean": lambda: TrimmedMean(2),
    "Median": Median,
    "SignAgreement": lambda: SignAgreement(0.5),
    "UPGrad": theirs.UPGrad,
    "UPGradWeighting": theirs.UPGradWeighting,
    "MGDAWeighting": theirs.MGDAWeighting,
    "ConFIG": theirs.ConFIG,
    "AlignedMTL": theirs.AlignedMTL,
}


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_sees_the_rows_of_all_ranks(rule: str) -> None:
    model, shared, alone = made("MLP")
    weights: list[Tensor | None] = []
    found = gradients([model], lambda: weights.append(shared.backward(RULES[rule]())))
    expected = gradients([model], lambda: weights.append(alone.backward(RULES[rule]())))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-8, atol=1e-10)
    assert same_everywhere(found)


@pytest.mark.parametrize("kept", [1, M])
def test_what_each_rank_hears_is_one_jacobian(kept: int) -> None:
    model, _, alone = made("MLP")
    X = torch.randn(M, 5, generator=seeded(1), dtype=torch.float64)
    mask = torch.arange(M) < kept  # one pose of all ranks, or all of them
    losses = model(mine(X)).squeeze(1)
    with Engine(model, process_group=dist.group.WORLD).listen(losses) as heard:
        if len(losses):
            (losses * mine(mask)).sum().backward()
    matrix = alone.matrix()[:kept]
    torch.testing.assert_close(heard.jacobian.matrix(), matrix)
    torch.testing.assert_close(heard.jacobian.gramian(), matrix @ matrix.T)
    model.zero_grad()


def test_a_rank_that_heard_nothing_is_named_by_all() -> None:
    model, *_ = made("MLP")
    X = torch.randn(2, 5, dtype=torch.float64)
    losses = model(X).squeeze(1)
    with Engine(model, process_group=dist.group.WORLD).listen(losses) as heard:
        if dist.get_rank():
            losses.sum().backward()
    model.zero_grad()
    error = RankError if dist.get_rank() else ListeningError
    with pytest.raises(error, match=r"No backward came"):
        _ = heard.jacobian


def test_weights_drawn_at_random_are_those_of_the_first_rank() -> None:
    model, shared, alone = made("MLP")
    torch.manual_seed(dist.get_rank())
    found = gradients([model], lambda: shared.backward(theirs.RandomWeighting()))
    assert same_everywhere(found)
    torch.manual_seed(0)
    expected = gradients([model], lambda: alone.backward(theirs.RandomWeighting()))
    torch.testing.assert_close(found, expected)


class Drawn(Combination):
    """A trained rule that draws its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, predictions: Tensor) -> Tensor:
        return self.scale * (predictions * torch.rand_like(predictions)).sum()


def test_a_trained_rule_that_draws_has_one_gradient() -> None:
    model, shared, _ = made("MLP")
    rule = Drawn()
    torch.manual_seed(dist.get_rank())
    weights = shared.backward(rule)
    found = {"rule": rule.scale.grad, "weights": weights, "first": model[0].weight.grad}
    assert same_everywhere(found)


def test_noise_of_ones_own_on_each_rank_is_refused() -> None:
    model, shared, _ = made("MLP")
    own = seeded(dist.get_rank())
    with pytest.raises(RankError, match="different gradients of the same rows"):
        shared.backward(Clip(0.5, noise_multiplier=1.0, generator=own))
    assert all(p.grad is None for p in model.parameters())


def test_engine_backward_and_gramian() -> None:
    model = network()
    X = torch.randn(M, 5, generator=seeded(1), dtype=torch.float64)
    engine = Engine(model, process_group=dist.group.WORLD)
    output = model(mine(X)).squeeze(1)
    gramian = engine.compute_gramian(output)
    torch.testing.assert_close(gramian, Engine(model).compute_gramian(model(X).squeeze(1)))
    found = gradients([model], lambda: engine.backward(output, theirs.UPGradWeighting()))
    alone = Engine(model)
    expected = gradients(
        [model], lambda: alone.backward(model(X).squeeze(1), theirs.UPGradWeighting())
    )
    torch.testing.assert_close(found, expected)


def test_several_numbers_a_pose() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    X = torch.randn(M, 5, generator=seeded(1), dtype=torch.float64)
    shared = Engine(model, process_group=dist.group.WORLD).jacobian(model(mine(X)))
    alone = Engine(model).jacobian(model(X))
    torch.testing.assert_close(shared.gramian(), alone.gramian())
    torch.testing.assert_close(shared.norms(), alone.norms())
    torch.testing.assert_close(shared.block("0.weight"), alone.block("0.weight"))
    w = torch.ones(M, 2, dtype=torch.float64)
    torch.testing.assert_close(shared.combine(w), alone.combine(w))


def test_a_parameter_that_only_one_rank_uses() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(5, 1), nn.Linear(5, 1), nn.Linear(5, 1)]).double()
    X = torch.randn(M, 5, generator=seeded(1), dtype=torch.float64)
    number = min(dist.get_rank(), 1)
    engine = Engine(model, process_group=dist.group.WORLD)
    shared = engine.jacobian(model[number](mine(X)).squeeze(1))
    assert shared.used == ["0.weight", "0.bias", "1.weight", "1.bias"]
    found = gradients([model], lambda: shared.backward(torch.ones(M, dtype=torch.float64)))
    assert found["0.2.weight"] is None
    rest = X[len(X.split([8, 3])[0]) :]
    torch.testing.assert_close(found["0.1.weight"], rest.sum(0, keepdim=True))
    assert same_everywhere(found)


def test_a_tensor_changed_in_place_on_one_rank_stops_all() -> None:
    model, shared, _ = made("MLP")
    x = mine(torch.randn(M, 5, dtype=torch.float64))
    engine = Engine(model, process_group=dist.group.WORLD)
    shared = engine.jacobian(model(x).squeeze(1))
    if dist.get_rank() == 0:
        x.add_(1)
    kind = StaleFactorError if dist.get_rank() == 0 else RankError
    for product in (shared.gramian, shared.matrix, lambda: shared.combine(torch.ones(M))):
        with pytest.raises(kind, match="changed in place"):
            product()


def test_bad_input_is_refused() -> None:
    model, shared, _ = made("MLP")
    engine = Engine(model, process_group=dist.group.WORLD)
    with pytest.raises(ShapeMismatchError, match="the output of all ranks"):
        shared.combine(torch.ones(M + 1))
    with pytest.raises(IndexError, match="out of range"):
        shared[M]
    with pytest.raises(NoPosesError, match="No rank has predictions"):
        engine.gather([])
    with pytest.raises(ShapeMismatchError, match="joined along dimension 0"):
        engine.jacobian(model(torch.ones(1, 5, dtype=torch.float64)).sum())


def test_no_rank_has_the_rows_of_all_layers() -> None:
    """Rows travel layer by layer: the peak is a few copies of one layer's, not of all ten."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(10)], nn.Linear(64, 1))
    x = torch.randn(12, 64)
    engine = Engine(model, process_group=dist.group.WORLD)
    shared = engine.gather(list(x), form="dense")
    layer = 12 * dist.get_world_size() * 64 * 64 * 4  # bytes of the rows of all ranks
    with peak_live_bytes() as peak:
        shared.gramian()
    assert peak.bytes < 5 * layer


@pytest.mark.parametrize("in_chunks", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_operator_is_that_of_one_process(name: str, in_chunks: bool) -> None:
    _, shared, alone = made(name, in_chunks=in_chunks)
    close = torch.testing.assert_close
    n = shared.shape[1]
    v = torch.randn(n, 2, generator=seeded(2), dtype=torch.float64)
    w = torch.randn(M, generator=seeded(3), dtype=torch.float64)
    assert shared.shape == alone.shape
    close(shared @ v[:, 0], alone @ v[:, 0])
    close(shared @ v, alone @ v)
    close(w @ shared, w @ alone)
    close(shared.T @ w, alone.T @ w)
    close(shared @ shared.T, alone.gramian())
    close(shared.norms(per_parameter=True), alone.norms(per_parameter=True))
    close(shared.project(9, seed=1), alone.project(9, seed=1))
    close(shared.solve(w, 0.1), alone.solve(w, 0.1))
    close(shared.to("cpu").norms(), alone.norms())


INDICES: dict[str, Any] = {
    "slice": slice(2, 9),
    "backwards": slice(None, None, -1),
    "numbers": [10, 0, 3, 3],
    "mask": torch.arange(M) % 3 == 0,
    "none": slice(0, 0),
    "those of one": slice(9, 11),
}


@pytest.mark.parametrize("index", INDICES)
def test_an_index_picks_rows_of_all_ranks(index: str) -> None:
    _, shared, alone = made("convolutions")
    part, expected = shared[INDICES[index]], alone[INDICES[index]]
    v = torch.randn(shared.shape[1], generator=seeded(2), dtype=torch.float64)
    w = torch.randn(len(part), generator=seeded(3), dtype=torch.float64)
    close = torch.testing.assert_close
    close(part.output, expected.output)
    close(part.matrix(), expected.matrix())
    close(part.gramian(), expected.gramian())
    close(part.norms(), expected.norms())
    close(part @ v, expected @ v)
    close(w @ part, w @ expected)
    close(shared @ part.T, alone @ expected.T)
    close(part @ shared.T, expected @ alone.T)
    close(list(part), list(expected))
    both = Jacobian.cat([part, shared, part])
    close(both.matrix(), torch.cat([expected.matrix(), alone.matrix(), expected.matrix()]))
    close(both.gramian(), Jacobian.cat([expected, alone, expected]).gramian())
    close(both[::2].norms(), both.norms()[::2])


def test_directions_that_differ_from_rank_to_rank_are_refused() -> None:
    _, shared, alone = made("MLP")
    own = torch.full((shared.shape[1],), float(1 + dist.get_rank()), dtype=torch.float64)
    with pytest.raises(RankError, match="along different directions"):
        shared @ own
    with pytest.raises(TypeError, match="rows that ranks share do not go together"):
        shared @ alone.T


def test_projections_are_those_of_all() -> None:
    model = network()
    X = torch.randn(M, 5, generator=seeded(1), dtype=torch.float64)
    engine = Engine(model, process_group=dist.group.WORLD)
    torch.testing.assert_close(engine.project(mine(X), 4), Engine(model).project(X, 4))


def test_activations_are_of_one_rank() -> None:
    model = network()
    hidden = model[:4](mine(torch.randn(M, 5, generator=seeded(1), dtype=torch.float64)))
    engine = Engine(model, process_group=dist.group.WORLD)
    with pytest.raises(UnsupportedModuleError, match=r"params\[0\]: each rank has activations"):
        engine.jacobian(model[4](hidden).squeeze(1), params=[hidden])
