"""From x to the output of a program."""

from collections.abc import Callable

from tests.fuzz.programs_draft import Draft
from tests.fuzz.programs_weights import vector, weight

__all__ = ["head"]


def head(d: Draft) -> int | None:
    """Writes the output y; returns the dimension of its poses, if one is worth stating."""
    if d.layout != "m f":
        d.settle()
        d.set(d.pick("x.sum(1)", "x.mean(1)", "x[:, 0]", "x.amax(1)", "x.logsumexp(1)", "x[:, -1]"))
        d.layout = "m f"
    if d.chance(0.5):
        k = d.random.randint(1, 3)
        d.set(
            d.pick("x @ {}", "x.tanh() @ {}", "F.linear(x, ({}).t())").format(weight(d, d.width, k))
        )
        d.width = k
    kind = d.random.choice([_number, _number, _loss, _loss, _vector, _pose_second, _more])
    return kind(d)


def _number(d: Draft) -> int | None:
    d.emit(
        "y = "
        + d.pick(
            "x.sum(1)",
            "x[:, 0]",
            f"(x @ {d.parameter(d.width, 1)}).squeeze(1)",
            f"x @ {d.parameter(d.width)}",
            f"F.linear(x, {d.parameter(1, d.width)}, {d.parameter(1)})[:, 0]",
            f"(x * {vector(d, d.width)}).sum(1)",
            "x.square().sum(1)",
            "x.logsumexp(1)",
            "x.amax(1)",
            "x.norm(dim=1)",
            f"torch.einsum('mf,f->m', x, {d.parameter(d.width)})",
            f"torch.mv(x, {vector(d, d.width)})",
            f"({d.parameter(d.width)} @ x.t())",
        )
    )
    _magnified(d)
    return _arranged(d)


def _loss(d: Draft) -> int | None:
    f, truth = d.width, f"{d.mask('m', d.width)}.double()"
    longer = "F.pad(x, (0, 1), value=1.0)"  # of one number alone the cosine has no gradient
    other = d.noise("m", f + 1)
    d.emit(
        "y = "
        + d.pick(
            f"F.cross_entropy(x, {d.ints(f, 'm')}, reduction='none')",
            f"F.cross_entropy(x, {d.ints(f, 'm')}, reduction='none', label_smoothing=0.1)",
            f"F.cross_entropy(x, {d.noise('m', f)}.softmax(1), reduction='none')",
            f"F.nll_loss(x.log_softmax(1), {d.ints(f, 'm')}, reduction='none')",
            f"F.nll_loss(x.log_softmax(1), {d.ints(f, 'm')}, reduction='none', ignore_index=0)",
            f"F.mse_loss(x, {d.noise('m', f)}, reduction='none').sum(1)",
            f"F.smooth_l1_loss(x, {d.noise('m', f)}, reduction='none').mean(1)",
            f"F.huber_loss(x, {d.noise('m', f)}, reduction='none').mean(1)",
            f"F.l1_loss(x, {d.noise('m', f)}, reduction='none').mean(1)",
            f"F.binary_cross_entropy_with_logits(x, {truth}, reduction='none').sum(1)",
            f"F.binary_cross_entropy(x.sigmoid(), {truth}, reduction='none').mean(1)",
            f"F.kl_div(x.log_softmax(1), {d.noise('m', f)}.softmax(1), reduction='none').sum(1)",
            f"1 - F.cosine_similarity({longer}, {other}, eps=0.1)",
            f"F.cosine_embedding_loss({longer}, {other}, torch.ones(m), reduction='none')",
            f"F.poisson_nll_loss(x, {d.noise('m', f)}.abs(), reduction='none').mean(1)",
            f"F.gaussian_nll_loss(x, {d.noise('m', f)}, 1 + x.square(), reduction='none').mean(1)",
            f"F.multi_margin_loss(x, {d.ints(f, 'm')}, reduction='none')",
            f"F.triplet_margin_loss(x, {d.noise('m', f)}, {d.noise('m', f)}, reduction='none')",
            f"F.soft_margin_loss(x, {d.noise('m', f)}.sign(), reduction='none').sum(1)",
        )
    )
    _magnified(d)
    return _arranged(d)


def _vector(d: Draft) -> int | None:
    d.emit("y = " + d.pick("x", "x.clone()", "x.sin()", "x[:, :1]", f"x @ {weight(d, d.width, 2)}"))
    _magnified(d, "[:, None]")
    return _picked(d) if d.chance(0.2) else 0


def _pose_second(d: Draft) -> int | None:
    d.emit("y = " + d.pick("x.t()", "x.mT.contiguous()", f"{weight(d, 2, d.width)} @ x.t()"))
    _magnified(d)
    return 1


def _more(d: Draft) -> int | None:
    d.emit("y = x[:, 0]" if d.chance(0.5) else "y = x.square().sum(1)")
    _magnified(d)
    d.regroups = True
    d.emit(
        "y = "
        + d.pick(
            "y.sum()",
            "y.mean()",
            "y.sum().reshape(1)",
            "y[0]",
            "torch.stack([y, y.sin()])",
            "y[:, None]",
            "y[None]",
            "y[:, None, None] * torch.ones(1, 2, 1)",
            "torch.cat([y, y.sin()])",
            "torch.stack([y, 2 * y], 1)",
            "y.logsumexp(0)",
        )
    )
    return None


def _magnified(d: Draft, behind: str = "") -> None:
    if d.chance(0.6):
        d.emit(f"y = y * scale({d.key()}, m){behind}")


def _arranged(d: Draft) -> int | None:
    arrange: Callable[[Draft], int | None] | None = _picked if d.chance(0.25) else None
    return arrange(d) if arrange else 0


def _picked(d: Draft) -> None:
    d.regroups = True
    order = d.perm("m")
    d.emit(
        "y = "
        + d.pick(
            f"y[{order}]",
            f"y[{order}[:max(1, m - 1)]]",
            f"y[torch.cat([{order}, {order}[:1]])]",
            f"y.index_select(0, {d.ints('m', 3)})",
            "y.flip(0)",
            f"y[{d.mask('m')} | (torch.arange(m) == 0)]",
            "y[:1]",
            "y[-1]",
            "torch.stack(y.unbind(0)[::-1])",
            f"torch.take_along_dim(y, {order}[:, *[None] * (y.ndim - 1)], 0)",
        )
    )
