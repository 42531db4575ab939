"""All of the example: four classifiers, what a step costs, the picture, and a text of it all."""

from collections.abc import Iterable
from pathlib import Path

from examples.private.cost import Cost, measure
from examples.private.digits import TRAINED_ON, load
from examples.private.network import network
from examples.private.picture import draw
from examples.private.step import Settings
from examples.private.training import Epoch, noise_for, train
from examples.private.ways import DELTA, WAYS, ignore_known_warnings

__all__ = ["run"]


def run(epsilon: float, epochs: int, rounds: int, picture: Path) -> str:
    """Trains each way from the same weights, on the same images, with the same noise.

    Args:
        epsilon: What training may cost.
        epochs: How long it trains.
        rounds: Steps of each way that are timed.
        picture: Where the picture goes.

    Returns:
        The tables.
    """
    ignore_known_warnings()
    data, held_out = load()
    rate = Settings.expected / TRAINED_ON
    settings = Settings(noise=noise_for(epsilon, rate=rate, epochs=epochs))
    trained = {}
    for name, way in WAYS.items():
        model = network()
        prepared = way(model, data, settings)
        trained[name] = train(model, prepared, held_out, epochs=epochs, name=name)
    costs = measure(data, settings, rounds=rounds)
    draw(trained, costs, picture)
    told = f"σ = {settings.noise:.2f}, q = {rate:g}, {epochs} epochs, δ = {DELTA:g}"
    return "\n".join([told, *_scores(trained), "", *_costs(costs), "", str(picture)])


def _scores(trained: dict[str, list[Epoch]]) -> Iterable[str]:
    yield f"{'training':<14}  {'ε':>6}  accuracy, held out"
    for name, epochs in trained.items():
        yield f"{name:<14}  {epochs[-1].epsilon:>6.2f}  {epochs[-1].accuracy:>18.3f}"


def _costs(costs: dict[str, Cost]) -> Iterable[str]:
    yield f"{'a step':<14}  time of plain  peak, MiB"
    for name, own in costs.items():
        yield f"{name:<14}  {own.of_plain:>13.2f}  {own.peak_mib:>9.1f}"
