"""All of the example: two classifiers, what a step costs, the picture, and a text that says so."""

from collections.abc import Iterable
from pathlib import Path

from examples.bags.cost import Cost, measure
from examples.bags.digits import bags, load
from examples.bags.picture import draw
from examples.bags.training import Score, end_to_end, on_frozen_features, score

__all__ = ["run"]

SIZES = 10, 30  # images of a bag
FROZEN = 5, 8  # classes that frozen encoders were trained on


def run(count: int, epochs: int, large: int, picture: Path) -> str:
    """Trains on bags of one part of the images, and looks at bags of the other part.

    Args:
        count: Bags to train on; half as many are held out.
        epochs: Passes over them.
        large: Images of the bag on which a step is measured.
        picture: Where the picture goes.

    Returns:
        The tables.
    """
    images, held_out = load()
    known = bags(images, count, sizes=SIZES, seed=1)
    unknown = bags(held_out, count // 2, sizes=SIZES, seed=2)
    classifiers = {
        "end to end": end_to_end(known, epochs=epochs),
        **{
            f"frozen, 0 to {classes - 1}": on_frozen_features(
                known, images, classes=classes, epochs=2 * epochs, pretraining=epochs
            )
            for classes in FROZEN
        },
    }
    scores = {name: score(classifier, unknown) for name, classifier in classifiers.items()}
    shown = dict(list(classifiers.items())[:2])
    draw(shown, unknown[:4], picture)
    [largest] = bags(images, 1, sizes=(large, large), seed=3)
    return "\n".join(
        [*_scores(len(unknown), scores), "", *_costs(large, measure(largest)), "", str(picture)]
    )


def _scores(count: int, scores: dict[str, Score]) -> Iterable[str]:
    yield f"{f'{count} bags held out':<18}  accuracy  nine found by attention"
    for name, own in scores.items():
        yield f"{name:<18}  {own.accuracy:>8.2f}  {own.found:>23.2f}"


def _costs(size: int, costs: list[Cost]) -> Iterable[str]:
    yield f"{f'a bag of {size} images':<18}  peak, MiB  time of plain  largest difference"
    for own in costs:
        yield (
            f"{own.method:<18}  {own.peak_mib:>9.1f}  {own.of_plain:>13.2f}"
            f"  {own.difference:>18.1e}"
        )
