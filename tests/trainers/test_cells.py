"""Every cell of the table in docs/trainers.md, in one process; `ranks_cells.py` has two."""

import re
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from tests.processes import ROOT
from tests.trainers.cells import CELLS, Cell, optimizer_of


@pytest.mark.parametrize(("way", "setting"), CELLS)
def test_a_plain_loop(way: str, setting: str) -> None:
    cell = Cell(way, setting)
    module, count = cell.module(), cell.setting.accumulated
    loss, optimizer = cell.way.loss(module), optimizer_of(module.parameters())
    for number, batch in enumerate(cell.batches(), start=1):
        with cell.setting.autocast():
            scalar = loss(module, batch)
        (scalar / count).backward()
        if number % count == 0:
            optimizer.step()
            optimizer.zero_grad()
    cell.assert_trained(module)


@pytest.mark.parametrize(("way", "setting"), CELLS)
def test_lightning(way: str, setting: str, tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="pip install lightning")
    from tests.trainers.with_lightning import Trained, trainer

    cell = Cell(way, setting)
    module = Trained(cell)
    options: dict[str, Any] = {"precision": "bf16-mixed"} if cell.setting.half else {}
    options |= {"max_epochs": 1, "gradient_clip_val": None}
    own = trainer(tmp_path, accumulate_grad_batches=cell.setting.accumulated, **options)
    own.fit(module, DataLoader(cell.batches(), batch_size=None))
    cell.assert_trained(module.module)


@pytest.mark.parametrize(("way", "setting"), CELLS)
def test_hugging_face_trainer(way: str, setting: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="pip install transformers")
    from tests.trainers.with_hugging_face import trained

    cell = Cell(way, setting)
    cell.assert_trained(trained(cell, tmp_path))


@pytest.mark.parametrize(("way", "setting"), CELLS)
def test_accelerate(way: str, setting: str) -> None:
    pytest.importorskip("accelerate", reason="pip install accelerate")
    from tests.trainers.with_accelerate import trained

    cell = Cell(way, setting)
    cell.assert_trained(trained(cell))


def test_the_script_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="pip install transformers")
    page = (ROOT / "docs" / "trainers.md").read_text(encoding="utf-8")
    [script] = re.findall(r"^```python rule_trainer\.py\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(script, "rule_trainer.py", "exec"), {"__name__": "rule_trainer"})
