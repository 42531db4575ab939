"""Opacus's ways to rows and to clipped sums, with an attention that its hooks can serve."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.cases import Problem
from benchmarks.exact import Named, gradients
from benchmarks.per_pose import Found, Step

__all__ = [
    "clipped_flat",
    "clipped_ghost",
    "expanded",
    "functorch",
    "hooked",
    "opacus_rows",
    "packed",
    "split",
]

Wrap = Callable[[nn.Module], nn.Module]

PARTS = ("query", "key", "value")


class SplitAttention(nn.Module):
    """`nn.MultiheadAttention` made of `nn.Linear`, which Opacus has hooks for; batch first.

    Opacus refuses `nn.MultiheadAttention`. The replacement it offers, `DPMultiheadAttention`,
    computes another function under `batch_first=True` (1.6.0: heads are not moved back behind
    positions), and without `scaled_dot_product_attention`.
    """

    batch_first = True

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads = attention.num_heads
        weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
        self.query, self.key, self.value = map(_linear, weights, biases)
        self.out_proj = _linear(attention.out_proj.weight, attention.out_proj.bias)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **_: object) -> tuple[Tensor, None]:
        """Self-attention over `[m, T, d]`, without masks."""
        parts = (self.query(q), self.key(k), self.value(v))
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in parts)  # [m, h, T, ·]
        out = scaled_dot_product_attention(q, k, v)
        return self.out_proj(out.transpose(1, 2).flatten(2)), None


def hooked(network: nn.Module) -> nn.Module:
    """The network in Opacus's wrapper; its attentions are replaced in place, sharing memory."""
    from opacus import GradSampleModule

    wrapped: nn.Module = GradSampleModule(split(network), loss_reduction="sum")
    return wrapped


def functorch(network: nn.Module) -> nn.Module:
    """Likewise, with `torch.func` instead of formulas in the hooks."""
    from opacus import GradSampleModule

    return GradSampleModule(split(network), loss_reduction="sum", force_functorch=True)


def expanded(network: nn.Module) -> nn.Module:
    """Likewise, with torch's expanded weights instead of hooks."""
    from opacus.grad_sample.gsm_exp_weights import GradSampleModuleExpandedWeights

    wrapped: nn.Module = GradSampleModuleExpandedWeights(split(network), loss_reduction="sum")
    return wrapped


def opacus_rows(wrap: Wrap, network: nn.Module) -> Step:
    """Opacus leaves the rows on the parameters; nothing stays there."""
    wrapped = wrap(network)

    def step(problem: Problem) -> Found:
        wrapped(*problem.inputs).sum().backward()
        rows = {name: _taken(parameter) for name, parameter in network.named_parameters()}
        return None, rows

    return step


def clipped_flat(network: nn.Module) -> Step:
    """Opacus's per-example clipping: all rows, their norms, the clipped sum. No noise."""
    from opacus.optimizers import DPOptimizer

    wrapped = hooked(network)
    descent = torch.optim.SGD(wrapped.parameters(), lr=0.0)
    optimizer = DPOptimizer(descent, noise_multiplier=0.0, max_grad_norm=1, expected_batch_size=1)

    def step(problem: Problem) -> Found:
        optimizer.max_grad_norm = problem.max_norm
        optimizer.zero_grad(set_to_none=True)
        wrapped(*problem.inputs).sum().backward()
        optimizer.clip_and_accumulate()
        return None, {name: p.summed_grad for name, p in network.named_parameters()}

    return step


def clipped_ghost(network: nn.Module) -> Step:
    """Opacus's ghost clipping: norms in a first backward, the clipped sum in a second. No noise."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(
        split(network), loss_reduction="sum", max_grad_norm=1, use_ghost_clipping=True
    )
    descent = torch.optim.SGD(wrapped.parameters(), lr=0.0)
    optimizer = DPOptimizerFastGradientClipping(
        descent, noise_multiplier=0.0, max_grad_norm=1, expected_batch_size=1
    )

    def step(problem: Problem) -> Found:
        wrapped.max_grad_norm = optimizer.max_grad_norm = problem.max_norm
        optimizer.zero_grad(set_to_none=True)
        y = wrapped(*problem.inputs).squeeze(1)
        DPTensorFastGradientClipping(wrapped, optimizer, y, "sum").backward()
        return None, gradients(network)

    return step


def _taken(parameter: Any) -> Tensor:
    rows: Tensor = parameter.grad_sample
    parameter.grad_sample = parameter.grad = None
    return rows


def split(network: nn.Module) -> nn.Module:
    """The network, its attentions replaced in place by `SplitAttention`."""
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.MultiheadAttention):
                setattr(parent, name, SplitAttention(child))
    return network


def packed(found: Named, dim: int) -> Named:
    """The parts of each split attention joined along `dim`, under `MultiheadAttention`'s names."""
    joined = dict(found)
    for name in [name for name in found if f".{PARTS[0]}." in name]:
        parts = [joined.pop(name.replace(f".{PARTS[0]}.", f".{part}.")) for part in PARTS]
        joined[name.replace(f".{PARTS[0]}.", ".in_proj_")] = torch.cat(parts, dim)
    return joined


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight, layer.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
    return layer
