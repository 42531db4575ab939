"""Networks in plain torch, with the losses that people write."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812, as everybody calls it

from benchmarks.ordinary.problem import Problem

__all__ = [
    "abmil",
    "bags",
    "classifier",
    "clients",
    "convolutions",
    "encoder",
    "lstm",
    "mlp",
    "pinn",
    "resnet",
    "tasks",
    "tokens",
]


def classifier(network: nn.Module, x: Tensor, classes: Tensor) -> Tensor:
    """Cross entropy of each pose."""
    return F.cross_entropy(network(x), classes, reduction="none")


def _mlp(*widths: int, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, o in pairwise(widths):
        layers += [nn.Linear(i, o), act()]
    return nn.Sequential(*layers[:-1])


def mlp() -> Problem:
    """MLP 512-1024-1024-10."""
    network = _mlp(512, 1024, 1024, 10)
    return Problem(network, classifier, (torch.randn(64, 512), torch.randint(10, (64,))), 64)


def convolutions() -> Problem:
    """Three 3x3 convolutions with GroupNorm, 32 to 64 channels, 3x32x32."""

    def block(i: int, o: int) -> list[nn.Module]:
        return [nn.Conv2d(i, o, 3, padding=1), nn.GroupNorm(8, o), nn.ReLU()]

    network = nn.Sequential(
        *block(3, 32),
        nn.MaxPool2d(2),
        *block(32, 64),
        *block(64, 64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    images = torch.randn(32, 3, 32, 32)
    return Problem(network, classifier, (images, torch.randint(10, (32,))), 32)


class _Encoder(nn.Module):
    """A transformer encoder, the mean of its tokens, and a class read from it."""

    def __init__(self, width: int, layers: int, dropout: float, classes: int = 10) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `[m, T, width]` to `[m, classes]`."""
        y: Tensor = self.head(self.encoder(x).mean(dim=1))
        return y


def encoder(dropout: float) -> Problem:
    """Transformer encoder, d = 128, 4 layers, T = 64."""
    inputs = (torch.randn(16, 64, 128), torch.randint(10, (16,)))
    return Problem(_Encoder(128, 4, dropout), classifier, inputs, 16, is_random=dropout > 0)


