"""Layers of torch.nn that keep poses apart."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812, as everybody calls it

from tests.operators.cases import C, Case, T, function_case, layer_case, normal, numbers, table_case

__all__ = ["LAYERS"]


_ACTIVATIONS = [
    "CELU",
    "ELU",
    "GELU",
    "Hardshrink",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "LeakyReLU",
    "LogSigmoid",
    "Mish",
    "PReLU",
    "RReLU",
    "ReLU",
    "ReLU6",
    "SELU",
    "SiLU",
    "Sigmoid",
    "Softplus",
    "Softshrink",
    "Softsign",
    "Tanh",
    "Tanhshrink",
]

_SIZES = {1: (2, 8), 2: (2, 8, 8), 3: (2, 8, 8, 8)}


def _activations() -> Iterator[tuple[str, Case]]:
    for name in _ACTIVATIONS:
        yield name, layer_case((C,), getattr(nn, name))
    yield "GELU tanh", layer_case((C,), lambda: nn.GELU("tanh"))
    yield "PReLU channels", layer_case((C, T), lambda: nn.PReLU(C))
    yield "Threshold", layer_case((C,), lambda: nn.Threshold(0.1, 0.2))
    yield "GLU", layer_case((C,), nn.GLU)
    yield "GLU dim 1", layer_case((C, T), lambda: nn.GLU(1))
    for name in ("Softmax", "Softmin", "LogSoftmax"):
        yield name, layer_case((C, T), lambda name=name: getattr(nn, name)(1))
    yield "Softmax2d", layer_case((C, T, T), nn.Softmax2d)


def _of_dimensions() -> Iterator[tuple[str, Case]]:
    for n, shape in _SIZES.items():
        makers = {
            f"Conv{n}d": lambda n=n: getattr(nn, f"Conv{n}d")(2, 3, 3, padding=1),
            f"ConvTranspose{n}d": lambda n=n: getattr(nn, f"ConvTranspose{n}d")(2, 3, 2, 2),
            f"AvgPool{n}d": lambda n=n: getattr(nn, f"AvgPool{n}d")(2),
            f"MaxPool{n}d": lambda n=n: getattr(nn, f"MaxPool{n}d")(2),
            f"LPPool{n}d": lambda n=n: getattr(nn, f"LPPool{n}d")(2, 2),
            f"AdaptiveAvgPool{n}d": lambda n=n: getattr(nn, f"AdaptiveAvgPool{n}d")(3),
            f"AdaptiveAvgPool{n}d 1": lambda n=n: getattr(nn, f"AdaptiveAvgPool{n}d")(1),
            f"AdaptiveMaxPool{n}d": lambda n=n: getattr(nn, f"AdaptiveMaxPool{n}d")(3),
            f"ZeroPad{n}d": lambda n=n: getattr(nn, f"ZeroPad{n}d")(1),
            f"ReflectionPad{n}d": lambda n=n: getattr(nn, f"ReflectionPad{n}d")(1),
            f"ReplicationPad{n}d": lambda n=n: getattr(nn, f"ReplicationPad{n}d")(1),
            f"CircularPad{n}d": lambda n=n: getattr(nn, f"CircularPad{n}d")(1),
            f"BatchNorm{n}d": lambda n=n: getattr(nn, f"BatchNorm{n}d")(2),
            f"InstanceNorm{n}d": lambda n=n: getattr(nn, f"InstanceNorm{n}d")(2, affine=True),
            f"Dropout{n}d": lambda n=n: getattr(nn, f"Dropout{n}d")(),
        }
        for name, make in makers.items():
            yield name, layer_case(shape, make)
        yield f"InstanceNorm{n}d train", layer_case(shape, makers[f"InstanceNorm{n}d"], train=True)
        yield f"Dropout{n}d train", layer_case(shape, makers[f"Dropout{n}d"], train=True)
        yield f"MaxUnpool{n}d", function_case(shape, lambda x, n=n: _unpooled(x, n))
        yield f"GroupNorm {n}d", layer_case((4, *shape[1:]), lambda: nn.GroupNorm(2, 4))
    for name in ("MaxPool", "AvgPool"):
        yield (
            f"{name}2d overlapping",
            layer_case(_SIZES[2], lambda name=name: getattr(nn, f"{name}2d")(3, 2, 1)),
        )


def _unpooled(x: Tensor, n: int) -> Tensor:
    values, places = getattr(F, f"max_pool{n}d")(x, 2, return_indices=True)
    return getattr(F, f"max_unpool{n}d")(values, places, 2)


_MODES = {
    "nearest": (1, 2, 3),
    "nearest-exact": (1, 2, 3),
    "area": (1, 2, 3),
    "linear": (1,),
    "bilinear": (2,),
    "bicubic": (2,),
    "trilinear": (3,),
}


def _resized() -> Iterator[tuple[str, Case]]:
    for mode, dimensions in _MODES.items():
        for n in dimensions:
            yield (
                f"interpolate {mode} {n}d",
                function_case(
                    (2, *[4] * n),
                    lambda x, mode=mode: F.interpolate(x, scale_factor=2, mode=mode),
                ),
            )
    for mode in ("bilinear", "bicubic"):
        yield (
            f"interpolate {mode} antialias",
            function_case(
                (2, 8, 8),
                lambda x, mode=mode: F.interpolate(x, 4, mode=mode, antialias=True),
            ),
        )


def _sampled(x: Tensor, n: int, mode: str) -> Tensor:
    grid = torch.tanh(normal(len(x), *[3] * n, n)).to(x)
    return F.grid_sample(x, grid, mode=mode, align_corners=False)


def _transformed(theta: Tensor) -> Tensor:
    """A spatial transformer: the poses say where to look."""
    grid = F.affine_grid(theta, [len(theta), 2, 4, 4], align_corners=False)
    return F.grid_sample(normal(len(theta), 2, 4, 4), grid, align_corners=False)


def _shapes() -> Iterator[tuple[str, Case]]:
    yield "logcumsumexp", function_case((4, 3), lambda x: x.logcumsumexp(1))
    yield "matrix_exp", function_case((3, 3), torch.matrix_exp)
    yield (
        "AdaptiveAvgPool2d 1 channels_last",
        layer_case(
            (2, 4, 4),
            lambda: nn.AdaptiveAvgPool2d(1),
            lambda f, x: f(x.to(memory_format=torch.channels_last)),
        ),
    )
    yield "PixelShuffle", layer_case((4, 3, 3), lambda: nn.PixelShuffle(2))
    yield "PixelUnshuffle", layer_case((1, 4, 4), lambda: nn.PixelUnshuffle(2))
    yield "ChannelShuffle", layer_case((4, 3, 3), lambda: nn.ChannelShuffle(2))
    yield "Unfold", layer_case((2, 4, 4), lambda: nn.Unfold(2))
    yield "Fold", layer_case((8, 9), lambda: nn.Fold((4, 4), 2))
    yield "grid_sample 2d", function_case((2, 4, 4), lambda x: _sampled(x, 2, "bilinear"))
    yield "grid_sample 2d nearest", function_case((2, 4, 4), lambda x: _sampled(x, 2, "nearest"))
    yield "grid_sample 2d bicubic", function_case((2, 4, 4), lambda x: _sampled(x, 2, "bicubic"))
    yield "grid_sample 3d", function_case((2, 4, 4, 4), lambda x: _sampled(x, 3, "bilinear"))
    yield "affine_grid", function_case((2, 3), _transformed)
    yield (
        "Flatten Unflatten",
        layer_case((4, 3), lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 2))),
    )
    yield (
        "Bilinear",
        layer_case((2, C), lambda: nn.Bilinear(C, C, 3), lambda f, x: f(x[:, 0], x[:, 1])),
    )
    yield (
        "CosineSimilarity",
        layer_case((2, C), nn.CosineSimilarity, lambda f, x: f(x[:, 0], x[:, 1]) + 1),
    )
    yield (
        "LocalResponseNorm",
        layer_case((4, 3, 3), lambda: nn.LocalResponseNorm(2)),
    )
    yield "LayerNorm", layer_case((T, C), lambda: nn.LayerNorm(C))
    yield "LayerNorm two", layer_case((T, C), lambda: nn.LayerNorm((T, C)))
    yield "RMSNorm", layer_case((T, C), lambda: nn.RMSNorm(C))
    yield "Dropout", layer_case((C,), nn.Dropout, train=True)
    yield "AlphaDropout", layer_case((C,), nn.AlphaDropout, train=True)
    yield "FeatureAlphaDropout", layer_case((C, T), nn.FeatureAlphaDropout, train=True)


def _recurrent() -> Iterator[tuple[str, Case]]:
    def first(layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x)[0]

    def second_dimension(layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x.transpose(0, 1))[0].transpose(0, 1)

    def state(layer: nn.Module, x: Tensor) -> Tensor:
        last = layer(x)[1]
        return (last[0] if isinstance(last, tuple) else last).transpose(0, 1)

    def packed(layer: nn.Module, x: Tensor) -> Tensor:
        lengths = torch.arange(len(x)) % T + 1
        rows = nn.utils.rnn.pack_padded_sequence(x, lengths, True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(layer(rows)[0], batch_first=True)[0]

    for name in ("RNN", "LSTM", "GRU"):
        kind = getattr(nn, name)
        for told, options in {
            "": {},
            "bidirectional": {"bidirectional": True},
            "two layers": {"num_layers": 2},
            "without bias": {"bias": False},
        }.items():

            def make(kind: type = kind, options: dict = options) -> nn.Module:
                return kind(C, 3, batch_first=True, **options)

            yield f"{name} {told}".strip(), layer_case((T, C), make, first)
        yield f"{name} last state", layer_case((T, C), make, state)
        yield f"{name} packed", layer_case((T, C), make, packed)
        yield (
            f"{name} poses second",
            layer_case((T, C), lambda kind=kind: kind(C, 3), second_dimension),
        )
        cell = getattr(nn, f"{name}Cell")

        def once(layer: nn.Module, x: Tensor) -> Tensor:
            found = layer(x)
            return found[0] if isinstance(found, tuple) else found

        yield f"{name}Cell", layer_case((C,), lambda cell=cell: cell(C, 3), once)
    yield (
        "LSTM projected",
        layer_case((T, C), lambda: nn.LSTM(C, 3, proj_size=2, batch_first=True), first),
    )


def _attending() -> Iterator[tuple[str, Case]]:
    def attend(**options: object) -> Callable[[nn.Module, Tensor], Tensor]:
        def call(layer: nn.Module, x: Tensor) -> Tensor:
            told = dict(options)
            if told.pop("padded", False):
                told["key_padding_mask"] = torch.arange(T) > torch.arange(len(x))[:, None] % T
            return layer(x, x, x, **told)[0]

        return call

    causal = torch.ones(T, T).triu(1).bool()
    calls = {
        "": attend(),
        "without weights": attend(need_weights=False),
        "mask": attend(attn_mask=causal),
        "causal": attend(attn_mask=causal, is_causal=True, need_weights=False),
        "padding": attend(padded=True),
        "padding without weights": attend(padded=True, need_weights=False),
        "mask padding": attend(attn_mask=causal, padded=True),
    }
    for told, call in calls.items():
        yield (
            f"MultiheadAttention {told}".strip(),
            layer_case((T, C), lambda: nn.MultiheadAttention(C, 2, batch_first=True), call),
        )
    yield (
        "MultiheadAttention bias_kv",
        layer_case(
            (T, C),
            lambda: nn.MultiheadAttention(C, 2, batch_first=True, add_bias_kv=True),
            calls[""],
        ),
    )
    yield (
        "MultiheadAttention poses second",
        layer_case(
            (T, C),
            lambda: nn.MultiheadAttention(C, 2),
            lambda f, x: attend()(f, x.transpose(0, 1)).transpose(0, 1),
        ),
    )
    for drop in (0.0, 0.2):
        for norm_first in (False, True):
            for name in ("relu", "gelu"):

                def make(drop: float = drop, first: bool = norm_first, name: str = name):
                    return nn.TransformerEncoderLayer(
                        C, 2, 8, drop, name, batch_first=True, norm_first=first
                    )

                told = f"dropout {drop} norm_first {norm_first} {name}"
                yield f"TransformerEncoderLayer {told}", layer_case((T, C), make, train=True)
                yield (
                    f"TransformerEncoderLayer masked {told}",
                    layer_case((T, C), make, lambda f, x: f(x, src_mask=causal), train=True),
                )
    yield (
        "TransformerDecoderLayer",
        layer_case(
            (T, C),
            lambda: nn.TransformerDecoderLayer(C, 2, 8, 0.0, batch_first=True),
            lambda f, x: f(x, x),
            train=True,
        ),
    )


def _bags(layer: nn.Module, m: int) -> Tensor:
    return layer(numbers(7, 2 * m), torch.arange(0, 2 * m, 2))


def _embeddings() -> Iterator[tuple[str, Case]]:
    yield "Embedding", table_case(lambda: nn.Embedding(7, 3), lambda f, m: f(numbers(7, m)))
    yield (
        "Embedding tokens",
        table_case(lambda: nn.Embedding(7, 3), lambda f, m: f(numbers(7, m, T))),
    )
    yield (
        "Embedding padding",
        table_case(lambda: nn.Embedding(7, 3, padding_idx=0), lambda f, m: f(numbers(7, m, T))),
    )
    for mode in ("sum", "mean", "max"):
        yield (
            f"EmbeddingBag {mode}",
            table_case(
                lambda mode=mode: nn.EmbeddingBag(7, 3, mode=mode), lambda f, m: f(numbers(7, m, T))
            ),
        )
        yield (
            f"EmbeddingBag {mode} offsets",
            table_case(lambda mode=mode: nn.EmbeddingBag(7, 3, mode=mode), _bags),
        )


LAYERS: dict[str, Case] = {
    **dict(_activations()),
    **dict(_of_dimensions()),
    **dict(_resized()),
    **dict(_shapes()),
    **dict(_recurrent()),
    **dict(_attending()),
    **dict(_embeddings()),
}
"""Layers of torch.nn that keep poses apart, by name and options."""
