"""Every loss of torch.nn.functional without a reduction."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812, as everybody calls it

from tests.operators.cases import C, Case, T, between, loss_case, normal, numbers, shares, signs

__all__ = ["LOSSES"]


_TARGETS: dict[str, Callable[..., Tensor]] = {
    "mse_loss": normal,
    "l1_loss": normal,
    "smooth_l1_loss": normal,
    "huber_loss": normal,
    "soft_margin_loss": signs,
    "hinge_embedding_loss": signs,
    "poisson_nll_loss": lambda *shape: numbers(4, *shape).double(),
    "binary_cross_entropy_with_logits": between,
}


def _elementwise_losses() -> Iterator[tuple[str, Case]]:
    for name, target in _TARGETS.items():
        function = getattr(F, name)
        for shape in ((), (C,), (T, C)):

            def loss(
                p: Tensor,
                m: int,
                function: Callable[..., Tensor] = function,
                target: Callable[..., Tensor] = target,
            ) -> Tensor:
                return function(p, target(*p.shape), reduction="none")

            yield f"{name} {['m', *shape]}", loss_case(shape, loss)


def _cross_entropies() -> Iterator[tuple[str, Case]]:
    weight = torch.tensor([0.5, 1.0, 2.0, 0.1], dtype=torch.float64)
    options = {
        "": {},
        "weight": {"weight": weight},
        "ignore_index": {"ignore_index": 1},
        "label_smoothing": {"label_smoothing": 0.1},
        "weight label_smoothing": {"weight": weight, "label_smoothing": 0.1},
        "weight ignore_index label_smoothing": {
            "weight": weight,
            "ignore_index": 1,
            "label_smoothing": 0.1,
        },
    }
    for told, option in options.items():
        for inner in ((), (T,), (2, T), (2, 2, T)):

            def hard(p: Tensor, m: int, option: dict = option, inner: tuple = inner) -> Tensor:
                return F.cross_entropy(p, numbers(C, m, *inner), reduction="none", **option)

            yield f"cross_entropy {['m', 'C', *inner]} {told}", loss_case((C, *inner), hard)
            if "ignore" in told:
                continue

            def soft(p: Tensor, m: int, option: dict = option) -> Tensor:
                return F.cross_entropy(p, shares(*p.shape), reduction="none", **option)

            yield f"cross_entropy {['m', 'C', *inner]} soft {told}", loss_case((C, *inner), soft)
            if "smoothing" in told:
                continue

            def nll(p: Tensor, m: int, option: dict = option, inner: tuple = inner) -> Tensor:
                target = numbers(C, m, *inner)
                return F.nll_loss(p.log_softmax(1), target, reduction="none", **option)

            yield f"nll_loss {['m', 'C', *inner]} {told}", loss_case((C, *inner), nll)


def _per_token(p: Tensor, m: int) -> Tensor:
    """Cross-entropy of all tokens, flattened, as language models do."""
    return F.cross_entropy(p.flatten(0, 1), numbers(C, m * T), reduction="none").view(m, T)


def _per_token_ignored(p: Tensor, m: int) -> Tensor:
    target = torch.where(torch.arange(m * T) % T == 0, -100, numbers(C, m * T))
    values = F.cross_entropy(p.flatten(0, 1), target, reduction="none").view(m, T)
    return values.sum(1) / (target.view(m, T) >= 0).sum(1)


def _ctc(p: Tensor, m: int) -> Tensor:
    lengths, short = torch.full((m,), 6), torch.full((m,), 2)
    logs = p.log_softmax(-1).transpose(0, 1)
    return F.ctc_loss(logs, numbers(3, m, 2) + 1, lengths, short, reduction="none")


def _bce_weighted(p: Tensor, m: int) -> Tensor:
    weights = {"weight": between(C), "pos_weight": between(C)}
    return F.binary_cross_entropy_with_logits(p, between(m, C), reduction="none", **weights)


LOSSES: dict[str, Case] = {
    **dict(_elementwise_losses()),
    **dict(_cross_entropies()),
    "cross_entropy per token": loss_case((T, C), _per_token),
    "cross_entropy per token ignored": loss_case((T, C), _per_token_ignored),
    "nll_loss by hand": loss_case(
        (C,), lambda p, m: -p.log_softmax(1).gather(1, numbers(C, m, 1)).squeeze(1)
    ),
    "nll_loss by number": loss_case(
        (C,), lambda p, m: -p.log_softmax(1)[torch.arange(m), numbers(C, m)]
    ),
    "binary_cross_entropy": loss_case(
        (C,),
        lambda p, m: F.binary_cross_entropy(p.sigmoid(), between(m, C), reduction="none"),
    ),
    "binary_cross_entropy weight": loss_case(
        (C,),
        lambda p, m: F.binary_cross_entropy(
            p.sigmoid(), between(m, C), weight=between(C), reduction="none"
        ),
    ),
    "binary_cross_entropy_with_logits weights": loss_case((C,), _bce_weighted),
    "mse_loss weight": loss_case(
        (C,), lambda p, m: F.mse_loss(p, normal(m, C), reduction="none", weight=between(m, C))
    ),
    "smooth_l1_loss beta": loss_case(
        (C,), lambda p, m: F.smooth_l1_loss(p, normal(m, C), reduction="none", beta=0.3)
    ),
    "huber_loss delta": loss_case(
        (C,), lambda p, m: F.huber_loss(p, normal(m, C), reduction="none", delta=0.3)
    ),
    "kl_div": loss_case(
        (C,), lambda p, m: F.kl_div(p.log_softmax(1), shares(m, C), reduction="none").sum(1)
    ),
    "kl_div log_target": loss_case(
        (C,),
        lambda p, m: F.kl_div(
            p.log_softmax(1), shares(m, C).log(), reduction="none", log_target=True
        ).sum(1),
    ),
    "poisson_nll_loss full": loss_case(
        (C,),
        lambda p, m: F.poisson_nll_loss(
            p.exp(), between(m, C) * 4, log_input=False, full=True, reduction="none"
        ),
    ),
    "gaussian_nll_loss": loss_case(
        (2, C),
        lambda p, m: F.gaussian_nll_loss(
            p[:, 0], normal(m, C), F.softplus(p[:, 1]), reduction="none", full=True
        ),
    ),
    "multi_margin_loss": loss_case(
        (C,), lambda p, m: F.multi_margin_loss(p, numbers(C, m), reduction="none")
    ),
    "multi_margin_loss weight": loss_case(
        (C,),
        lambda p, m: F.multi_margin_loss(
            p, numbers(C, m), p=2, weight=between(C), reduction="none"
        ),
    ),
    "multilabel_margin_loss": loss_case(
        (C,),
        lambda p, m: F.multilabel_margin_loss(
            p, torch.tensor([2, 0, -1, 1]).expand(m, C), reduction="none"
        ),
    ),
    "multilabel_soft_margin_loss": loss_case(
        (C,),
        lambda p, m: F.multilabel_soft_margin_loss(p, numbers(2, m, C).double(), reduction="none"),
    ),
    "multilabel_soft_margin_loss weight": loss_case(
        (C,),
        lambda p, m: F.multilabel_soft_margin_loss(
            p, numbers(2, m, C).double(), weight=between(C), reduction="none"
        ),
    ),
    "margin_ranking_loss": loss_case(
        (2,),
        lambda p, m: F.margin_ranking_loss(p[:, 0], p[:, 1], signs(m), 0.1, reduction="none"),
    ),
    "cosine_embedding_loss": loss_case(
        (2, C),
        lambda p, m: F.cosine_embedding_loss(p[:, 0], p[:, 1], signs(m), -0.9, reduction="none"),
    ),
    "triplet_margin_loss": loss_case(
        (3, C),
        lambda p, m: F.triplet_margin_loss(p[:, 0], p[:, 1], p[:, 2], margin=5.0, reduction="none"),
    ),
    "triplet_margin_loss swap": loss_case(
        (3, C),
        lambda p, m: F.triplet_margin_loss(
            p[:, 0], p[:, 1], p[:, 2], margin=5.0, p=3, swap=True, reduction="none"
        ),
    ),
    "triplet_margin_with_distance_loss": loss_case(
        (3, C),
        lambda p, m: F.triplet_margin_with_distance_loss(
            p[:, 0],
            p[:, 1],
            p[:, 2],
            distance_function=lambda a, b: 1 - F.cosine_similarity(a, b),
            margin=5.0,
            reduction="none",
        ),
    ),
    "ctc_loss": loss_case((6, C), _ctc),
    "cosine_similarity": loss_case((2, C), lambda p, m: F.cosine_similarity(p[:, 0], p[:, 1])),
    "pairwise_distance": loss_case((2, C), lambda p, m: F.pairwise_distance(p[:, 0], p[:, 1])),
    "pairwise_distance p=1": loss_case(
        (2, C), lambda p, m: F.pairwise_distance(p[:, 0], p[:, 1], p=1)
    ),
    "cdist in a pose": loss_case((T, C), lambda p, m: torch.cdist(p, p + 1)),
    "normalize": loss_case((C,), lambda p, m: F.normalize(p, dim=1) * between(C)),
}
"""Every loss of torch.nn.functional without a reduction, by name and options."""
