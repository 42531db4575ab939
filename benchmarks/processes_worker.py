"""What each process of the suite `processes` runs; the first one prints the rows."""

import copy
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.exact import gradients, largest_difference
from benchmarks.methods import RULES, TARGET
from benchmarks.models import MODELS
from benchmarks.peers import plain
from benchmarks.rounds import shuffled
from benchmarks.settings import Row, Settings
from posegrad import Engine

MODEL = MODELS["SchNet"]

Steps = dict[str, Callable[[str], object]]


def main(rules: Sequence[str], shares: Sequence[int], rounds: int) -> None:
    """Time the steps of all rules, together and alone."""
    Settings().prepare()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    network, poses = MODEL.make(), MODEL.poses(sum(shares))
    start = sum(shares[:rank])
    own = poses[start : start + shares[rank]]
    together = Engine(network, predict=MODEL.predict, process_group=dist.group.WORLD)
    alone = Engine(network, predict=MODEL.predict)
    steps: Steps = {
        "one process": partial(_step, alone, poses) if rank == 0 else lambda rule: None,
        f"{len(shares)} processes": partial(_step, together, own),
    }
    rows = []
    for rule in rules:
        rows += _rows(rule, steps, network, shares, rounds)
    if rank == 0:
        print(json.dumps(rows))
    dist.destroy_process_group()


def _rows(
    rule: str, steps: Steps, network: nn.Module, shares: Sequence[int], rounds: int
) -> list[Row]:
    exact = _reference(network, rule, sum(shares)) if dist.get_rank() == 0 else {}
    rows: dict[str, Row] = {}
    for name, step in steps.items():  # this warms up, too
        network.zero_grad()
        step(rule)
        error = largest_difference(gradients(network), exact) if exact else 0.0
        rows[name] = {"rule": rule, "method": name, "shares": list(shares)}
        rows[name] |= {"seconds": [], "gradient_error": error}
    for turn in range(rounds):
        for name in shuffled(list(steps), turn):
            network.zero_grad()
            dist.barrier()
            start = time.perf_counter()
            steps[name](rule)
            dist.barrier()  # the last one is done
            rows[name]["seconds"].append(time.perf_counter() - start)
    return list(rows.values())


def _step(engine: Engine, poses: Sequence[Any], rule: str) -> None:
    prediction, _ = engine.combine(poses, RULES[rule]())
    (prediction - TARGET).square().backward()


def _reference(network: nn.Module, rule: str, count: int) -> dict[str, torch.Tensor]:
    exact = copy.deepcopy(network).double()
    exact.zero_grad()
    poses = [MODEL.to(pose, "cpu", torch.float64) for pose in MODEL.poses(count)]
    plain(exact, MODEL.predict, poses, RULES[rule](), TARGET)
    return gradients(exact)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