class _Language(nn.Module):
    """Embeddings of words and of positions, an encoder, and a guess at every next word."""

    def __init__(self, words: int, width: int, layers: int, length: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.positions = nn.Parameter(0.02 * torch.randn(1, length, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 100)

    def forward(self, words: Tensor) -> Tensor:
        """`[m, T]` to `[m, T, 100]`."""
        y: Tensor = self.head(self.encoder(self.words(words) + self.positions))
        return y


def _sequences(network: nn.Module, words: Tensor, tags: Tensor) -> Tensor:
    return F.cross_entropy(network(words).transpose(1, 2), tags, reduction="none").mean(dim=1)


def _each_token(network: nn.Module, words: Tensor, tags: Tensor) -> Tensor:
    return F.cross_entropy(network(words).flatten(0, 1), tags.flatten(), reduction="none")


def tokens(*, each: bool = False) -> Problem:
    """Embedding of 20 000 x 64 and positions, 2 layers, T = 32; a tag for each token."""
    m, length = (4, 8) if each else (32, 32)
    network = _Language(20_000, 64, 2, length)
    inputs = (torch.randint(20_000, (m, length)), torch.randint(100, (m, length)))
    if each:
        return Problem(network, _each_token, inputs, m * length, is_sliced=False)
    return Problem(network, _sequences, inputs, m)


class _Recurrent(nn.Module):
    """The last state of an LSTM, and a class read from it."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(64, 128, batch_first=True)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """`[m, T, 64]` to `[m, 10]`."""
        y: Tensor = self.head(self.lstm(x)[0][:, -1])
        return y


def lstm() -> Problem:
    """LSTM 64 to 128, T = 50."""
    inputs = (torch.randn(32, 50, 64), torch.randint(10, (32,)))
    return Problem(_Recurrent(), classifier, inputs, 32)


def _pooled(network: nn.Module, x: Tensor, classes: Tensor, clients: Tensor) -> Tensor:
    losses = classifier(network, x, classes)
    return losses.new_zeros(12).index_add(0, clients, losses)


def clients() -> Problem:
    """The MLP; the losses of 64 poses pooled into those of 12 users."""
    inputs = (torch.randn(64, 512), torch.randint(10, (64,)), torch.arange(64) % 12)
    return Problem(_mlp(512, 1024, 1024, 10), _pooled, inputs, 12, is_sliced=False)


def _residuals(network: nn.Module, x: Tensor) -> Tensor:
    """Of Poisson's equation: the squared Laplacian less a source, at each point."""
    x = x.detach().requires_grad_()
    u = network(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    laplacian = u.new_zeros(len(x))
    for i in range(x.shape[1]):
        (second,) = torch.autograd.grad(slope[:, i].sum(), x, create_graph=True)
        laplacian = laplacian + second[:, i]
    return (laplacian - x.square().sum(dim=1)).square()


def pinn() -> Problem:
    """MLP 5-64-64-64-1 with tanh; squared residual of a Laplacian in 5 dimensions."""
    network = _mlp(5, 64, 64, 64, 1, act=nn.Tanh)
    return Problem(network, _residuals, (torch.rand(256, 5),), 256, is_sliced=False)


class _Tasks(nn.Module):
    """A trunk and three heads."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(_mlp(128, 512, 512, 512), nn.ReLU())
        self.heads = nn.ModuleList([nn.Linear(512, n) for n in (10, 1, 4)])

    def forward(self, x: Tensor) -> list[Tensor]:
        """`[n, 128]` to `[n, 10]`, `[n, 1]`, `[n, 4]`."""
        y = self.trunk(x)
        return [head(y) for head in self.heads]


def _task_losses(network: nn.Module, x: Tensor, classes: Tensor, number: Tensor) -> Tensor:
    first, second, third = network(x)
    return torch.stack(
        [
            F.cross_entropy(first, classes),
            F.mse_loss(second.squeeze(1), number),
            F.binary_cross_entropy_with_logits(third[:, 0], (number > 0).to(third.dtype)),
        ]
    )


def tasks() -> Problem:
    """Three losses of a trunk 128-512-512-512, each the mean over 256 samples."""
    inputs = (torch.randn(256, 128), torch.randint(10, (256,)), torch.randn(256))
    return Problem(_Tasks(), _task_losses, inputs, 3, is_sliced=False)


class _Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, i: int, o: int, stride: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(i, o, 3, stride, 1, bias=False)
        self.norm1 = _norm(norm, o)
        self.conv2 = nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.norm2 = _norm(norm, o)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or i != o:
            self.shortcut = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), _norm(norm, o))

    def forward(self, x: Tensor) -> Tensor:
        """`[m, i, h, w]` to `[m, o, h / stride, w / stride]`."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def _norm(norm: type[nn.Module], channels: int) -> nn.Module:
    return nn.GroupNorm(8, channels) if norm is nn.GroupNorm else norm(channels)


def resnet(
    norm: type[nn.Module] = nn.GroupNorm, *, width: int = 64, size: int = 32, m: int = 8
) -> Problem:
    """ResNet-18's layout on small images."""
    stages = []
    for k in range(4):
        i, o = width * 2 ** max(k - 1, 0), width * 2**k
        stages += [_Block(i, o, 1 + (k > 0), norm), _Block(o, o, 1, norm)]
    network = nn.Sequential(
        nn.Conv2d(3, width, 3, 1, 1, bias=False),
        _norm(norm, width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        *stages,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8 * width, 10),
    )
    images = torch.randn(m, 3, size, size)
    return Problem(network, classifier, (images, torch.randint(10, (m,))), m)


class _Gated(nn.Module):
    """Gated attention over the instances of a bag (Ilse et al. 2018)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(width, hidden), nn.ReLU())
        self.tanh, self.sigmoid = nn.Linear(hidden, 128), nn.Linear(hidden, 128)
        self.score, self.head = nn.Linear(128, 1), nn.Linear(hidden, 2)

    def scores(self, h: Tensor) -> Tensor:
        """`[..., hidden]` to `[...]`."""
        s: Tensor = self.score(self.tanh(h).tanh() * self.sigmoid(h).sigmoid())
        return s.squeeze(-1)


class _Padded(_Gated):
    """All bags of one length, the rest masked."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Instances `[m, n, width]`, mask `[m, n]`, to `[m, 2]`."""
        h = self.features(x)
        a = self.scores(h).masked_fill(~mask, -torch.inf).softmax(dim=1)  # [m, n]
        y: Tensor = self.head((a.unsqueeze(1) @ h).squeeze(1))
        return y


class _Ragged(_Gated):
    """Bags of any length, one after another."""

    def forward(self, x: Tensor, bag: Tensor) -> Tensor:
        """Instances `[n, width]`, the bag of each `[n]`, to `[m, 2]`."""
        h, m = self.features(x), int(bag.max()) + 1
        e = self.scores(h).exp()
        a = e / e.new_zeros(m).index_add(0, bag, e)[bag]  # [n]
        y: Tensor = self.head(h.new_zeros(m, h.shape[1]).index_add(0, bag, a.unsqueeze(1) * h))
        return y


def _of_bags(network: nn.Module, x: Tensor, where: Tensor, classes: Tensor) -> Tensor:
    return F.cross_entropy(network(x, where), classes, reduction="none")


def abmil() -> Problem:
    """Attention over 200 instances of 384 features a bag, padded."""
    m, n = 8, 200
    mask = torch.arange(n) < torch.randint(100, n + 1, (m, 1))
    inputs = (torch.randn(m, n, 384), mask, torch.randint(2, (m,)))
    return Problem(_Padded(384, 256), _of_bags, inputs, m)


def bags() -> Problem:
    """Attention over 100 to 200 instances of 384 features a bag, ragged."""
    m = 8
    bag = torch.arange(m).repeat_interleave(torch.randint(100, 201, (m,)))
    inputs = (torch.randn(len(bag), 384), bag, torch.randint(2, (m,)))
    return Problem(_Ragged(384, 256), _of_bags, inputs, m, is_sliced=False)
