"""Accelerate in two processes: each has compounds of its own."""

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("accelerate", reason="pip install accelerate")

from tests.trainers.oracle import RULES
from tests.trainers.with_accelerate import assert_trains_like_a_plain_loop


@pytest.mark.parametrize("name", RULES)
def test_two_processes_train_like_a_plain_loop(name: str) -> None:
    assert_trains_like_a_plain_loop(name, ranks=dist.get_world_size())


def test_each_process_has_one_thread() -> None:
    assert torch.get_num_threads() == 1
