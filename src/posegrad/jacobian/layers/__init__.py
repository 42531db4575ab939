"""Closed forms of the per-pose gradient, one operator a file."""

from posegrad.jacobian.layers.activation import Activation
from posegrad.jacobian.layers.batched import BatchedLinear
from posegrad.jacobian.layers.bilinear import Bilinear
from posegrad.jacobian.layers.convolution import Convolution
from posegrad.jacobian.layers.distances import Distances
from posegrad.jacobian.layers.elementwise import Elementwise
from posegrad.jacobian.layers.embedding import Embedding, EmbeddingBag
from posegrad.jacobian.layers.grouped import GroupedLinear
from posegrad.jacobian.layers.linear import Linear
from posegrad.jacobian.layers.norm import NormScale, NormScaleBackward
from posegrad.jacobian.layers.repeat import Repeat
from posegrad.jacobian.layers.vector import Vector

__all__ = [
    "Activation",
    "BatchedLinear",
    "Bilinear",
    "Convolution",
    "Distances",
    "Elementwise",
    "Embedding",
    "EmbeddingBag",
    "GroupedLinear",
    "Linear",
    "NormScale",
    "NormScaleBackward",
    "Repeat",
    "Vector",
]
