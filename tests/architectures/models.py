"""The modules of the table of architectures: layers."""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

WIDTH = 4


def mlp(*middle: nn.Module, out: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 5), *middle, nn.Tanh(), nn.Linear(5, out))


class Flat(nn.Module):
    """The first thing a module returns."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return self.module(*args, **kwargs)[0]


class Attention(nn.Module):
    """Attention of a query to itself, or to other keys and values."""

    def __init__(self, *, memory: int = 0, batch_first: bool = True, **options: object) -> None:
        super().__init__()
        self.memory, self.batch_first = memory, batch_first
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=batch_first, **options)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor, key: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        key = x if key is None else key
        value = key[..., : self.memory] if self.memory else key
        mixed, _ = self.attention(x, key, value, key_padding_mask=mask, need_weights=False)
        return self.head(torch.tanh(mixed))


class Vit(nn.Module):
    """Patches, a class token, positions, one encoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, 5, WIDTH))
        self.encoder = nn.TransformerEncoderLayer(
            WIDTH, 2, 6, dropout=0.0, batch_first=True, norm_first=True
        )
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, images: Tensor) -> Tensor:  # [m, 1, 4, 4]
        x = self.patches(images).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        return self.head(self.encoder(x)[:, 0])


class Packed(nn.Module):
    """Sequences of different lengths, packed."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(WIDTH, 3, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0]


class Cell(nn.Module):
    """A recurrent cell in a Python loop."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 3)
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state
