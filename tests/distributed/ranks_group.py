"""What `run_tests` promises: one group of all processes, of one thread each."""

import torch
import torch.distributed as dist


def test_ranks_add_up() -> None:
    number = torch.tensor(dist.get_rank() + 1)
    dist.all_reduce(number)
    assert number == sum(range(1, dist.get_world_size() + 1))
    assert torch.get_num_threads() == 1
