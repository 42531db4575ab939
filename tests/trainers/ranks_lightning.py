"""Lightning with `strategy="ddp"` on the CPU, in two processes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.processes import process_group

pytest.importorskip("lightning", reason="pip install lightning")

from tests.trainers.with_lightning import assert_fits_like_a_plain_loop


@pytest.fixture(scope="module", autouse=True)
def _group() -> Iterator[None]:
    with process_group():
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The first rank's folder, in all of them."""
    shared = [tmp_path]
    dist.broadcast_object_list(shared)
    return shared[0]


@pytest.mark.parametrize("name", ["stream", "recompute", "auto, trained"])
def test_two_processes_fit_like_a_plain_loop(name: str, folder: Path) -> None:
    assert_fits_like_a_plain_loop(name, folder, ranks=dist.get_world_size())
