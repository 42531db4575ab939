"""Inner products of rows: every way to take them, and what they hold meanwhile."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from posegrad import Engine, PoseJacobian
from posegrad.jacobian import _products
from posegrad.jacobian._products import Products, inner_products
from posegrad.testing import peak_live_bytes

POSES, TOKENS, WIDTH = 8, 64, 512


def _by(way: str) -> Callable[[Tensor], Tensor]:
    found: Callable[[Tensor], Tensor] = getattr(_products, way)
    return found


@pytest.mark.parametrize("way", ["inner_products", "_by_tiles", "_by_panels"])
@pytest.mark.parametrize("shape", [(1, 3), (16, 20_000), (17, 8_192), (256, 512), (321, 600)])
def test_inner_products_are_exact(way: str, shape: tuple[int, int]) -> None:
    rows = torch.randn(shape)
    sizes = rows.double().norm(dim=1)
    exact = rows.double() @ rows.double().mT / torch.outer(sizes, sizes)
    found = _by(way)(rows).double() / torch.outer(sizes, sizes)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-6)


def test_inner_products_of_columns_that_are_no_block_in_memory() -> None:
    rows = torch.randn(600, 300).mT
    torch.testing.assert_close(inner_products(rows), rows.contiguous() @ rows.mT)


def test_products_do_not_take_one_tensor_for_another_at_its_address() -> None:
    numbers, products = torch.randn(6, 6), Products()
    views = [numbers, numbers[:3], numbers.mT, numbers[:, :3], numbers]
    for first in views:
        for second in (v for v in views if v.shape[1] == first.shape[1]):
            torch.testing.assert_close(products.of(first, second), first @ second.mT)


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
