"""Hypothesis strategies for property tests of rules and models."""

from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from posegrad.combination import Best, Boltzmann, Combination, Max, Mean, Min, Sum, TopK
from posegrad.errors import MissingExtraError
from posegrad.testing._seeded import seeded
from posegrad.testing.table import RULES

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

__all__ = ["poses", "predictions", "rules"]


def predictions(
    *, max_poses: int = 12, components: tuple[int, ...] = (), spread: float = 60.0
) -> "SearchStrategy[Tensor]":
    """Predictions of one group, `[m, *components]`, float64, no two of a component equal.

    Args:
        max_poses: Largest m; the smallest is 1.
        components: The trailing shape.
        spread: All lie within this distance of each other.

    Returns:
        A strategy. Spacings vary from 1e-3 to the spread, so that sharp and soft weights occur.

    Raises:
        MissingExtraError: if hypothesis is not installed.

    Example:
        >>> from hypothesis import given
        >>> @given(y=predictions(max_poses=4), rule=rules())
        ... def no_nan(y, rule):
        ...     assert rule(y).isfinite()
        >>> no_nan()
    """
    st: Any = _hypothesis()

    def build(m: int, seed: int, width: float, offset: float) -> Tensor:
        generator = seeded(seed)
        order = torch.rand(m, *components, generator=generator).argsort(dim=0)
        steps = torch.rand(m, *components, generator=generator, dtype=torch.float64)
        return offset + width * (order + 0.5 * steps) / m

    strategy: SearchStrategy[Tensor] = st.builds(
        build,
        m=st.integers(1, max_poses),
        seed=st.integers(0, 2**31),
        width=st.floats(1e-3, spread),
        offset=st.floats(-50, 50),
    )
    return strategy


def poses(
    *, features: int, max_poses: int = 12, dtype: torch.dtype = torch.float64
) -> "SearchStrategy[Tensor]":
    """Stacked poses of a group, `[m, features]`, standard normal under a drawn seed.

    Args:
        features: The length of a pose.
        max_poses: Largest m; the smallest is 1.
        dtype: Their precision.

    Returns:
        A strategy; call `.unbind()` on a draw for a list.

    Raises:
        MissingExtraError: if hypothesis is not installed.

    Example:
        >>> from hypothesis import given
        >>> model = nn.Linear(3, 1).double()
        >>> @given(group=poses(features=3, max_poses=4))
        ... def one_each(group):
        ...     assert len(Engine(model).combine(group, Mean()).per_pose) == len(group)
        >>> one_each()
    """
    st: Any = _hypothesis()

    def build(m: int, seed: int) -> Tensor:
        generator = seeded(seed)
        return torch.randn(m, features, generator=generator, dtype=dtype)

    strategy: SearchStrategy[Tensor] = st.builds(
        build, m=st.integers(1, max_poses), seed=st.integers(0, 2**31)
    )
    return strategy


def rules() -> "SearchStrategy[Combination]":
    """Every combination rule of the library that takes predictions of any shape.

    Returns:
        A strategy.

    Raises:
        MissingExtraError: if hypothesis is not installed.

    Example:
        >>> from hypothesis import given
        >>> @given(rule=rules())
        ... def of_one_pose(rule):
        ...     assert rule(torch.tensor([-9.0])) == -9
        >>> of_one_pose()
    """
    st: Any = _hypothesis()
    scale = st.sampled_from([0.3, 1.0, 1.7, 20.0, 1000.0])
    strategy: SearchStrategy[Combination] = st.one_of(
        st.builds(Mean),
        st.builds(Sum),
        st.builds(Min, scale=scale),
        st.builds(Max, scale=scale),
        st.builds(Boltzmann, kT=st.sampled_from([0.1, 0.593, 1.0, 30.0])),
        st.builds(Best, largest=st.booleans()),
        st.builds(TopK, st.integers(1, 5), largest=st.booleans()),
        st.sampled_from([row.make() for row in RULES.values() if row.takes_any_predictions]),
    )
    return strategy


def _hypothesis() -> ModuleType:
    try:
        import hypothesis.strategies
    except ImportError as error:
        raise MissingExtraError(
            "The strategies of posegrad.testing need hypothesis, which is not installed.\n"
            "Run: pip install 'posegrad[testing]'"
        ) from error
    return hypothesis.strategies
