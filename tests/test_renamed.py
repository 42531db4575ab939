"""Rows and gradients stay exact under a release of torch that has renamed what `_torch.py` uses.

Each private name is hidden there, one after the other, and each thing that operators save.
"""

import inspect
import re
from collections.abc import Callable
from contextlib import nullcontext
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from posegrad import Boltzmann, Clip, Engine, _torch
from posegrad.errors import StaleFactorError
from tests.architectures import ARCHITECTURES, Architecture
from tests.reference import rows, trainable
from tests.schedules import SCHEDULES
from tests.test_private_names import foreign

SOURCE = inspect.getsource(_torch)
NAMES = sorted({*foreign(SOURCE), "_raw_saved_", "unpack_hook", "get_capabilities"})
MADE_OF_OTHERS = {"ViT", "TransformerDecoder", "TransformerEncoder, dropout", "GRU, bidirectional"}
DENSE = [name for name, row in ARCHITECTURES.items() if row.dense and name not in MADE_OF_OTHERS]


def hide(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives the functions of `_torch` the code they would have if they looked for another name.

    Others have imported them, so they stay the same objects.
    """
    renamed: dict[str, Any] = {"__name__": _torch.__name__}
    exec(re.sub(rf"(?<![A-Za-z]){name}(?![a-z])", "_of_tomorrow", SOURCE), renamed)
    for key, function in renamed.items():
        new, own = inspect.unwrap(function), inspect.unwrap(getattr(_torch, key, function))
        if isinstance(new, FunctionType) and new is not own:
            monkeypatch.setattr(own, "__code__", new.__code__)
    monkeypatch.setattr(_torch, "_SLOTS", {})
    _torch.tells_slots.cache_clear()


@pytest.fixture
def hidden(monkeypatch: pytest.MonkeyPatch) -> Any:
    """To be called with the name that is to be hidden."""
    with monkeypatch.context() as patch:
        yield lambda name: hide(name, patch)
    _torch.tells_slots.cache_clear()


class Net(nn.Module):
    """Layers, a checkpoint, a buffer, rows picked by number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1)
        self.register_buffer("shift", torch.ones(4))
        self.double()

    def forward(self, poses: Tensor) -> Tensor:
        made = checkpoint(self.norm, self.first(poses).tanh(), use_reentrant=False)
        picked = made[torch.arange(len(poses)).flip(0)] + self.shift
        return self.last(picked.softmax(1)).squeeze(1)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:Nested tensors are in the graph:UserWarning")
@pytest.mark.filterwarnings("ignore:The predictions of different poses:UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_rows_without_a_private_name(name: str, hidden: Callable[[str], None]) -> None:
    model = Net()
    hidden(name)
    engine = Engine(model)
    for poses in (4, 4, 4, 5):  # found out, remembered, of another size
        output = model(drawn(poses, 3))
        expected = rows(output, trainable(model))
        torch.testing.assert_close(engine.jacobian(output).matrix(), expected)


@pytest.mark.filterwarnings("ignore:The predictions of different poses:UserWarning")
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_without_a_private_name(
    name: str, schedule: str, hidden: Callable[[str], None]
) -> None:
    model, poses = Net(), drawn(4, 3)
    expected = torch.autograd.grad(Boltzmann(kT=1.0)(model(poses)), [*model.parameters()])
    hidden(name)
    engine = Engine(model, predict=lambda model, pose: model(pose[None]).squeeze(0))
    refused = name == "_input_metadata" and schedule in ("store", "stream")
    with pytest.raises(ValueError, match="float16") if refused else nullcontext():
        # Which dtypes gradients pass is not told then; these schedules cannot scale a loss.
        engine.combine(list(poses), Boltzmann(kT=1.0), schedule=schedule).prediction.backward()
        torch.testing.assert_close([p.grad for p in model.parameters()], [*expected])


def test_distances_without_the_backward_of_their_own(hidden: Callable[[str], None]) -> None:
    row = ARCHITECTURES["Distances to a parameter"]
    hidden("_cdist_backward")
    compare(row)


def test_a_factor_that_was_changed_is_seen_without_versions(hidden: Callable[[str], None]) -> None:
    model, x = nn.Linear(3, 1).double(), drawn(4, 3)
    hidden("_version")
    J = Engine(model).jacobian(model(x).squeeze(1))
    x.mul_(2)
    with pytest.raises(StaleFactorError, match="changed in place"):
        J.matrix()


@pytest.mark.filterwarnings("ignore:The predictions of different poses:UserWarning")
@pytest.mark.parametrize("name", DENSE)
def test_rows_without_something_that_operators_save(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No check with a backward is made, which would mend what is read wrongly."""
    row, looked_for = ARCHITECTURES[name], dict[str, None]()

    def without(gone: str) -> None:
        def read(owner: object, asked: str, *default: object) -> object:
            looked_for.setdefault(asked)
            return getattr(owner, "_of_tomorrow" if asked == gone else asked, *default)

        monkeypatch.setattr(_torch, "getattr", read, raising=False)
        monkeypatch.setattr(
            _torch, "hasattr", lambda o, asked: asked != gone and hasattr(o, asked), raising=False
        )
        compare(row)

    without("nothing")
    for gone in [one for one in looked_for if one.startswith("_saved_")]:
        without(gone)


def compare(row: Architecture) -> None:
    """The rows of a model with those of autograd, twice: the second time is from memory."""
    model = row.build()
    engine = Engine(model, check="never")
    for seed in range(2):
        output = row.output(model, seed)
        expected = rows(output, trainable(model))
        found = engine.jacobian(output).matrix()
        torch.testing.assert_close(found, expected, rtol=row.tolerance, atol=row.tolerance)


@pytest.mark.parametrize(
    "name", ["_execution_engine", "queue_callback", "_get_current_graph_task_keep_graph"]
)
def test_a_loss_is_exact_and_frees_nothing_too_early(name: str, hidden: Any) -> None:
    model, poses = Net(), torch.randn(6, 3, dtype=torch.float64)
    engine = Engine(model)
    engine.backward(model(poses), Clip(0.5))
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    hidden(name)
    loss = engine.loss(model(poses), Clip(0.5))
    loss.backward(retain_graph=True)
    loss.backward()
    found = [p.grad / 2 for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
