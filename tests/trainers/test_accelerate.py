"""Accelerate in one process; `ranks_accelerate.py` has two."""

import pytest
import torch

pytest.importorskip("accelerate", reason="pip install accelerate")

from posegrad import Mean, MultiPose
from tests.schedules import SCHEDULES
from tests.trainers.oracle import RULES, compounds, network, plain_loss
from tests.trainers.with_accelerate import accelerator, assert_trains_like_a_plain_loop


@pytest.mark.parametrize("name", RULES)
def test_a_process_trains_like_a_plain_loop(name: str) -> None:
    assert_trains_like_a_plain_loop(name, ranks=1)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_mixed_precision(schedule: str) -> None:
    poses, target = (t.float() for t in compounds(1)[0])
    plain = network().float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = plain_loss(plain, Mean(), (poses, target))
    loss.backward()

    with accelerator(mixed_precision="bf16") as own:
        module = own.prepare(MultiPose(network().float(), Mean(), schedule=schedule))
        prediction, _ = module(poses)
        assert prediction.dtype == torch.float32  # Accelerate widens what a model returns
        own.backward((prediction - target).square())
        for p, q in zip(module.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=2e-2, atol=2e-2)
