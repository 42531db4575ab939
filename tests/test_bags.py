"""The example on bags, much smaller than its page: real digits, both ways to train."""

from pathlib import Path

import pytest
import torch

from examples.bags.cost import measure
from examples.bags.digits import SOUGHT, Bag, bags, load
from examples.bags.report import run
from examples.bags.training import end_to_end, on_frozen_features, score


@pytest.fixture(scope="module")
def few() -> list[Bag]:
    return bags(load()[0], 12, sizes=(5, 9), seed=0)


def test_every_second_bag_contains_one_nine(few: list[Bag]) -> None:
    nines = [int((bag.images.digits == SOUGHT).sum()) for bag in few]
    assert nines == [bag.label for bag in few] == [0, 1] * 6


def test_bags_are_those_of_the_seed(few: list[Bag]) -> None:
    again = bags(load()[0], 12, sizes=(5, 9), seed=0)
    for a, b in zip(few, again, strict=True):
        assert torch.equal(a.images.pixels, b.images.pixels)


def test_images_are_held_out() -> None:
    known, unknown = ({tuple(i.flatten().tolist()) for i in part.pixels} for part in load())
    assert not known & unknown


def test_a_step_is_that_of_plain_autograd_in_less_memory() -> None:
    """With dropout and batch norm in training, statistics included."""
    [bag] = bags(load()[0], 1, sizes=(300, 300), seed=1)
    plain, ours = measure(bag, rounds=1)
    assert ours.difference < 1e-5
    assert ours.peak_mib < 0.25 * plain.peak_mib


def test_both_ways_of_training_move_what_they_train(few: list[Bag]) -> None:
    images, _ = load()
    trained = end_to_end(few, epochs=1)
    frozen = on_frozen_features(few, images, classes=3, epochs=1, pretraining=1)
    assert all(p.requires_grad for p in trained.network.parameters())
    assert not any(p.requires_grad for p in frozen.network.parameters())
    for classifier in (trained, frozen):
        found = score(classifier, few)
        assert 0 <= min(found.accuracy, found.found) <= max(found.accuracy, found.found) <= 1


def test_it_prints_and_draws(tmp_path: Path) -> None:
    picture = tmp_path / "new" / "bags.png"
    text = run(4, 1, 40, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    for name in ("end to end", "frozen, 0 to 4", "plain autograd", "posegrad", str(picture)):
        assert name in text
