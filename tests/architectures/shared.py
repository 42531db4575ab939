"""The modules of the table of architectures: ways to share, make and use parameters."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812, as everybody calls it
from torch.utils.checkpoint import checkpoint

from tests.architectures.models import WIDTH, mlp


class TiedChained(nn.Module):
    """Two layers in a row with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class TiedParallel(TiedChained):
    """Two layers side by side with one weight."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x) * torch.tanh(self.first(x.flip(1)))


class ParentUses(nn.Module):
    """A parent that uses its child's weight, also or only."""

    def __init__(self, *, also: bool) -> None:
        super().__init__()
        self.child, self.also = nn.Linear(WIDTH, WIDTH), also

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.child(x)) if self.also else x
        return F.linear(hidden, self.child.weight.T) * self.child.bias


class Repeated(nn.Module):
    """One layer, five times, towards its fixed point."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(5):
            z = torch.tanh(self.layer(z) + x)
        return z


class TiedHead(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:  # [m, T]
        logits = self.head(torch.tanh(self.body(self.embedding(words))))
        return F.cross_entropy(logits.mT, words, reduction="none").sum(1)


class LoRA(nn.Module):
    """A frozen weight and a low-rank update of it."""

    def __init__(self, *, merged: bool) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, 5).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, WIDTH))
        self.up = nn.Parameter(torch.randn(5, 2))
        self.merged = merged

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return F.linear(x, self.base.weight + self.up @ self.down, self.base.bias)
        return self.base(x) + x @ self.down.T @ self.up.T


class WeightOnTheLeft(nn.Module):
    """W X, poses in columns."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, WIDTH))
        self.shift = nn.Parameter(torch.randn(3, 1))

    def forward(self, x: Tensor) -> Tensor:  # [m, d] to [m, 3]
        return (self.weight @ x.T + self.shift).T


class Einsum(nn.Module):
    """Heads by einsum, over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.Parameter(torch.randn(2, WIDTH, 3))
        self.out = nn.Parameter(torch.randn(2, 3))

    def forward(self, x: Tensor) -> Tensor:  # [m, T, d] to [m, T]
        return torch.einsum("mthk,hk->mt", torch.einsum("mtd,hdk->mthk", x, self.heads), self.out)


class Temperature(nn.Module):
    """A trainable scalar, kept positive."""

    def __init__(self, *, softplus: bool) -> None:
        super().__init__()
        self.body, self.log = mlp(), nn.Parameter(torch.tensor(0.3))
        self.positive = F.softplus if softplus else torch.exp

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) / self.positive(self.log)


class Doubling(torch.autograd.Function):
    """x W with a backward of its own."""

    @staticmethod
    def forward(ctx: object, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: object, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return cotangent @ weight.T, 2 * x.T @ cotangent


class CustomFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.body = nn.Parameter(torch.randn(5, 3)), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return Doubling.apply(torch.tanh(self.body(x)), self.weight)


class Hyper(nn.Module):
    """A network that makes another one's weights, for each pose."""

    def __init__(self) -> None:
        super().__init__()
        self.make = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.make(x).unflatten(1, (3, WIDTH))
        return torch.tanh(weight @ x.unsqueeze(2)).squeeze(2)


class Generated(nn.Module):
    """A network whose weights another network makes, once for all poses."""

    def __init__(self) -> None:
        super().__init__()
        self.code, self.make = nn.Parameter(torch.randn(3)), nn.Linear(3, WIDTH * 2)

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.tanh(self.make(self.code)).reshape(WIDTH, 2)


class Fourier(nn.Module):
    """A filter in the frequency domain: complex in between."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.filter = nn.Linear(WIDTH, 8), nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(self.body(x)) * self.filter, n=8)


class Experts(nn.Module):
    """Each pose goes to one expert and back to its place."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, 2) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.router(x).softmax(1).max(1)
        result = x.new_zeros(len(x), 2)
        for number, expert in enumerate(self.experts):
            mine = (chosen == number).nonzero()[:, 0]
            routed = expert(x.index_select(0, mine)) * weight[mine, None]
            result = result.index_add(0, mine, routed)
        return result


class Checkpointed(nn.Module):
    """Blocks that are computed again in backward."""

    def __init__(self, blocks: int = 1, *, reentrant: bool = False) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh(), nn.Linear(5, WIDTH))
            for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_() if self.reentrant else x
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


class Thirds(nn.Module):
    """Each pose has a parameter of its own, divided by a whole number."""

    def __init__(self) -> None:
        super().__init__()
        self.poses = nn.ParameterList(torch.randn(1) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([torch.tanh(pose / 3) for pose in self.poses]) * x


class Prototypes(nn.Module):
    """Distances to learned points."""

    def __init__(self) -> None:
        super().__init__()
        self.points = nn.Parameter(torch.randn(3, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x, self.points)


class Vector(nn.Module):
    """A vector of weights behind a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(WIDTH, 4)
        self.weights = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.hidden(x)) @ self.weights


class Stacked(nn.Module):
    """Three experts: their weights on the right of the poses, then on the left."""

    def __init__(self) -> None:
        super().__init__()
        self.right = nn.Parameter(torch.randn(3, WIDTH, 4))
        self.left = nn.Parameter(torch.randn(3, 2, 4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.bmm(x.expand(3, *x.shape), self.right).tanh()  # [3, m, 4]
        return torch.bmm(self.left, hidden.mT).mT  # [3, m, 2]


class Ensemble(nn.Module):
    """Three models at once."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.randn(3, n, 2)) for n in (WIDTH, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x.expand(3, -1, -1), self.weight)


class Standardised(nn.Module):
    """A convolution whose weights have mean 0 and variance 1."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.conv.weight, (1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.conv.weight - mean) * (variance + 1e-5).rsqrt(), self.conv.bias)


class Offset(nn.Module):
    """One number that every pose gets."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.offset = mlp(), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.offset.square().sum().expand(len(x), 1)


class Lookup(nn.Module):
    """Poses that are parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, 3))

    def forward(self, which: Tensor) -> Tensor:
        return self.table[which]


class InSlices(nn.Module):
    """Results written one after another into one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        result = x.new_zeros(x.shape[:2])
        for i, part in enumerate(x.unbind(1)):
            result[:, i] = self.body(part)[:, 0]
        return result


class Mixed(nn.Module):
    """A narrow body and a wide head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(WIDTH, 5), nn.Linear(5, 1)

    def mixed(self) -> "Mixed":
        self.body.float()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x.float())).double())


class Phases(nn.Module):
    """A complex parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.phases = nn.Parameter(torch.randn(WIDTH, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.phases).abs()
