"""Embeddings: what the model makes of each pose, for losses that look at all of them."""

from typing import final

from torch import Tensor

from posegrad.combination import Combination

__all__ = ["Embeddings"]


@final
class Embeddings(Combination):
    """The rule of `Engine.embed`: the predictions as they are, each by itself.

    Its weights come from the loss, so nothing is known of them before the backward: there is no
    online form, and `auto` treats it like any rule whose weights do not separate. What autograd
    hands back are the cotangents `[m, d]`, with which the replay of each chunk begins.
    """

    def forward(self, predictions: Tensor) -> Tensor:
        return predictions
