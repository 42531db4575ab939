"""Each cell of the table: exact, or refused by name."""

import copy
import functools
import itertools

import pytest
import torch
from torch import nn

from posegrad import Mean
from tests.device import DEVICE
from tests.modes.columns import MODES, REFUSED
from tests.modes.distributed import OUTCOMES
from tests.modes.overflow import OVERFLOWING, step
from tests.modes.page import PAGE, page
from tests.modes.run import POSES, Found, Mode, Run
from tests.modes.ways import WAYS

TRUTH = Mode("plain autograd in float64")
VARIANTS = [(mode, variant) for mode in MODES for variant in MODES[mode].make]
CELLS = [(*variant, way) for variant, way in itertools.product(VARIANTS, WAYS)]
EXACT = [cell for cell in CELLS if (cell[0], cell[2]) not in REFUSED]
ERRORS = [cell for cell in CELLS if (cell[0], cell[2]) in REFUSED]
NARROW = [cell for cell in EXACT if MODES[cell[0]].digits != torch.float64]


def _error(found: Found, expected: Found) -> dict[str, float]:
    """How far off a Gramian and a gradient are, relative to their norms."""
    assert found.keys() == expected.keys()
    pairs = {"gradient": [(found[n], expected[n]) for n in found if n != "G"]}
    if "G" in found:
        pairs["G"] = [(found["G"], expected["G"])]
    flat = {
        name: [torch.cat([t.double().flatten() for t in side]) for side in zip(*pair, strict=True)]
        for name, pair in pairs.items()
    }
    return {name: float((a - b).norm() / b.norm()) for name, (a, b) in flat.items()}


@functools.lru_cache(maxsize=1)
def _model(mode: str, variant: str) -> nn.Module:
    """One for all ways, so that what is compiled is compiled once."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    return MODES[mode].make[variant]()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo
@pytest.mark.parametrize(("mode", "variant", "way"), EXACT)
def test_exact(mode: str, variant: str, way: str) -> None:
    run = Run(MODES[mode], _model(mode, variant))
    for count in (POSES, POSES - 1) if run.mode.dynamic else (POSES,):
        run.have(count)
        errors = _error(run.taken(WAYS[way].ours), run.taken(WAYS[way].plain))
        assert max(errors.values()) <= run.mode.tolerance


@pytest.mark.parametrize(("mode", "variant", "way"), NARROW)
def test_no_further_from_the_truth_than_plain_autograd(mode: str, variant: str, way: str) -> None:
    setting = MODES[mode]
    model = setting.make[variant]()
    truth = Run(TRUTH, copy.deepcopy(model).double()).taken(WAYS[way].plain)
    plain = _error(Run(setting, copy.deepcopy(model)).taken(WAYS[way].plain), truth)
    found = Run(setting, model).taken(WAYS[way].ours)
    if "G" in found:
        assert found["G"].dtype in (torch.float32, torch.float64)
    for name, error in _error(found, truth).items():
        assert error <= 1.5 * plain[name] + torch.finfo(setting.digits).eps / 2


@pytest.mark.parametrize(("mode", "variant", "way"), ERRORS)
def test_refused(mode: str, variant: str, way: str) -> None:
    setting, refused = MODES[mode], REFUSED[mode, way]
    run = Run(setting, setting.make[variant]())
    for parameter in run.model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    with pytest.raises(refused.error, match=refused.match), setting.around():
        WAYS[way].ours(run)
    assert all(bool((p.grad == 3).all()) for p in run.model.parameters())
    before = [p.grad.clone() for p in run.model.parameters()]
    run.engine.combine(run.poses, Mean(), schedule="retain").prediction.backward()
    changed = [
        not torch.equal(p.grad, b) for p, b in zip(run.model.parameters(), before, strict=True)
    ]
    assert all(changed)


@pytest.mark.parametrize("way", WAYS)
def test_a_step_that_overflows_is_skipped_and_training_goes_on(way: str) -> None:
    run, plain = (Run(OVERFLOWING, MODES["GradScaler"].make[""]()) for _ in range(2))
    plain.model.load_state_dict(run.model.state_dict())
    for each in (run, plain):  # gradients of such a size that they overflow with the first scale
        each.targets = 100 * each.targets
        each.loss = lambda prediction: 100 * (prediction - 15).square()
    first, second = step(run, WAYS[way])
    assert second < first
    states = run.model.state_dict(), plain.model.state_dict()
    torch.testing.assert_close(*states, rtol=0, atol=0)
    run.scaler = torch.amp.GradScaler(DEVICE.type, init_scale=second)
    errors = _error(run.taken(WAYS[way].ours), plain.taken(WAYS[way].plain))
    assert max(errors.values()) < 1e-5  # of float32


@pytest.mark.parametrize("name", OUTCOMES)
def test_wrapped_models_have_an_outcome_for_each_way(name: str) -> None:
    """In two processes: tests/distributed/ranks_modes.py."""
    assert OUTCOMES[name].keys() == WAYS.keys()


def test_the_page_is_made_of_the_table() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "Run `python -m tests.modes`."
