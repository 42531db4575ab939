"""The example on conformers, much smaller than its page: real molecules, every method."""

import math

import numpy as np
import pytest
import torch

from examples.conformers.baseline import STRENGTHS, ridge
from examples.conformers.ensemble import METHODS, cross_validate, table
from examples.conformers.molecules import Compound, load


@pytest.fixture(scope="module")
def compounds() -> list[Compound]:
    return load(12, conformers=3)


def test_every_method_is_held_against_the_2d_baseline(compounds: list[Compound]) -> None:
    scores = cross_validate(compounds, folds=3, epochs=1)
    assert list(scores) == ["mean of the others", "2D ridge", *METHODS]
    assert all(math.isfinite(score.rmse) for score in scores.values())
    text = table(scores)
    assert all(f"{name} " in text and f"{own.rmse:.2f}" in text for name, own in scores.items())


def test_the_mean_is_that_of_the_other_folds(compounds: list[Compound]) -> None:
    scores = cross_validate(compounds, folds=12, epochs=0, methods=[])
    measured = np.array([compound.pic50 for compound in compounds])
    others = (measured.sum() - measured) / 11
    expected = np.sqrt(np.square(others - measured).mean())
    assert scores["mean of the others"].rmse == pytest.approx(expected)


def test_conformers_are_those_of_the_seed() -> None:
    compounds, again = (load(2, conformers=3) for _ in range(2))
    for first, second in zip(compounds, again, strict=True):
        assert (first.smiles, first.pic50) == (second.smiles, second.pic50)
        assert len(first.conformers) == 3
        for a, b in zip(first.conformers, second.conformers, strict=True):
            assert a.pos.equal(b.pos)
            assert not (a.z == 1).any()


def test_conformers_differ(compounds: list[Compound]) -> None:
    for compound in compounds:
        shapes = [torch.pdist(conformer.pos) for conformer in compound.conformers]
        assert all((shape - shapes[0]).abs().max() > 0.5 for shape in shapes[1:])  # Å


def test_ridge_takes_the_strength_of_least_leave_one_out_error() -> None:
    generator = np.random.default_rng(0)
    x, held_out = generator.normal(size=(15, 6)), generator.normal(size=(4, 6))
    y = x @ generator.normal(size=6) + generator.normal(size=15)
    found = ridge(x, y, held_out)
    errors = [_leave_one_out(x, y, strength) for strength in STRENGTHS]
    expected = _primal(x, y, held_out, float(STRENGTHS[int(np.argmin(errors))]))
    np.testing.assert_allclose(found, expected, rtol=1e-8)


def _primal(x: np.ndarray, y: np.ndarray, held_out: np.ndarray, strength: float) -> np.ndarray:
    centre, mean = x.mean(axis=0), y.mean()
    square = (x - centre).T @ (x - centre) + strength * np.eye(x.shape[1])
    return mean + (held_out - centre) @ np.linalg.solve(square, (x - centre).T @ (y - mean))


def _leave_one_out(x: np.ndarray, y: np.ndarray, strength: float) -> float:
    """With the centre of all rows, as `ridge` has it."""
    x, y = x - x.mean(axis=0), y - y.mean()
    residuals = []
    for i in range(len(x)):
        rest = np.arange(len(x)) != i
        square = x[rest].T @ x[rest] + strength * np.eye(x.shape[1])
        residuals.append(y[i] - x[i] @ np.linalg.solve(square, x[rest].T @ y[rest]))
    return float(np.square(residuals).mean())
