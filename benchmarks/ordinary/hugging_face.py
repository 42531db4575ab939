"""Published transformers of Hugging Face and PEFT, made from a configuration: random weights."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812, as everybody calls it

from benchmarks.ordinary.problem import Problem

__all__ = ["bert", "gpt2", "llama", "lora", "t5", "vit"]

WORDS = 1000


def language(network: nn.Module, words: Tensor) -> Tensor:
    """Cross entropy of each sequence's next words, their mean."""
    return _of_next(network(input_ids=words, use_cache=False).logits, words)


def _of_next(logits: Tensor, words: Tensor) -> Tensor:
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), words[:, 1:], reduction="none")
    return losses.mean(dim=1)


def classes_of_words(network: nn.Module, words: Tensor, classes: Tensor) -> Tensor:
    """Cross entropy of a class read from each sequence."""
    return F.cross_entropy(network(input_ids=words).logits, classes, reduction="none")


def _translation(network: nn.Module, words: Tensor, said: Tensor) -> Tensor:
    logits = network(input_ids=words, decoder_input_ids=said, use_cache=False).logits
    return _of_next(logits, said)


def classes_of_images(network: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Cross entropy of a class read from each image."""
    return F.cross_entropy(network(images).logits, classes, reduction="none")


def words(m: int, length: int) -> Tensor:
    """Random words, `[m, length]`."""
    return torch.randint(WORDS, (m, length))


def bert() -> Problem:
    """BERT with a class per sequence, dropout on."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=64,
        num_labels=4,
    )
    network = BertForSequenceClassification(config).train()
    inputs = (words(8, 48), torch.randint(4, (8,)))
    return Problem(network, classes_of_words, inputs, 8, is_random=True)


def gpt2() -> Problem:
    """GPT-2, next words, dropout on."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=WORDS, n_positions=64, n_embd=128, n_layer=4, n_head=4, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return Problem(GPT2LMHeadModel(config).train(), language, (words(8, 48),), 8, is_random=True)


def llama_network(**changes: Any) -> nn.Module:
    """A small Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    network: nn.Module = LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, **(sizes | changes)))
    return network.train()


def llama() -> Problem:
    """Llama, next words."""
    return Problem(llama_network(), language, (words(8, 48),), 8)


def lora() -> Problem:
    """LoRA of rank 8 on all projections of a Llama, next words."""
    from peft import LoraConfig, get_peft_model

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=8, lora_alpha=16, target_modules=names)
    network = get_peft_model(llama_network(hidden_size=192, intermediate_size=512), config)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:  # zeros at first, and so the gradient of each A
            nn.init.normal_(parameter, std=0.02)
    return Problem(network.train(), language, (words(8, 48),), 8)


def t5() -> Problem:
    """T5, from one sequence to another, dropout on."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=WORDS, d_model=128, d_kv=32, d_ff=512, num_layers=2, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    inputs = (words(8, 32), words(8, 32))
    network = T5ForConditionalGeneration(config).train()
    return Problem(network, _translation, inputs, 8, is_random=True)


def vit() -> Problem:
    """ViT, a class per image."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=32, patch_size=4, hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=512, num_labels=10,
    )  # fmt: skip
    inputs = (torch.randn(8, 3, 32, 32), torch.randint(10, (8,)))
    return Problem(ViTForImageClassification(config).train(), classes_of_images, inputs, 8)
