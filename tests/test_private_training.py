"""The example on private training, much smaller than its page, and its step beside Opacus's."""

import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from examples.private.digits import load
from examples.private.network import network
from examples.private.step import Settings, plain_step, private_step

with_opacus = pytest.mark.skipif(
    find_spec("opacus") is None,
    reason="Opacus is not installed: pip install -c constraints.txt '.[private]'",
)
PEERS = ["Opacus, flat", "Opacus, ghost"]


@pytest.fixture(autouse=True)
def quiet() -> None:
    if find_spec("opacus") is not None:
        from examples.private.ways import ignore_known_warnings

        ignore_known_warnings()


@pytest.fixture(scope="module")
def data() -> TensorDataset:
    images, digits = load()[0].tensors
    return TensorDataset(images[:200].double(), digits[:200])


def _gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_images_are_held_out() -> None:
    known, unknown = ({tuple(i.flatten().tolist()) for i in part.tensors[0]} for part in load())
    assert len(known) == 1200
    assert not known & unknown


def test_without_noise_each_image_moves_the_parameters_by_c_at_most(data: TensorDataset) -> None:
    model, settings = network().double(), Settings(noise=0.0, expected=10)
    step = private_step(model, settings)
    for image, digit in zip(*(part[:5] for part in data.tensors), strict=True):
        step(image[None], digit[None])
        assert float(_gradient(model).norm()) <= 1.0 / 10 * (1 + 1e-9)


def test_the_noise_has_the_variance_that_accountants_assume(data: TensorDataset) -> None:
    """σ C in each coordinate of the clipped sum, independent: 30890 draws of a standard normal."""
    model, settings = network().double(), Settings(noise=1.7, max_norm=0.6, expected=50)
    clean = network().double()
    private_step(model, settings)(*data.tensors)
    private_step(clean, Settings(noise=0.0, max_norm=0.6, expected=50))(*data.tensors)
    normal = (_gradient(model) - _gradient(clean)) * 50 / (1.7 * 0.6)
    assert_standard_normal(normal)


def test_an_empty_draw_gives_noise_alone(data: TensorDataset) -> None:
    model, settings = network().double(), Settings(noise=1.7, max_norm=0.6, expected=50)
    private_step(model, settings)(*(part[:0] for part in data.tensors))
    assert_standard_normal(_gradient(model) * 50 / (1.7 * 0.6))


def assert_standard_normal(drawn: Tensor) -> None:
    """Mean, variance, fourth moment and correlation of neighbours, each to 4 standard errors."""
    n = drawn.numel()
    moments = [
        drawn.mean(),
        drawn.var() - 1,
        drawn.pow(4).mean() - 3,
        (drawn * drawn.roll(1)).mean(),
    ]
    errors = [1, math.sqrt(2), math.sqrt(96), 1]
    for found, error in zip(moments, errors, strict=True):
        assert abs(float(found)) < 4 * error / math.sqrt(n)


def test_a_step_without_privacy_is_that_of_the_sum(data: TensorDataset) -> None:
    """Where C is so large that nothing is clipped, the private one too."""
    models = network().double(), network().double()
    settings = Settings(noise=0.0, max_norm=1e6)
    plain_step(models[0], settings)(*data.tensors)
    private_step(models[1], settings)(*data.tensors)
    torch.testing.assert_close(_gradient(models[1]), _gradient(models[0]))


@with_opacus
@pytest.mark.parametrize("peer", PEERS)
def test_the_clipped_sum_is_that_of_opacus(peer: str, data: TensorDataset) -> None:
    """Of a Poisson batch; to 1e-6, which Opacus adds to a norm before it divides by it."""
    from examples.private.ways import WAYS

    models, settings = (network().double(), network().double()), Settings(noise=0.0, expected=50)
    for name, model in zip(("posegrad", peer), models, strict=True):
        prepared = WAYS[name](model, data, settings)
        prepared.step(*next(iter(prepared.loader)))
    ours, theirs = (50 * _gradient(model) for model in models)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@with_opacus
@pytest.mark.parametrize("peer", PEERS)
def test_a_private_training_is_that_of_opacus(peer: str) -> None:
    """Two epochs of Poisson batches: the same images, noise and ε; what differs is rounding."""
    from examples.private.training import train
    from examples.private.ways import WAYS

    data, held_out = load()
    data, settings = TensorDataset(*data[:200]), Settings(noise=1.3, expected=50)
    models, spent = [], []
    for name in ("posegrad", peer):
        models.append(network())
        prepared = WAYS[name](models[-1], data, settings)
        epochs = train(models[-1], prepared, held_out, epochs=2, name=name)
        spent.append([epoch.epsilon for epoch in epochs])
    assert spent[0] == spent[1]
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5)


@with_opacus
def test_an_empty_draw_counts_as_a_step(data: TensorDataset) -> None:
    """With one image expected of 200, a third of the draws are empty."""
    from opacus.accountants import PRVAccountant

    from examples.private.ways import DELTA, WAYS

    model, settings = network().double(), Settings(noise=1.3, expected=1)
    prepared = WAYS["posegrad"](model, data, settings)
    sizes = []
    for images, digits in prepared.loader:
        before = [p.clone() for p in model.parameters()]
        prepared.step(images.double(), digits)
        assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        sizes.append(len(digits))
        if len(sizes) == 20:
            break
    assert 0 in sizes
    alike = PRVAccountant()
    for _ in sizes:
        alike.step(noise_multiplier=1.3, sample_rate=1 / 200)
    assert prepared.epsilon() == alike.get_epsilon(delta=DELTA) > 0


@with_opacus
def test_it_prints_and_draws(tmp_path: Path) -> None:
    from examples.private.report import run
    from examples.private.ways import WAYS

    picture = tmp_path / "new" / "private.png"
    text = run(3.0, 1, 1, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert all(name in text for name in (*WAYS, str(picture)))
