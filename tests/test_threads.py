"""A process that forks while another of its threads is inside an engine."""

import os
import subprocess
import sys

import pytest

FORK = """
import os, signal, threading
import torch
from torch import nn
from posegrad import Engine, Mean

torch.set_num_threads(1)
inside, forked = threading.Event(), threading.Event()


class Waiting(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, cotangent):
        inside.set()
        forked.wait()
        return cotangent


def step(engine):
    prediction, _ = engine.combine(torch.ones(2, 3), Mean(), schedule="stream")
    prediction.backward()


model = nn.Linear(3, 1)
slow = Engine(model, predict=lambda model, pose: Waiting.apply(model(pose)))
thread = threading.Thread(target=step, args=(slow,))
thread.start()
inside.wait()
child = os.fork()
if child == 0:
    signal.alarm(20)  # ends it if it hangs
    step(Engine(nn.Linear(3, 1)))
    os._exit(0)
forked.set()
thread.join()
print(f"child {os.waitpid(child, 0)[1]}, gradient {model.weight.grad.tolist()}")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_child_forked_during_a_first_pass_does_not_hang() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run(
        [sys.executable, "-c", FORK], env=environment, capture_output=True, text=True, timeout=60
    )
    assert "child 0, gradient [[1.0, 1.0, 1.0]]" in run.stdout, run.stderr
