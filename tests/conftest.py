"""Profiles of the property tests, one thread, a fixed seed, and the device.

`POSEGRAD_TEST_DEVICE=cuda pytest` makes every tensor of the tests there; what starts processes of
its own stays on the CPU.
"""

import gc
import os

import pytest
import torch
import torch._functorch.config
from hypothesis import HealthCheck, settings

from posegrad.graph import _together

torch.set_num_threads(1)

if device := os.environ.get("POSEGRAD_TEST_DEVICE"):
    torch.set_default_device(device)
torch.backends.cudnn.allow_tf32 = False  # as it is off for products, or convolutions lose digits

# Reference rows take several backwards through one graph. Whether an ahead-of-time compiled one can
# be used again depends on which test compiled it first; test_traps.py has the default.
torch._functorch.config.donated_buffer = False

settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "soak", parent=settings.get_profile("ci"), derandomize=False, max_examples=2000
)
settings.load_profile(os.environ.get("POSEGRAD_PROFILE", "ci"))


def pytest_collection_finish() -> None:
    """A garbage collection that looks at all modules takes a second, and many tests ask for one."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _use_by_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of tests are so small that their rows would be taken all together.

    Most tests are about how a network of any size is read; test_together.py is about these.
    """
    monkeypatch.setattr(_together, "_USE", 0)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
