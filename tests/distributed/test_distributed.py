"""Real process groups: all files `ranks_*.py` of the tests are run by all ranks at once.

Many in one group, since most of the time goes into imports. Poses, rows and parameters are divided
by three, which is uneven; trainers and wrappers have two processes.
"""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from posegrad import Min
from tests.processes import ROOT, run, run_tests
from tests.trainers.oracle import plain_step

BY_THREE = ("combine", "embed", "fsdp", "idle", "jacobian")
THREE = [Path(__file__).with_name(f"ranks_{name}.py") for name in BY_THREE]
TWO = sorted({*Path(__file__).parents[1].glob("*/ranks_*.py")} - {*THREE})


def test_there_are_tests_for_ranks() -> None:
    assert {file.stem for file in TWO} >= {"ranks_loss", "ranks_lightning", "ranks_accelerate"}


@pytest.mark.parametrize(("processes", "files"), [(2, TWO), (3, THREE)])
def test_ranks(processes: int, files: list[Path]) -> None:
    printed = run_tests(*files, processes=processes, timeout=600)
    assert printed.count(" passed") == processes


def test_the_script_of_the_page_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    [script] = re.findall(r"^```python share\.py\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "share.py").write_text(script, encoding="utf-8")
    run("share.py", folder=tmp_path)

    model = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 1))  # seeded as there
    compounds = [(torch.randn(m, 8), torch.randn(())) for m in (12, 7, 16, 9)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for compound in 2 * compounds:
        optimizer.zero_grad()
        plain_step(model, Min(scale=1000.0), [compound])
        optimizer.step()
    found = torch.load(tmp_path / "model.pt")
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.detach(), rtol=1e-4, atol=1e-5)
