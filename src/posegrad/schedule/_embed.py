"""Embeddings: what the model makes of each pose, for losses that look at all of them."""

from typing import final

from torch import Tensor

from posegrad.combination import Combination

__all__ = ["Embeddings"]


@final
class Embeddings(Combination):
    """The rule of `Engine.embed`: the predictions as they are, each by itself.

    Its weights are the loss's, of which nothing is known before the backward: it has no online
    form, and `auto` takes it for any other rule whose weights do not separate. What autograd hands
    back are the cotangents `[m, d]` that the replay of each chunk begins with.
    """

    def forward(self, predictions: Tensor) -> Tensor:
        return predictions
