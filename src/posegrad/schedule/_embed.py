"""Embeddings: the model's output for each pose, for losses that look at all poses."""

from typing import final

from torch import Tensor

from posegrad.combination import Combination

__all__ = ["Embeddings"]


@final
class Embeddings(Combination):
    """The rule of `Engine.embed`: it returns the predictions unchanged.

    Its weights come from the loss and are unknown before the backward. So there is no online form,
    and `auto` treats it like any rule whose weights do not separate. Autograd hands back the
    cotangents `[m, d]`, from which the replay of each chunk starts.
    """

    def forward(self, predictions: Tensor) -> Tensor:
        return predictions
