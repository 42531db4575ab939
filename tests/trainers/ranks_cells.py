"""The cells of the table in docs/trainers.md in two processes, each with batches of its own."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from tests.trainers.cells import CELLS, Cell, optimizer_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The first rank's folder, in all of them."""
    shared = [tmp_path]
    dist.broadcast_object_list(shared)
    return shared[0]


@pytest.mark.parametrize(("way", "setting"), CELLS)
def test_ddp(way: str, setting: str) -> None:
    cell = Cell(way, setting, dist.get_world_size())
    module, count = cell.module(), cell.setting.accumulated
    loss, optimizer = cell.way.loss(module), optimizer_of(module.parameters())
    ddp = DistributedDataParallel(module)
    for number, batch in enumerate(cell.batches()[dist.get_rank() :: cell.ranks], start=1):
        is_last = number % count == 0
        with nullcontext() if is_last else ddp.no_sync():
            with cell.setting.autocast():
                scalar = loss(ddp, batch)
            (scalar / count).backward()
        if is_last:
            optimizer.step()
            optimizer.zero_grad()
    cell.assert_trained(module)


@pytest.mark.parametrize(("way", "setting"), CELLS)
def test_lightning(way: str, setting: str, folder: Path) -> None:
    pytest.importorskip("lightning", reason="pip install lightning")
    from tests.trainers.with_lightning import Trained, trainer

    cell = Cell(way, setting, dist.get_world_size())
    module, batches = Trained(cell), cell.batches()
    options = {"precision": "bf16-mixed"} if cell.setting.half else {}
    own = trainer(
        folder,
        accumulate_grad_batches=cell.setting.accumulated,
        max_epochs=1,
        gradient_clip_val=None,
        devices=cell.ranks,
        strategy="ddp",
        **options,
    )
    sampler = DistributedSampler(batches, shuffle=False)
    own.fit(module, DataLoader(batches, batch_size=None, sampler=sampler))
    cell.assert_trained(module.module)


@pytest.mark.parametrize(("way", "setting"), CELLS)
def test_accelerate(way: str, setting: str) -> None:
    pytest.importorskip("accelerate", reason="pip install accelerate")
    from tests.trainers.with_accelerate import trained

    cell = Cell(way, setting, dist.get_world_size())
    cell.assert_trained(trained(cell))


@pytest.mark.parametrize("way", ["combine", "engine.loss"])
def test_hugging_face_trainer(way: str, folder: Path) -> None:
    pytest.importorskip("transformers", reason="pip install transformers")
    from tests.trainers.with_hugging_face import trained

    cell = Cell(way, "plain", dist.get_world_size())
    cell.assert_trained(trained(cell, folder))
