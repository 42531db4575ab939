"""Inner products of rows: every way to take them, and what they hold meanwhile."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from posegrad import Engine, PoseJacobian
from posegrad.jacobian._products import Products, _by_panels, inner_products
from posegrad.testing import peak_live_bytes

POSES, TOKENS, WIDTH = 8, 64, 512


@pytest.mark.parametrize("take", [inner_products, _by_panels])
@pytest.mark.parametrize("shape", [(1, 3), (16, 20_000), (17, 8_192), (256, 512), (321, 600)])
def test_inner_products_are_exact(take: Callable[[Tensor], Tensor], shape: tuple[int, int]) -> None:
    rows = torch.randn(shape)
    _assert_alike(take(rows), rows)


def test_inner_products_of_columns_that_are_no_block_in_memory() -> None:
    rows = torch.randn(600, 300).mT
    _assert_alike(inner_products(rows), rows)


def _assert_alike(gram: Tensor, rows: Tensor) -> None:
    """Compared as cosines, with float64."""
    exact = rows.double()
    lengths = exact.norm(dim=1)
    scale = torch.outer(lengths, lengths)
    torch.testing.assert_close(gram.double() / scale, exact @ exact.mT / scale, rtol=0, atol=1e-6)


def test_products_do_not_take_one_tensor_for_another_at_its_address() -> None:
    numbers, products = torch.randn(6, 6), Products()
    views = [numbers, numbers[:3], numbers.mT, numbers[:, :3], numbers]
    for first in views:
        for second in (v for v in views if v.shape[1] == first.shape[1]):
            torch.testing.assert_close(products.of(first, second), first @ second.mT)


def test_products_tell_a_tensor_from_its_negative_at_the_same_address() -> None:
    """The imaginary part of a complex conjugate is a view that differs in a flag alone."""
    z, products = torch.randn(4, 3, dtype=torch.complex64), Products()
    x, negative = z.imag, z.conj().imag
    assert x.data_ptr() == negative.data_ptr()
    assert x.stride() == negative.stride()
    for first, second in ((x, negative), (x, x), (negative, x), (negative, negative)):
        torch.testing.assert_close(products.of(first, second), first @ second.mT)


def test_products_of_a_shared_input_are_taken_once() -> None:
    """The queries, keys and values of an attention, with so many rows that few are kept."""
    x, products = torch.randn(1100, 8), Products()
    first = products.of(x, x)
    for _ in range(3):
        b = torch.randn(1100, 4)
        products.of(b, b)
        assert products.of(x, x) is first


def _deep(layers: int) -> PoseJacobian:
    """The Jacobian of a token-wise network: 512 rows of activations, 8 poses."""
    torch.manual_seed(0)
    network = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
    tokens = torch.randn(POSES, TOKENS, WIDTH)
    return Engine(network).jacobian(network(tokens).mean((1, 2)))


@pytest.mark.parametrize("take", [PoseJacobian.gramian, PoseJacobian.norms])
def test_long_activations_are_multiplied_without_forming_gradients(
    take: Callable[[PoseJacobian], Tensor],
) -> None:
    jacobian = _deep(3)
    with peak_live_bytes() as peak:
        take(jacobian)
    assert peak.bytes < POSES * WIDTH**2 * 4  # the rows of one weight


def test_a_gramian_holds_no_more_for_a_deeper_network() -> None:
    peaks = []
    for layers in (4, 12):
        jacobian = _deep(layers)
        with peak_live_bytes() as peak:
            jacobian.gramian()
        peaks.append(peak.bytes)
    assert peaks[1] < 1.1 * peaks[0]


@pytest.mark.parametrize("mean", [0.0, 1.0, 3.0, 10.0, 100.0])
def test_tokens_whose_gradients_cancel_lose_no_digits(mean: float) -> None:
    """Tokens alike but for noise, under cotangents that add up to nothing."""
    x = mean + torch.randn(POSES, TOKENS, WIDTH)
    factors = torch.randn(POSES, TOKENS, WIDTH)
    factors -= factors.mean(1, keepdim=True)
    layer = nn.Linear(WIDTH, WIDTH, bias=False)
    jacobian = Engine(layer, check="never").jacobian((layer(x) * factors).sum((1, 2)))
    rows = (factors.double().mT @ x.double()).flatten(1)
    exact = rows @ rows.mT
    lengths = exact.diagonal().sqrt()
    norms = jacobian.norms().double()
    gram = jacobian.gramian().double() / torch.outer(lengths, lengths)
    torch.testing.assert_close(norms / lengths, torch.ones_like(norms), rtol=0, atol=1e-4)
    torch.testing.assert_close(gram, exact / torch.outer(lengths, lengths), rtol=0, atol=1e-4)
