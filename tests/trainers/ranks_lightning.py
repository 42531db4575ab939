"""Lightning with `strategy="ddp"` on the CPU, in two processes."""

from pathlib import Path

import pytest
import torch.distributed as dist

pytest.importorskip("lightning", reason="pip install lightning")

from tests.trainers.with_lightning import assert_fits_like_a_plain_loop


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The first rank's folder, in all of them."""
    shared = [tmp_path]
    dist.broadcast_object_list(shared)
    return shared[0]


@pytest.mark.parametrize("name", ["stream", "recompute", "auto, trained"])
def test_two_processes_fit_like_a_plain_loop(name: str, folder: Path) -> None:
    assert_fits_like_a_plain_loop(name, folder, ranks=dist.get_world_size())
