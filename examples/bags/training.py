"""Training end to end and on frozen features, and how good either is on held-out bags."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from tqdm import tqdm

from examples.bags.digits import SOUGHT, Bag, Images
from examples.bags.network import FEATURES, Attention, encoder
from posegrad import Combined, Engine

__all__ = ["CHUNK", "Classifier", "Score", "end_to_end", "on_frozen_features", "score"]

CHUNK = 32  # images in a forward: what bounds the memory of a step, however large the bags are
BATCH = 4  # bags in a step


class Classifier:
    """An encoder, a rule, and the engine that runs the one and combines by the other.

    Args:
        network: Encodes images.
        rule: From the features of a bag to its logit.
    """

    def __init__(self, network: nn.Module, rule: Attention) -> None:
        self.network, self.rule = network, rule
        # The statistics of batch norm are those of a chunk; so the chunks are the user's to choose.
        self._engine = Engine(network, chunk_size=CHUNK)

    def __call__(self, bags: Sequence[Bag]) -> Combined:
        """The logits of bags, `[n]`, and the features of all their images."""
        images = torch.cat([bag.images.pixels for bag in bags])
        return self._engine.combine(images, self.rule, groups=[len(bag.images) for bag in bags])

    def train(self, mode: bool = True) -> None:
        """Dropout and batch statistics, or neither."""
        self.network.train(mode)
        self.rule.train(mode)

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [p for m in (self.network, self.rule) for p in m.parameters() if p.requires_grad]


def loss_of(logits: Tensor, bags: Sequence[Bag]) -> Tensor:
    """Mean cross entropy of the labels."""
    labels = torch.tensor([bag.label for bag in bags]).to(logits)
    return F.binary_cross_entropy_with_logits(logits, labels)


def end_to_end(bags: Sequence[Bag], *, epochs: int) -> Classifier:
    """Encoder and attention, trained together from random weights on nothing but labels of bags."""
    torch.manual_seed(0)
    classifier = Classifier(encoder(), Attention())
    _fit(classifier, bags, epochs=epochs, name="end to end")
    return classifier


def on_frozen_features(
    bags: Sequence[Bag], images: Images, *, classes: int, epochs: int, pretraining: int
) -> Classifier:
    """Attention alone, on an encoder that learnt to tell a few other digits apart.

    As in histology: features come from a network that was trained on something else.

    Args:
        bags: To train on.
        images: Single digits, with labels, for the encoder.
        classes: It learns those below this one.
        epochs: Passes over the bags, whose features are computed once.
        pretraining: Passes over the images.
    """
    torch.manual_seed(0)
    network = encoder()
    _pretrain(
        network, images.picked((images.digits < classes).nonzero()[:, 0]), classes, pretraining
    )
    network.eval().requires_grad_(False)
    rule = Attention()
    features = [Bag(Images(network(b.images.pixels), b.images.digits), b.label) for b in bags]
    _fit(Classifier(nn.Identity(), rule), features, epochs=epochs, name="frozen features")
    return Classifier(network, rule)


def _pretrain(network: nn.Module, images: Images, classes: int, epochs: int) -> None:
    head = nn.Linear(FEATURES, classes)
    optimizer = torch.optim.Adam([*network.parameters(), *head.parameters()], lr=1e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(CHUNK):
            batch = images.picked(index)
            F.cross_entropy(head(network(batch.pixels)), batch.digits).backward()
            optimizer.step()
            optimizer.zero_grad()


def _fit(classifier: Classifier, bags: Sequence[Bag], *, epochs: int, name: str) -> None:
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-3, weight_decay=1e-2)
    steps = epochs * math.ceil(len(bags) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    generator = random.Random(0)
    classifier.train()
    for _ in tqdm(range(epochs), desc=name, unit="epoch"):
        for own in _batches(len(bags), generator):
            batch = [bags[i] for i in own]
            loss_of(classifier(batch).prediction, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    classifier.train(False)


def _batches(count: int, generator: random.Random) -> Iterator[list[int]]:
    order = generator.sample(range(count), count)
    yield from (order[i : i + BATCH] for i in range(0, count, BATCH))


@dataclass(frozen=True)
class Score:
    """How good a classifier is on bags it never saw.

    Attributes:
        accuracy: Of the label.
        found: The share of bags with a nine in which the nine has the largest attention.
    """

    accuracy: float
    found: float


@torch.no_grad()
def score(classifier: Classifier, bags: Sequence[Bag]) -> Score:
    """Its score on some bags."""
    logits, features = classifier(bags)
    right = [(logit > 0) == bag.label for logit, bag in zip(logits.tolist(), bags, strict=True)]
    hits = [
        int(bag.images.digits[classifier.rule.pool.attention(own).argmax()]) == SOUGHT
        for own, bag in zip(features.split([len(b.images) for b in bags]), bags, strict=True)
        if bag.label
    ]
    return Score(sum(right) / len(right), sum(hits) / len(hits))
