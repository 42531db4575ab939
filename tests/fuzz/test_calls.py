"""Random stateful models under every schedule: plain autograd, or an error."""

import os

import pytest

from tests.fuzz.calls import describe, verdict

BLOCK = 15
SEEDS = 10_000 if os.environ.get("POSEGRAD_PROFILE") == "soak" else 120

# Of torch: a hook of the user's on a layer behind which nothing needs a gradient.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")


@pytest.mark.parametrize("first", range(0, SEEDS, BLOCK))
def test_random_calls_match_plain_autograd(first: int) -> None:
    found = {seed: verdict(seed) for seed in range(first, first + BLOCK)}
    for seed, one in found.items():
        assert one.kind in ("same", "refused", "void"), f"{describe(seed)}\n{seed}: {one}"
    # Few are refused, and most are compared.
    assert sum(one.kind == "same" for one in found.values()) > BLOCK / 2
    assert sum(one.compared for one in found.values()) > 100 * BLOCK
