"""An encoder of images, and gated attention over the images of a bag."""

from torch import Tensor, nn

from posegrad import AttentionPooling

__all__ = ["FEATURES", "Attention", "encoder"]

FEATURES = 64


def encoder() -> nn.Sequential:
    """A convolutional network from images `[c, 1, 8, 8]` to features `[c, 64]`."""
    return nn.Sequential(
        *_block(1, 32),
        *_block(32, 32),
        nn.MaxPool2d(2),
        *_block(32, 64),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(4 * 64, FEATURES),
        nn.ReLU(),
    )


def _block(inside: int, out: int) -> list[nn.Module]:
    return [nn.Conv2d(inside, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]


class Attention(nn.Module):
    """The rule: from the features of a bag, `[m, 64]`, to its logit, `[]`.

    Any module is a rule. This one is ABMIL: gated attention, dropout, one linear layer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool = AttentionPooling(FEATURES, gated=True)
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(FEATURES, 1))

    def forward(self, features: Tensor) -> Tensor:
        """The logit that the bag contains a nine."""
        return self.head(self.pool(features)).squeeze(-1)  # type: ignore[no-any-return]
