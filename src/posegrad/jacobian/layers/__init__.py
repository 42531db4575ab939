"""Closed forms of the per-pose gradient, one operator a file."""

from posegrad.jacobian.layers.convolution import Convolution
from posegrad.jacobian.layers.elementwise import Elementwise
from posegrad.jacobian.layers.embedding import Embedding
from posegrad.jacobian.layers.linear import Linear
from posegrad.jacobian.layers.norm import NormScale

__all__ = ["Convolution", "Elementwise", "Embedding", "Linear", "NormScale"]
