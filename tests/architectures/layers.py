"""Rows of the table: layers, norms, sequences."""

import torch
from torch import nn

from tests.architectures import models, states
from tests.architectures.models import WIDTH, Flat, mlp
from tests.architectures.row import Architecture, M, batch, draw, score, tokens
from tests.architectures.states import PLAIN

A = Architecture
SLOW = "exact-slow"
T = 3  # tokens of a pose
IMAGE = (2, 5, 5)


def _seq(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


def _encoder(**options: bool) -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 2, 6, dropout=0.0, **options)


LAYERS = {
    "MLP": A("one row per pose", mlp, PLAIN, dense=True),
    "Linear over tokens": A("several rows per pose", mlp, batch(T, WIDTH), dense=True),
    "Linear over a grid": A("4-D input", mlp, batch(2, T, WIDTH), dense=True),
    "Bilinear": A(
        "two inputs",
        lambda: nn.Bilinear(WIDTH, 2, 3),
        lambda model, seed: score(model(draw(seed, M, WIDTH), draw(seed + 9, M, 2))),
        dense=True,
    ),
    "Conv1d": A("", lambda: _seq(nn.Conv1d(2, 3, 3), nn.Tanh()), batch(2, 6), dense=True),
    "Conv2d": A(
        "groups, stride, dilation",
        lambda: _seq(nn.Conv2d(2, 4, 2, stride=2, dilation=2, groups=2), nn.Tanh()),
        batch(*IMAGE),
        dense=True,
    ),
    "Conv3d": A("", lambda: _seq(nn.Conv3d(1, 2, 2), nn.Tanh()), batch(1, 3, 3, 3), dense=True),
    "Conv2d, circular": A(
        "padding_mode='circular'",
        lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
        batch(*IMAGE),
        dense=True,
    ),
    "Conv2d, same": A(
        "padding='same'",
        lambda: nn.Conv2d(2, 3, (1, 3), padding="same"),
        batch(*IMAGE),
        dense=True,
    ),
    "ConvTranspose2d": A(
        "", lambda: nn.ConvTranspose2d(2, 3, 2, stride=2), batch(*IMAGE), dense=True
    ),
    "CNN": A(
        "convolutions, pooling, a head",
        lambda: _seq(
            nn.Conv2d(2, 3, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 1)
        ),
        batch(*IMAGE),
        dense=True,
    ),
    "Embedding": A(
        "padding_idx",
        lambda: nn.Embedding(7, 3, padding_idx=0),
        batch(T, inputs=tokens),
        dense=True,
    ),
    "Embedding, sparse": A(
        "sparse=True: .grad is dense",
        lambda: nn.Embedding(7, 3, sparse=True),
        batch(T, inputs=tokens),
        dense=True,
    ),
    "Embedding by frequency": A(
        "scale_grad_by_freq: frequencies in the whole batch",
        lambda: nn.Embedding(7, 3, scale_grad_by_freq=True),
        batch(T, inputs=tokens),
        SLOW,
    ),
    "Embedding, max_norm": A(
        "the forward shortens rows",
        lambda: nn.Embedding(7, 3, max_norm=0.5),
        batch(T, inputs=tokens),
        dense=True,
    ),
    "EmbeddingBag": A("", lambda: nn.EmbeddingBag(7, 3), batch(T, inputs=tokens), dense=True),
    "EmbeddingBag, ragged": A(
        "offsets",
        lambda: nn.EmbeddingBag(7, 3, mode="sum"),
        lambda model, seed: score(
            model(tokens(seed, 2 * M), torch.arange(M) * 2 - torch.arange(M) // 3)
        ),
    ),
    "EmbeddingBag, weighted": A(
        "per_sample_weights, padding_idx",
        lambda: nn.EmbeddingBag(7, 3, mode="sum", padding_idx=2),
        lambda model, seed: score(
            model(tokens(seed, M, T), per_sample_weights=draw(seed + 9, M, T).abs())
        ),
        dense=True,
    ),
    "EmbeddingBag, max": A(
        "", lambda: nn.EmbeddingBag(7, 3, mode="max"), batch(T, inputs=tokens), SLOW, dense=True
    ),
    "PReLU": A("", lambda: mlp(nn.PReLU(5)), PLAIN, dense=True),
    "In-place activations": A(
        "", lambda: mlp(nn.ReLU(True), nn.Linear(5, 5), nn.SiLU(True)), PLAIN, dense=True
    ),
    "Dropout": A("the mask that was drawn", lambda: mlp(nn.Dropout(0.4)), PLAIN, dense=True),
    "Eval mode": A("", lambda: mlp(nn.Dropout(0.4)).eval(), PLAIN, dense=True),
}

NORMS = {
    "LayerNorm": A("", lambda: mlp(nn.LayerNorm(5)), PLAIN, dense=True),
    "LayerNorm without bias": A("", lambda: mlp(nn.LayerNorm(5, bias=False)), PLAIN, dense=True),
    "LayerNorm over tokens": A(
        "normalized_shape of two", lambda: nn.LayerNorm((T, WIDTH)), batch(T, WIDTH), dense=True
    ),
    "RMSNorm": A("", lambda: mlp(nn.RMSNorm(5)), PLAIN, dense=True),
    "GroupNorm": A(
        "", lambda: _seq(nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4)), batch(*IMAGE), dense=True
    ),
    "InstanceNorm": A(
        "affine",
        lambda: _seq(nn.Conv2d(2, 3, 2), nn.InstanceNorm2d(3, affine=True)),
        batch(*IMAGE),
        dense=True,
    ),
    "BatchNorm, eval": A("", lambda: mlp(nn.BatchNorm1d(5)).eval(), PLAIN, dense=True),
    "BatchNorm, training": A(
        "poses depend on each other", lambda: mlp(nn.BatchNorm1d(5)), PLAIN, SLOW, warns=True
    ),
    "BatchNorm, no affine": A(
        "mixes poses without a parameter",
        lambda: mlp(nn.BatchNorm1d(5, affine=False)),
        PLAIN,
        SLOW,
        warns=True,
    ),
    "Attention over the batch": A(
        "poses are the tokens",
        lambda: models.Attention(batch_first=False),
        batch(WIDTH),
        SLOW,
        warns=True,
    ),
    "Mean-centred": A("x - x.mean(0)", states.Centred, PLAIN, SLOW, warns=True),
    "Contrastive loss": A(
        "every pose against every other", lambda: mlp(out=3), states.contrastive, SLOW, warns=True
    ),
}

