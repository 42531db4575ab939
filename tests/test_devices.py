"""Where tensors are: nothing of ours goes to the default device, whatever that is."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchjd.aggregation import UPGrad

import posegrad
from posegrad import Boltzmann, Clip, Combination, Engine, Mean, MultiPose
from posegrad.testing.table import RULES
from tests.device import DEVICE, seeded
from tests.reference import rows, trainable
from tests.schedules import SCHEDULES


def _images() -> nn.Module:
    body = nn.Sequential(nn.Conv1d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten())
    return nn.Sequential(nn.Unflatten(1, (1, 5)), body, nn.Linear(12, 1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MLP with dropout": lambda: nn.Sequential(
        nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1)
    ),
    "convolution": _images,
    "batch statistics": lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)),
    "PReLU": lambda: nn.Sequential(nn.Linear(5, 8), nn.PReLU(), nn.LayerNorm(8), nn.Linear(8, 1)),
}

GRADIENT_RULES: dict[str, Callable[[], object]] = {
    **{name: row.make for name, row in RULES.items() if not row.components},
    "Clip with noise": lambda: Clip(0.5, noise_multiplier=1.0, generator=seeded(0)),
    "UPGrad": UPGrad,
}


def poses() -> Tensor:
    return torch.randn(6, 5, device=DEVICE)


def elsewhere() -> torch.device:
    """As a default device it gives whatever is made without a device no numbers at all."""
    return torch.device("meta")


@pytest.mark.parametrize("groups", [None, [2, 4], torch.tensor([0, 0, 1, 1, 2, 2])], ids=str)
@pytest.mark.parametrize(
    ("rule", "schedule"),
    [
        (rule, schedule)
        for rule, row in RULES.items()
        if isinstance(made := row.make(), Combination)
        for schedule in ("auto", *SCHEDULES)
        if schedule != "stream" or made.online() is not None
    ],
)
def test_combine_stays_where_the_model_is(
    rule: str, schedule: str, groups: list[int] | Tensor | None
) -> None:
    components = math.prod(RULES[rule].components)
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.2), nn.Linear(8, components)).to(DEVICE)
    made, X = RULES[rule].make().to(DEVICE), poses()
    with elsewhere():
        prediction, per_pose = Engine(model).combine(X, made, schedule=schedule, groups=groups)
        prediction.sum().backward()
    assert prediction.device.type == per_pose.device.type == DEVICE.type
    assert all(p.grad is not None and p.grad.device == p.device for p in model.parameters())


@pytest.mark.filterwarnings("ignore:The predictions of different poses depend:UserWarning")
@pytest.mark.parametrize("network", NETWORKS)
def test_a_jacobian_stays_where_the_output_is(network: str) -> None:
    model, X, w = NETWORKS[network]().to(DEVICE), poses(), torch.linspace(-1, 1, 6, device=DEVICE)
    engine = Engine(model, check="always")
    with elsewhere():
        J = engine.jacobian(model(X).squeeze(1))
        found = [J.gramian(), J.norms(), J.matrix(), *J.combine(w).values(), *J[2].values()]
        found += [*J.gramian(per_parameter=True).values()]
        assert engine.plan(list(X), Mean()).poses == 6
    assert {tensor.device.type for tensor in found} == {DEVICE.type}


@pytest.mark.parametrize("rule", GRADIENT_RULES)
def test_rules_that_look_at_gradients(rule: str) -> None:
    model, X, made = NETWORKS["convolution"]().to(DEVICE), poses(), GRADIENT_RULES[rule]()
    with elsewhere():
        Engine(model).backward(model(X).squeeze(1), made)
    assert all(p.grad is not None and p.grad.device == p.device for p in model.parameters())


def test_gather_and_a_module_form() -> None:
    model, X = NETWORKS["MLP with dropout"]().to(DEVICE), poses()
    with elsewhere():
        J = Engine(model).gather(X, loss=lambda predictions, i: predictions * i)
        MultiPose(model, Mean())(X).prediction.backward()
    assert J.matrix().device.type == DEVICE.type
    assert all(p.grad is not None for p in model.parameters())


def test_determinism_is_kept_when_asked_for() -> None:
    """Nothing of ours uses an operator that torch refuses then, and results repeat bit for bit."""
    model, X = NETWORKS["convolution"]().to(DEVICE), poses()
    torch.use_deterministic_algorithms(True)
    try:
        found = []
        for _ in range(2):
            model.zero_grad()
            Engine(model).combine(list(X[:, None]), Boltzmann(kT=0.5)).prediction.backward()
            Engine(model).backward(model(X).squeeze(1), UPGrad())
            found.append([p.grad for p in model.parameters()])
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_nothing_is_moved_to_a_device_by_name() -> None:
    sources = Path(posegrad.__file__).parent.rglob("*.py")
    assert not [path for path in sources if ".cuda(" in path.read_text()]


class Places(nn.Module):
    """Adds a learned row for each place, which numbers on the CPU pick."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Parameter(torch.randn(7, 5)), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        rows_of_table = self.table[torch.arange(6, device="cpu").flip(0)]
        scores: Tensor = self.head((x + rows_of_table).tanh()).squeeze(1)
        return scores


@pytest.mark.parametrize("check", ["first", "never"])
def test_numbers_on_the_cpu_pick_rows_anywhere(check: Any) -> None:
    model = Places().to(DEVICE, torch.float64)
    engine = Engine(model, check=check)
    for _ in range(3):
        output = model(poses().double())
        expected = rows(output, trainable(model))
        J = engine.jacobian(output)
        torch.testing.assert_close(J.matrix(), expected)
        torch.testing.assert_close(J.gramian(), expected @ expected.T)
        torch.testing.assert_close(J.norms(), expected.norm(dim=1))
