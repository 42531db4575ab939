"""The script of the page, in two processes; `ranks_*.py` are run by tests/distributed."""

import re
from pathlib import Path

import torch
from torch import nn

from posegrad import Min
from tests.processes import ROOT, run
from tests.trainers.oracle import plain_step


def test_the_script_of_the_page_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    [script] = re.findall(r"^```python train\.py\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "train.py").write_text(script, encoding="utf-8")
    run("train.py", folder=tmp_path)

    compounds = [(torch.randn(m, 8), torch.randn(())) for m in (12, 7, 16, 9)]  # seeded as there
    model = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in (0, 1, 0, 1):
        optimizer.zero_grad()
        plain_step(model, Min(scale=1000.0), compounds[2 * step : 2 * step + 2])
        optimizer.step()
    found = torch.load(tmp_path / "model.pt")
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[f"model.{name}"], p.detach(), rtol=1e-4, atol=1e-5)
