"""Lightning in one process; `ranks_lightning.py` has two."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning", reason="pip install lightning")

from torch.utils.data import DataLoader

from posegrad import Mean
from tests.schedules import SCHEDULES
from tests.trainers.oracle import RULES, compounds, network, plain_loss
from tests.trainers.with_lightning import Affinity, assert_fits_like_a_plain_loop, trainer


@pytest.mark.parametrize("name", RULES)
def test_a_process_fits_like_a_plain_loop(name: str, tmp_path: Path) -> None:
    assert_fits_like_a_plain_loop(name, tmp_path)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_mixed_precision(schedule: str, tmp_path: Path) -> None:
    compound = tuple(t.float() for t in compounds(1)[0])
    plain = network().float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = plain_loss(plain, Mean(), compound)
    loss.backward()
    torch.optim.SGD(plain.parameters(), lr=0.2).step()

    module = Affinity(Mean(), schedule).float()
    options = {"max_epochs": 1, "precision": "bf16-mixed", "gradient_clip_val": None}
    trainer(tmp_path, **options).fit(module, DataLoader([compound], batch_size=None))
    start = network().float()
    rows = zip(module.parameters(), plain.parameters(), start.parameters(), strict=True)
    for found, expected, before in rows:
        torch.testing.assert_close(found - before, expected - before, rtol=2e-2, atol=2e-2)
        assert not torch.equal(found, before)
