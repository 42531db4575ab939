"""The cases of the suite `ordinary`, and what they are in words."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.ordinary import hugging_face, molecules, networks
from benchmarks.ordinary.problem import Problem

__all__ = ["CASES", "Case"]


class Case(NamedTuple):
    """A network, its losses and a batch.

    Attributes:
        text: What it is, in words.
        build: Makes the problem, from torch's random numbers.
    """

    text: str
    build: Callable[[], Problem]

    def make(self) -> Problem:
        """Always the same problem."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.build()


CASES: dict[str, Case] = {
    "mlp": Case("MLP 512-1024-1024-10", networks.mlp),
    "convolutions": Case(
        "three 3x3 convolutions with GroupNorm, 32 to 64 channels, 3x32x32", networks.convolutions
    ),
    "encoder": Case(
        "transformer encoder, d = 128, 4 layers, T = 64", partial(networks.encoder, 0.0)
    ),
    "encoder-dropout": Case("the encoder with dropout", partial(networks.encoder, 0.1)),
    "tokens": Case(
        "embedding of 20 000 x 64 and positions, 2 layers, T = 32, a tag a token", networks.tokens
    ),
    "each-token": Case(
        "the same on 4 sequences of 8 tokens, every token a pose",
        partial(networks.tokens, each=True),
    ),
    "lstm": Case("LSTM 64 to 128, T = 50", networks.lstm),
    "users": Case("the MLP, losses pooled by user", networks.clients),
    "pinn": Case("Laplacian of an MLP 5-64-64-64-1 with tanh", networks.pinn),
    "tasks": Case("three losses of a trunk, means over 256 samples", networks.tasks),
    "resnet": Case("ResNet-18's layout with GroupNorm, 3x32x32", networks.resnet),
    "abmil": Case("gated attention over 200 instances a bag, padded", networks.abmil),
    "abmil-ragged": Case("gated attention over 100 to 200 instances a bag", networks.bags),
    "schnet": Case("PyG SchNet, ragged molecules", molecules.schnet),
    "bert": Case("Hugging Face BERT, d = 128, 4 layers, T = 48", hugging_face.bert),
    "gpt2": Case("Hugging Face GPT-2, d = 128, 4 layers, T = 48", hugging_face.gpt2),
    "llama": Case("Hugging Face Llama, d = 128, 4 layers, T = 48", hugging_face.llama),
    "t5": Case("Hugging Face T5, d = 128, 2 + 2 layers, T = 32", hugging_face.t5),
    "vit": Case("Hugging Face ViT, d = 128, 4 layers, 8x8 patches", hugging_face.vit),
    "lora": Case("PEFT LoRA of rank 8 on a Llama, d = 192, 4 layers", hugging_face.lora),
}
