"""Attention pooling: a rule that learns which poses count."""

from typing import final

import torch
from torch import Tensor, nn

from posegrad.combination._base import Combination
from posegrad.combination._checks import whole
from posegrad.errors import ShapeMismatchError

__all__ = ["AttentionPooling"]


@final
class AttentionPooling(Combination):
    r"""Average of vector predictions, weighted by a small trained network.

    .. math::
        \hat y = \sum_i a_i \hat y_i, \qquad
        a_i = \operatorname{softmax}_i\left(u^\top \tanh(V \hat y_i)\right)

    With a gate, :math:`\tanh(V \hat y_i) \odot \sigma(U \hat y_i)` stands in place of the tanh,
    which is nearly linear near zero.

    Args:
        features: d, the length of a prediction.
        hidden: Rows of V, and of U.
        gated: Whether there is a gate.

    Shape:
        predictions `[m, d]` to `[d]`.

    Raises:
        ValueError: if `features` or `hidden` is not a whole number of at least 1.
        ShapeMismatchError: if the predictions are not `[m, d]`.

    Note:
        Every pose keeps a weight. Time: m forwards, then m forwards and m backwards.

    References:
        Ilse, Tomczak, Welling, "Attention-based Deep Multiple Instance Learning", ICML 2018,
        equations 8 and 9.

    Example:
        >>> AttentionPooling(3)(torch.ones(5, 3))
        tensor([1., 1., 1.], grad_fn=<SumBackward1>)
    """

    def __init__(self, features: int, *, hidden: int = 64, gated: bool = False) -> None:
        super().__init__()
        self.features = whole("features", features)
        self.hidden = nn.Linear(self.features, whole("hidden", hidden), bias=False)
        self.score = nn.Linear(self.hidden.out_features, 1, bias=False)
        self.gate = (
            nn.Linear(self.features, self.hidden.out_features, bias=False) if gated else None
        )

    def forward(self, predictions: Tensor) -> Tensor:
        return (self.attention(predictions).unsqueeze(1) * predictions).sum(dim=0)

    def attention(self, predictions: Tensor) -> Tensor:
        """The weights a of the average, `[m]`, to look at: they add up to 1.

        Args:
            predictions: `[m, d]`; `per_pose`, say.

        Raises:
            ShapeMismatchError: if they are not.

        Example:
            >>> AttentionPooling(3).attention(torch.ones(4, 3)).detach()
            tensor([0.2500, 0.2500, 0.2500, 0.2500])
        """
        if predictions.shape[1:] != (self.features,):
            raise ShapeMismatchError(
                f"The predictions have shape {list(predictions.shape)}, but "
                f"AttentionPooling({self.features}) pools vectors, [m, {self.features}]. "
                f"Let the model return {self.features} numbers for a pose, or change `features`."
            )
        hidden = torch.tanh(self.hidden(predictions))  # [m, hidden]
        if self.gate is not None:
            hidden = hidden * torch.sigmoid(self.gate(predictions))
        return torch.softmax(self.score(hidden).squeeze(1), dim=0)