SEQUENCES = {
    "Self-attention": A("", models.Attention, batch(T, WIDTH), dense=True),
    "Cross-attention": A(
        "",
        models.Attention,
        lambda model, seed: score(model(draw(seed, M, T, WIDTH), draw(seed + 9, M, 2, WIDTH))),
        dense=True,
    ),
    "Attention, kdim and vdim": A(
        "separate projections",
        lambda: models.Attention(memory=2, kdim=3, vdim=2),
        lambda model, seed: score(model(draw(seed, M, T, WIDTH), draw(seed + 9, M, 2, 3))),
        dense=True,
    ),
    "Attention, bias_k and bias_v": A(
        "", lambda: models.Attention(add_bias_kv=True), batch(T, WIDTH), dense=True
    ),
    "Attention, padded": A(
        "key_padding_mask",
        models.Attention,
        lambda model, seed: score(
            model(draw(seed, M, T, WIDTH), mask=torch.arange(T) > tokens(seed, M, 1, below=T))
        ),
        dense=True,
    ),
    "Attention, sequence first": A(
        "poses in dimension 1",
        lambda: models.Attention(batch_first=False),
        lambda model, seed: score(model(draw(seed, T, M, WIDTH)), dim=1),
    ),
    "TransformerEncoder": A("", lambda: _encoder(batch_first=True), batch(T, WIDTH), dense=True),
    "TransformerEncoder, sequence first": A(
        "poses in dimension 1",
        _encoder,
        lambda model, seed: score(model(draw(seed, T, M, WIDTH)), dim=1),
    ),
    "TransformerEncoder, dropout": A(
        "",
        lambda: nn.TransformerEncoderLayer(WIDTH, 2, 6, dropout=0.3, batch_first=True),
        batch(T, WIDTH),
        dense=True,
    ),
    "TransformerDecoder": A(
        "",
        lambda: nn.TransformerDecoderLayer(WIDTH, 2, 6, dropout=0.0, batch_first=True),
        lambda model, seed: score(model(draw(seed, M, T, WIDTH), draw(seed + 9, M, 2, WIDTH))),
        dense=True,
    ),
    "ViT": A("class token, positions", models.Vit, batch(1, 4, 4), dense=True),
    "RNN": A("", lambda: Flat(nn.RNN(WIDTH, 3, batch_first=True)), batch(T, WIDTH), dense=True),
    "LSTM": A("", lambda: Flat(nn.LSTM(WIDTH, 3, batch_first=True)), batch(T, WIDTH), dense=True),
    "LSTM, sequence first": A(
        "poses in dimension 1",
        lambda: Flat(nn.LSTM(WIDTH, 3, num_layers=2)),
        lambda model, seed: score(model(draw(seed, T, M, WIDTH)), dim=1),
    ),
    "GRU, bidirectional": A(
        "",
        lambda: Flat(nn.GRU(WIDTH, 3, batch_first=True, bidirectional=True)),
        batch(T, WIDTH),
        dense=True,
    ),
    "LSTM, packed": A(
        "sequences of different lengths",
        models.Packed,
        lambda model, seed: score(model(draw(seed, M, 4, WIDTH), tokens(seed, M, below=4) + 1)),
    ),
    "GRUCell": A("in a Python loop", models.Cell, batch(T, WIDTH), dense=True),
}
