"""Published models at three sizes, with random weights and a loss of their own kind.

Each is a function of a size: 0, 1 and 2 stand for plain steps of about 1, 10 and 50 ms on one
thread of a recent processor.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812, as everybody calls it

from benchmarks.ordinary import networks
from benchmarks.ordinary.cases import Case
from benchmarks.ordinary.hugging_face import (
    WORDS,
    classes_of_images,
    classes_of_words,
    language,
    llama_network,
    words,
)
from benchmarks.ordinary.molecules import atoms, dimenet, squared
from benchmarks.ordinary.molecules import network as schnet
from benchmarks.ordinary.problem import Problem

__all__ = ["CASES", "SIZES"]

SIZES = ("1 ms", "10 ms", "50 ms")


def _of_words(name: str, size: int, **more: Any) -> Problem:
    """An encoder of words with a class for each sequence."""
    import transformers

    width, layers, length = ((16, 1, 8), (64, 2, 32), (128, 4, 48))[size]
    make = getattr(transformers, f"{name}Config")
    config = make(vocab_size=WORDS, num_labels=4, max_position_embeddings=64, **more)
    for key, value in {
        "hidden_size": width,
        "dim": width,
        "embedding_size": width,
        "num_hidden_layers": layers,
        "n_layers": layers,
        "num_attention_heads": 4,
        "n_heads": 4,
        "intermediate_size": 4 * width,
        "hidden_dim": 4 * width,
    }.items():
        if hasattr(config, key):
            setattr(config, key, value)
    network = getattr(transformers, f"{name}ForSequenceClassification")(config).train()
    inputs = (words(6, length), torch.randint(4, (6,)))
    return Problem(network, classes_of_words, inputs, 6, is_random=True)


def _deberta(size: int) -> Problem:
    return _of_words(
        "DebertaV2",
        size,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_buckets=16,
        pooler_hidden_size=(16, 64, 128)[size],
    )


def _mixtral(size: int) -> Problem:
    from transformers import MixtralConfig, MixtralForCausalLM

    width, layers, length = ((16, 1, 8), (64, 2, 32), (160, 4, 40))[size]
    config = MixtralConfig(
        vocab_size=WORDS, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        max_position_embeddings=64,
    )  # fmt: skip
    network = MixtralForCausalLM(config).train()
    # Experts are multiplied by an operator that takes no float64 on a CPU.
    return Problem(network, language, (words(6, length),), 6, has_double=False)


def _mamba(size: int) -> Problem:
    from transformers import MambaConfig, MambaForCausalLM

    width, layers, length = ((16, 1, 4), (32, 2, 12), (96, 4, 24))[size]
    config = MambaConfig(
        vocab_size=WORDS, hidden_size=width, num_hidden_layers=layers, state_size=8
    )
    return Problem(MambaForCausalLM(config).train(), language, (words(6, length),), 6)


def _swin(size: int) -> Problem:
    from transformers import SwinConfig, SwinForImageClassification

    width, depths, side = ((8, [1], 8), (24, [2, 2], 16), (64, [2, 2], 32))[size]
    config = SwinConfig(
        image_size=side, patch_size=2, embed_dim=width, depths=depths, window_size=4,
        num_heads=[2, 4][: len(depths)], drop_path_rate=0.0, num_labels=10,
    )  # fmt: skip
    return _images(SwinForImageClassification(config), side, classes_of_images)


def _convnext(size: int) -> Problem:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    width, side = ((8, 16), (24, 32), (80, 32))[size]
    config = ConvNextConfig(
        image_size=side, patch_size=2, hidden_sizes=[width, 2 * width], depths=[1 + (size > 0), 2],
        num_stages=2, num_labels=10, layer_scale_init_value=0.1,
    )  # fmt: skip
    return _images(ConvNextForImageClassification(config), side, classes_of_images)


def _mixer(size: int) -> Problem:
    from timm.models.mlp_mixer import MlpMixer

    width, blocks, side = ((32, 1, 16), (96, 3, 32), (192, 6, 32))[size]
    network = MlpMixer(
        img_size=side, patch_size=4, num_blocks=blocks, embed_dim=width, num_classes=10
    )
    network.head.reset_parameters()  # zeros at first, and so the gradient of all before it
    return _images(network, side, networks.classifier)


def _images(network: nn.Module, side: int, losses: Callable[..., Tensor], m: int = 6) -> Problem:
    inputs = (torch.randn(m, 3, side, side), torch.randint(10, (m,)))
    return Problem(network.train(), losses, inputs, m)


def _resnet(train: bool, size: int) -> Problem:
    width, side = ((4, 8), (24, 16), (48, 32))[size]
    problem = networks.resnet(nn.BatchNorm2d, width=width, size=side, m=6)
    if not train:
        problem.network.eval()
        return problem
    inputs = problem.inputs
    return Problem(problem.network, problem.losses, inputs, problem.m, is_sliced=False)


def _noise(network: nn.Module, images: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    found = network(images, times).sample
    return F.mse_loss(found, noise, reduction="none").flatten(1).mean(dim=1)


def _unet(size: int) -> Problem:
    from diffusers import UNet2DModel

    widths, side = (((8,), 4), ((16, 32), 8), ((32, 64), 16))[size]
    network = UNet2DModel(
        sample_size=side, in_channels=3, out_channels=3, layers_per_block=1,
        block_out_channels=widths, norm_num_groups=4, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D")[: len(widths)],
        up_block_types=("AttnUpBlock2D", "UpBlock2D")[-len(widths) :],
    )  # fmt: skip
    images = torch.randn(2, 6, 3, side, side)
    return Problem(network.train(), _noise, (*images, torch.randint(1000, (6,))), 6)


def _adapters(use_dora: bool, size: int) -> Problem:
    from peft import LoraConfig, get_peft_model

    width, layers, length = ((16, 1, 8), (64, 2, 32), (128, 4, 48))[size]
    config = LoraConfig(
        r=4, lora_alpha=8, use_dora=use_dora, target_modules=["q_proj", "v_proj", "down_proj"]
    )
    base = llama_network(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers)
    network = get_peft_model(base, config)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:  # zeros at first, and so the gradient of each A
            nn.init.normal_(parameter, std=0.02)
    return Problem(network.train(), language, (words(6, length),), 6)


def _graphs(n: int, m: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features, edges and the graph of random nodes, about `n` a graph."""
    sizes = torch.randint(n // 2, n + n // 2, (m,))
    graph = torch.arange(m).repeat_interleave(sizes)
    near = (graph[:, None] == graph) & (torch.rand(len(graph), len(graph)) < 4 / n)
    return torch.randn(len(graph), width), (near | near.T).nonzero().T, graph


class _Pooled(nn.Module):
    """Layers on a graph, and a class read from the sum of its nodes."""

    def __init__(self, layers: list[nn.Module], width: int, *, knows_graph: bool = False) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(layers), nn.Linear(width, 3)
        self.knows_graph = knows_graph

    def forward(self, x: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
        """Nodes `[n, width]` to `[m, 3]`."""
        from torch_geometric.nn import global_add_pool

        for layer in self.layers:
            x = layer(x, edges, batch=graph) if self.knows_graph else layer(x, edges).relu()
        y: Tensor = self.head(global_add_pool(x, graph))
        return y


def _of_graphs(net: nn.Module, x: Tensor, edges: Tensor, graph: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(net(x, edges, graph), y, reduction="none")


def _graph_network(kind: str, size: int) -> Problem:
    from torch_geometric import nn as geometric

    width, depth, nodes = ((16, 2, 10), (64, 3, 60), (128, 4, 150))[size]
    if kind in ("GIN", "GraphSAGE"):
        width, depth, nodes = ((32, 2, 20), (96, 4, 120), (192, 4, 240))[size]
    if kind == "GPS":
        width, depth, nodes = ((16, 1, 8), (48, 3, 40), (96, 4, 80))[size]

    def layer() -> nn.Module:
        if kind == "GAT":
            made = geometric.GATConv(width, width // 4, heads=4)
        elif kind == "GIN":
            made = geometric.GINConv(
                nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
            )
        elif kind == "GraphSAGE":
            made = geometric.SAGEConv(width, width)
        else:
            inner = geometric.GINConv(nn.Sequential(nn.Linear(width, width), nn.ReLU()))
            made = geometric.GPSConv(width, inner, heads=4, norm="layer_norm")
        return made

    network = _Pooled([layer() for _ in range(depth)], width, knows_graph=kind == "GPS")
    inputs = (*_graphs(nodes, 6, width), torch.randint(3, (6,)))
    return Problem(network.train(), _of_graphs, inputs, 6, is_sliced=False)


def _schnet(size: int) -> Problem:
    channels, layers, m = ((16, 1, 4), (96, 4, 8), (192, 6, 16))[size]
    made = schnet(channels=channels, interactions=layers, gaussians=channels // 2)
    return Problem(made, squared, (*atoms(m), torch.randn(m)), m, is_sliced=False)


def _dimenet(size: int) -> Problem:
    width, layers, m = ((8, 1, 2), (32, 2, 8), (96, 4, 12))[size]
    network = dimenet(width, layers)
    return Problem(network, squared, (*atoms(m), torch.randn(m)), m, is_sliced=False)


_MODELS: dict[str, Callable[[int], Problem]] = {
    "Mixtral": _mixtral,
    "Mamba": _mamba,
    "Swin": _swin,
    "ResNet-18 train": partial(_resnet, True),
    "ResNet-18 eval": partial(_resnet, False),
    "ConvNeXt": _convnext,
    "MLP-Mixer": _mixer,
    "DeBERTa": _deberta,
    "ELECTRA": partial(_of_words, "Electra"),
    "DistilBERT": partial(_of_words, "DistilBert"),
    "GAT": partial(_graph_network, "GAT"),
    "GIN": partial(_graph_network, "GIN"),
    "GraphSAGE": partial(_graph_network, "GraphSAGE"),
    "GPS": partial(_graph_network, "GPS"),
    "SchNet": _schnet,
    "DimeNet++": _dimenet,
    "UNet": _unet,
    "LoRA": partial(_adapters, False),
    "DoRA": partial(_adapters, True),
}

CASES: dict[str, Case] = {
    f"{name}, {text}": Case(name, partial(make, size))
    for name, make in _MODELS.items()
    for size, text in enumerate(SIZES)
}
