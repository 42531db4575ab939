"""A stand-in for mtenn, which is not on PyPI: its calling convention, and what is wrong with it.

Written anew from mtenn's documentation (the pages "Combination" and "Implementing a new
Combination", equations 1 to 9) and from the behaviour of its `model.py`, `combination.py`,
`readout.py` and `strategy.py`; class, attribute and argument names are mtenn's. What it keeps:

- `Model` scores a pose, a dict, and returns `(prediction, [energy])`;
- `GroupedModel.forward` differentiates pose after pose, calls `zero_grad()`, stores N gradients of
  every parameter, and calls `combination(pred_list, grad_dict, param_names, *model_params)`;
- the combinations' backwards are the documented formulas, in the order mtenn evaluates them, so
  that float32 loses what it loses there.
"""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

Pose = dict[str, Tensor]


class Combination(nn.Module, ABC):
    @abstractmethod
    def forward(
        self, pred_list: Any, grad_dict: Any, param_names: Any, *model_params: Tensor
    ) -> tuple[Tensor, Tensor]: ...

    @staticmethod
    def split_grad_dict(grad_dict: dict[str, list[Tensor]]) -> tuple[list[str], list[Tensor]]:
        pairs = [(name, g) for name, gradients in grad_dict.items() for g in gradients]
        return [name for name, _ in pairs], [g for _, g in pairs]

    @staticmethod
    def join_grad_dict(keys: list[str], tensors: list[Tensor]) -> dict[str, list[Tensor]]:
        return {key: [t for k, t in zip(keys, tensors, strict=True) if k == key] for key in keys}


class _ByFormula(torch.autograd.Function):
    """`value` and `slope` are a rule and its documented derivative, both of N predictions."""

    @staticmethod
    def forward(value, slope, pred_list, grad_dict, param_names, *model_params):
        predictions = torch.stack(pred_list).flatten()
        return value(predictions.detach()).detach(), predictions

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.slope, pred_list, grad_dict, ctx.names, *model_params = inputs
        ctx.keys, gradients = Combination.split_grad_dict(grad_dict)
        ctx.save_for_backward(torch.stack(pred_list).flatten(), *gradients, *model_params)

    @staticmethod
    def backward(ctx, comb_grad, pose_grads):
        predictions, *saved = ctx.saved_tensors
        gradients = Combination.join_grad_dict(ctx.keys, saved[: len(ctx.keys)])
        slope = ctx.slope(predictions)
        total = {
            name: comb_grad * sum(s * g for s, g in zip(slope, rows, strict=True))  # equation 1
            + sum(w * g for w, g in zip(pose_grads, rows, strict=True))  # equation 2
            for name, rows in gradients.items()
        }
        return (None,) * 5 + tuple(total[name] for name in ctx.names)


class MeanCombination(Combination):
    def forward(self, pred_list, grad_dict, param_names, *model_params):
        def value(y):
            return y.mean()  # equation 3

        def slope(y):
            return torch.full_like(y, 1 / len(y))  # equation 4

        return _ByFormula.apply(value, slope, pred_list, grad_dict, param_names, *model_params)


class MaxCombination(Combination):
    def __init__(self, negate_preds=True, pred_scale=1000.0):
        super().__init__()
        self.negate_preds = negate_preds
        self.pred_scale = pred_scale

    def forward(self, pred_list, grad_dict, param_names, *model_params):
        n, t = -1 if self.negate_preds else 1, self.pred_scale

        def value(y):
            return n * torch.logsumexp(n * t * y, dim=0) / t  # equation 5

        def slope(y):
            q = torch.logsumexp(n * t * y, dim=0)  # equation 6
            return (n * t * y - q).exp()  # equation 9

        return _ByFormula.apply(value, slope, pred_list, grad_dict, param_names, *model_params)


class BoltzmannCombination(Combination):
    def forward(self, pred_list, grad_dict, param_names, *model_params):
        def value(y):
            return (torch.softmax(-y, dim=0) * y).sum()

        def slope(y):
            p = torch.softmax(-y, dim=0)
            return p * (1 - y + (p * y).sum())

        return _ByFormula.apply(value, slope, pred_list, grad_dict, param_names, *model_params)


for _own in (MeanCombination, MaxCombination, BoltzmannCombination):
    _own.__module__ = "mtenn.combination"


class Model(nn.Module):
    def __init__(self, representation, strategy, readout=None):
        super().__init__()
        self.representation = representation
        self.strategy = strategy
        self.readout = readout

    def forward(self, comp: Pose) -> tuple[Tensor, list[Tensor]]:
        parts = [{"pos": comp["pos"][comp["lig"] == side]} for side in (True, False)]
        energy = self.strategy(*(self.representation(part) for part in (comp, *parts)))
        return energy if self.readout is None else self.readout(energy), [energy]


class GroupedModel(Model):
    def __init__(
        self, representation, strategy, combination, pred_readout=None, comb_readout=None
    ) -> None:
        super().__init__(representation, strategy, pred_readout)
        self.combination = combination
        self.comb_readout = comb_readout

    def forward(self, input_list: list[Pose]) -> tuple[Tensor, Tensor]:
        predictions: list[Tensor] = []
        gradients: dict[str, list[Tensor]] = {}
        for pose in input_list:
            prediction, _ = super().forward(pose)
            predictions.append(prediction.detach())
            self.zero_grad()
            prediction.backward()
            for name, p in self.named_parameters():
                gradients.setdefault(name, []).append(p.grad.detach())
        self.zero_grad()
        names, parameters = zip(*self.named_parameters(), strict=True)
        combined, per_pose = self.combination(predictions, gradients, names, *parameters)
        return combined if self.comb_readout is None else self.comb_readout(combined), per_pose


class Representation(nn.Module):
    """Atoms `[a, 3]` of a pose to `[1, width]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.atoms = nn.Linear(3, width)

    def forward(self, pose: Pose) -> Tensor:
        return self.atoms(pose["pos"]).tanh().sum(dim=0, keepdim=True)


class DeltaStrategy(nn.Module):
    """Energy of the complex less those of its parts: a tied call of the same layer."""

    def __init__(self, energy_func: nn.Module) -> None:
        super().__init__()
        self.energy_func = energy_func

    def forward(self, comp: Tensor, *parts: Tensor) -> Tensor:
        energy: Tensor = self.energy_func(comp) - sum(self.energy_func(part) for part in parts)
        return energy


class PIC50Readout(nn.Module):
    """From energies in kT, of which low ones are good, to pIC50, of which high ones are."""

    def forward(self, energy: Tensor) -> Tensor:
        return -energy / math.log(10)
