"""Closed forms of the per-pose gradient, one operator a file."""

from posegrad.jacobian.layers.convolution import Convolution
from posegrad.jacobian.layers.elementwise import Elementwise
from posegrad.jacobian.layers.embedding import Embedding
from posegrad.jacobian.layers.layer_norm import LayerNormScale
from posegrad.jacobian.layers.linear import Linear

__all__ = ["Convolution", "Elementwise", "Embedding", "LayerNormScale", "Linear"]
