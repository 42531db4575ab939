"""A loop of Accelerate's, and the same by hand."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

from posegrad import MultiPose
from tests.trainers.cells import Cell, optimizer_of
from tests.trainers.oracle import RULES, assert_same, compounds, network, plain_step

ACCUMULATED, STEPS, MAX_NORM = 2, 3, 0.3


def training(module: torch.nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    """An optimizer with momentum, and a schedule that changes every step."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.2, momentum=0.9)
    return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)


@contextmanager
def accelerator(**options: Any) -> Iterator[Accelerator]:
    """One of its own: Accelerate shares its state among all accelerators of a process."""
    try:
        # By default a schedule takes one step for each process, as if each had batches of another.
        yield Accelerator(cpu=True, step_scheduler_with_optimizer=False, **options)
    finally:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()


def assert_trains_like_a_plain_loop(name: str, *, ranks: int) -> None:
    """Accumulation, clipping by the norm of all, and a schedule, over several steps."""
    schedule, rule = RULES[name]
    plain = MultiPose(network(), rule())
    optimizer, scheduler = training(plain)
    size = ACCUMULATED * ranks  # compounds of one step
    data = compounds(STEPS * size)
    norms = []
    for step in range(STEPS):
        plain_step(plain.model, plain.rule, data[step * size : (step + 1) * size])
        norms.append(torch.nn.utils.clip_grad_norm_(plain.parameters(), MAX_NORM))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert max(norms) > MAX_NORM  # something was clipped

    with accelerator(gradient_accumulation_steps=ACCUMULATED) as own:
        assert own.num_processes == ranks
        module = MultiPose(network(), rule(), schedule=schedule)
        module, optimizer, scheduler = own.prepare(module, *training(module))
        found = []
        for poses, target in data[own.process_index :: ranks]:
            with own.accumulate(module):
                prediction, _ = module(poses)
                own.backward((prediction - target).square())
                if own.sync_gradients:
                    found.append(own.clip_grad_norm_(module.parameters(), MAX_NORM))
                optimizer.step()
                optimizer.zero_grad()
            if own.sync_gradients:
                scheduler.step()
        torch.testing.assert_close(torch.stack(found), torch.stack(norms), rtol=1e-10, atol=1e-10)
        assert_same(own.unwrap_model(module), plain)


def trained(cell: Cell) -> torch.nn.Module:
    """The module of a cell of the table, after all steps."""
    options: dict[str, Any] = {"mixed_precision": "bf16"} if cell.setting.half else {}
    with accelerator(gradient_accumulation_steps=cell.setting.accumulated, **options) as own:
        module = cell.module()
        loss, optimizer = cell.way.loss(module), optimizer_of(module.parameters())
        wrapped, optimizer = own.prepare(module, optimizer)
        for batch in cell.batches()[own.process_index :: own.num_processes]:
            with own.accumulate(wrapped):
                own.backward(loss(wrapped, batch))
                optimizer.step()
                optimizer.zero_grad()
        return own.unwrap_model(wrapped)
