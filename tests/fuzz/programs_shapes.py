"""Operators without parameters: views, writes, orders, scans, reductions."""

from collections.abc import Callable

from tests.fuzz.programs_draft import LAYOUTS, Draft
from tests.fuzz.programs_linalg import of_matrices, of_waves

__all__ = ["SHAPES", "activated", "viewed"]

Operator = Callable[[Draft], None]

WITH_ROWS = [layout for layout in LAYOUTS if "T" in layout]


def laid_out(d: Draft) -> None:
    """Another layout; a copy, now and then."""
    d.settle(d.random.choice(WITH_ROWS))
    d.set(d.pick("x", "x.contiguous()", "x.clone()", "x + 0", "x.contiguous()"))


def activated(d: Draft) -> None:
    d.set(
        d.pick(
            "torch.tanh(x)",
            "F.gelu(x)",
            "F.softplus(x)",
            "F.elu(x, inplace=False)",
            "F.leaky_relu(x * 1, 0.2, inplace=True)",
            "F.silu(x + 0, inplace=True)",
            "(x * 1).tanh_()",
            "(x + 1).mul_(0.5).sin_()",
            "F.hardtanh(x)",
            "x.abs().sqrt()",
            "x.square().add(1).log()",
            "x.sign() * x.abs().pow(1.5)",
            "torch.erf(x)",
            "x.sigmoid()",
            "F.softsign(x)",
            "x.nan_to_num()",
            "x * x.detach()",
            "x - x.detach().mean()",
            "F.dropout(x, 0.3, training=p.training)",
            "F.dropout(x, 0.5)",
            "F.alpha_dropout(x, 0.2, training=p.training)",
            "F.rrelu(x, training=p.training)",
            "x.clamp(-1, 1)",
            "-x",
            "x.neg().neg()",
            "torch.special.i0e(x)",
        )
    )


def viewed(d: Draft) -> None:
    """Views that come back to where they were."""
    f, last = d.feature, d.ndim - 1
    twice = "torch.stack([x, x], -1)[..., None].expand(*x.shape, 2, 2)"
    d.set(
        d.pick(
            f"x.unsqueeze({f}).squeeze({f})",
            f"x.flatten({max(0, last - 1)}).view(x.shape)",
            f"x.transpose(0, {last}).contiguous().transpose(0, {last})",
            f"torch.stack(x.unbind({f}), {f})",
            f"torch.cat(x.chunk(2, {f}), {f})",
            f"torch.cat(x.split(1, {f})[::-1], {f})",
            f"x.narrow({f}, 0, {d.width})",
            "x[...]",
            "x[None].squeeze(0)",
            "x.as_strided(x.size(), x.stride())",
            "x.expand(x.shape)",
            "x.expand(1, *x.shape)[0]",
            "x.reshape(-1).view(x.shape)",
            "x.T.T" if d.ndim == 2 else "x.mT.mT",
            "x.ravel().unflatten(0, x.shape)",
            "x.view_as(x)",
            "x.moveaxis(0, -1).moveaxis(-1, 0)",
            "x.repeat_interleave(1, 0)",
            f"{twice}.diagonal(0, -2, -1)[..., {d.pick('0', '1')}]",
        )
    )


def rearranged(d: Draft) -> None:
    """The features in another order, or others."""
    f = d.feature
    choices = [
        f"x.flip({f})",
        f"x.roll(1, {f})",
        f"x.index_select({f}, {d.perm(d.width)})",
        f"torch.cat([x, x.sin()], {f}).narrow({f}, 1, {d.width})",
    ]
    if d.is_last:
        choices += [
            f"x[..., {d.perm(d.width)}]",
            f"x[..., {d.ints(d.width, d.width)}]",
            f"x.gather(-1, {d.ints(d.width, '*x.shape')})",
            f"torch.take_along_dim(x, {d.ints(d.width, '*x.shape')}, -1)",
            "x[..., ::1]",
            "F.pad(x, (1, -1))",
            f"torch.zeros_like(x).scatter_add(-1, {d.ints(d.width, '*x.shape')}, x)",
            f"torch.zeros_like(x).index_add(-1, {d.ints(d.width, d.width)}, x)",
            f"x.scatter(-1, {d.ints(d.width, '*x.shape')}, x.sin())",
            f"x.index_copy(-1, {d.perm(d.width)}, x.sin())",
        ]
    d.set(d.random.choice(choices))


def rows_changed(d: Draft) -> None:
    """Other rows of each pose: fewer, more, in another order."""
    d.settle()
    t, two = "x.shape[1]", f"x.new_zeros(m, 2, {d.width})"
    d.set(
        d.pick(
            "x.flip(1)",
            "x.roll(1, 1)",
            f"x[:, {d.perm(t)}]",
            "x.repeat(1, 2, 1)",
            "x.tile(1, 2, 1)",
            "x.repeat_interleave(2, 1)",
            "torch.cat([x, x.flip(1)], 1)",
            "torch.stack([x, 2 * x], 2).flatten(1, 2)",
            "F.pad(x, (0, 0, 1, 0))",
            "F.pad(x.mT, (1, 1), 'replicate').mT",
            "F.pad(x.mT, (1, 0), 'circular').mT",
            f"x[:, :max(1, {t} - 1)]",
            "x[:, ::2]",
            "x[:, -1:]",
            f"x.narrow(1, 0, ({t} + 1) // 2)",
            "F.avg_pool1d(x.mT, 2, 1, padding=1).mT",
            "F.max_pool1d(x.mT, 2, 1, padding=1).mT",
            "F.adaptive_avg_pool1d(x.mT, 2).mT",
            "F.adaptive_max_pool1d(x.mT, 1).mT",
            "F.interpolate(x.mT, scale_factor=2).mT",
            "x.repeat(1, 2, 1).unfold(1, 2, 1).sum(-1)",
            f"x.index_select(1, {d.ints(t, 3)})",
            f"x[torch.arange(m)[:, None], {d.ints(t, 'm', 2)}]",
            f"x.gather(1, {d.ints(t, 'm', 2, d.width)})",
            f"{two}.index_add(1, {d.ints(2, t)}, x)",
            f"{two}.scatter_reduce(1, {d.ints(2, 'm', t, d.width)}, x, 'sum')",
            f"x * {d.mask('m', t)}[..., None]",
            f"x.masked_fill({d.mask('m', t)}[..., None], 0.5)",
        )
    )
    d.resized()


def poses_changed(d: Draft) -> None:
    """Poses in another order, fewer, or some twice."""
    d.settle(d.pick("m T f", "m f T"))
    order = d.perm("m")
    d.set(
        d.pick(
            f"x[{order}]",
            f"x.index_select(0, {order})",
            f"x[{order}[:max(1, m - 1)]]",
            f"x[{order}[:max(1, m - 1)]]",
            "x.flip(0)",
            "x.roll(1, 0)",
            "torch.cat(x.tensor_split(2)[::-1])",
            "torch.stack(x.unbind(0)[::-1])",
            "torch.cat([x[1:], x[:1]])",
            "torch.cat([x[1:], x])",
            f"torch.zeros_like(x).index_add(0, {order}, x)",
            f"torch.zeros_like(x).index_copy(0, {order}, x)",
            f"torch.zeros_like(x).index_put(({order},), x)",
            f"torch.take_along_dim(x, {order}[:, None, None], 0)",
            f"x.gather(0, {order}[:, None, None].expand_as(x))",
            f"torch.einsum('ab,b...->a...', torch.eye(m).to(x)[{order}], x)",
            f"(torch.eye(m).to(x)[{order}] @ x.flatten(1)).view_as(x)",
            "x.repeat(2, 1, 1)[:m]",
            "x.repeat_interleave(2, 0)[::2]",
            "torch.stack([x, x.cos()])[1]",
            f"x[{d.mask('m')} | (torch.arange(m) == 0)]",
        )
    )
    d.emit("m = len(x)")
    d.regroups = True
    d.resized()


def dealt(d: Draft) -> None:
    """Rows are dealt to poses, as atoms to molecules."""
    d.settle()
    owners = d.name("o")
    d.emit(f"{owners} = {d.ints('m', 'm * x.shape[1]')}", "x = x.flatten(0, 1)")
    f = d.width
    zeros, spread = f"x.new_zeros(m, {f})", f"{owners}[:, None].expand_as(x)"
    d.set(
        d.pick(
            f"{zeros}.index_add(0, {owners}, x)",
            f"{zeros}.index_add_(0, {owners}, x * 2)",
            f"{zeros}.scatter_add(0, {spread}, x)",
            f"{zeros}.scatter_reduce(0, {spread}, x, 'mean')",
            f"{zeros}.scatter_reduce(0, {spread}, x, 'amax', include_self=False)",
            f"{zeros}.index_reduce(0, {owners}, x, 'mean')",
            f"{zeros}.index_put(({owners},), x, accumulate=True)",
            f"F.one_hot({owners}, m).to(x).t() @ x",
            f"torch.stack([x[{owners} == i].sum(0) for i in range(m)])",
            f"torch.stack([F.pad(x[{owners} == i], (0, 0, 0, 1)).amax(0) for i in range(m)])",
            f"x.new_zeros(m, {f}).index_put_(({owners},), x, accumulate=True)",
        )
    )
    d.layout, d.regroups = "m f", True
    d.resized()


def written(d: Draft) -> None:
    """A copy that is written into."""
    d.settle()
    name, i = d.name("v"), d.random.randrange(d.width)
    d.emit(f"{name} = " + d.pick("x.clone()", "torch.zeros_like(x)", "x * 1"))
    d.emit(
        d.pick(
            f"{name}[:, :1] = x[:, -1:]",
            f"{name}[..., {i}] += x[..., 0]",
            f"{name}[0] *= 2",
            f"{name}[m - 1].copy_(x[m - 1].sin())",
            f"{name}[:, 0].add_(x[:, -1])",
            f"{name}.index_add_(2, {d.ints(d.width, d.width)}, x)",
            f"{name}.scatter_(1, {d.ints('x.shape[1]', '*x.shape')}, x.sin())",
            f"{name}.masked_fill_({d.mask('*x.shape')}, 1.5)",
            f"{name}[{d.mask('m', 'x.shape[1]')}] = 0.5",
            f"{name}[{d.perm('m')}] = x.cos()",
            f"{name}.narrow(2, {i}, 1).mul_(x.sum(-1, keepdim=True))",
            f"{name}.mul_(x).add_(1)",
            f"{name}.flatten(1).add_(x.flatten(1))",
            f"{name}.transpose(0, 1)[-1] = x[:, 0]",
            f"{name}.select(2, {i}).zero_()",
            f"{name}.addcmul_(x, x, value=0.5)",
            f"{name}.index_put_((torch.arange(m), {d.ints('x.shape[1]', 'm')}), x[:, 0])",
            f"{name}.masked_scatter_({d.mask('*x.shape')}, x)",
            f"{name}.diagonal(0, 1, 2).mul_(2)",
            f"{name}.unsqueeze(0).squeeze_(0).copy_(x).sin_()",
        )
    )
    d.set(d.pick(name, f"x + {name}", f"{name} * 0.5"))


def ordered(d: Draft) -> None:
    d.settle()
    dim = d.pick("1", "2")
    d.set(
        d.pick(
            f"x.sort({dim}).values",
            f"x.sort({dim}, descending=True).values",
            f"x.gather({dim}, x.argsort({dim}))",
            f"x.topk(x.shape[{dim}], {dim}).values",
            f"x - x.amax({dim}, keepdim=True)",
            f"x - x.max({dim}, keepdim=True).values",
            f"x + x.kthvalue(1, {dim}, keepdim=True).values",
            f"x - x.median({dim}, keepdim=True).values",
            f"x.cummax({dim}).values",
            f"x.cummin({dim}).values",
            "torch.msort(x.transpose(0, 1)).transpose(0, 1)",
            f"x * x.aminmax(dim={dim}, keepdim=True)[0]",
            f"x.take_along_dim(x.argmax({dim}, keepdim=True), {dim}) + x",
        )
    )


def scanned(d: Draft) -> None:
    d.settle(d.pick("m T f", "m f T", "T m f", "m 1 T f"))
    dims = [i for i, axis in enumerate(d.axes) if axis in "Tf"]
    dim = d.random.choice(dims)
    d.set(
        d.pick(
            f"x.cumsum({dim})",
            f"x.cumprod({dim})",
            f"x.logcumsumexp({dim})",
            f"x.softmax({dim})",
            f"x.log_softmax({dim})",
            f"F.softmin(x, {dim})",
            f"torch.diff(x, dim={dim}, prepend=x.narrow({dim}, 0, 1) * 2)",
            f"x - x.mean({dim}, keepdim=True)",
            f"x / (1 + x.norm(dim={dim}, keepdim=True))",
            f"x * x.logsumexp({dim}, keepdim=True)",
            f"x + x.prod({dim}, keepdim=True)",
            f"x + x.var({dim}, keepdim=True, correction=0)",
            f"x * x.std({dim}, keepdim=True, correction=0)",
            f"F.glu(torch.cat([x, x.sin()], {dim}), {dim})",
            f"x + x.square().sum({dim}, keepdim=True).sqrt()",
            f"torch.trapezoid(torch.stack([x, x.sin()], {dim}), dim={dim})",
            f"x.unflatten({dim}, (-1, 1)).sum({dim + 1})",
        )
    )


def reduced(d: Draft) -> None:
    """A pose's rows become one."""
    d.settle(d.pick("m T f", "T m f", "m f T", "f m T"))
    rows = d.rows
    d.set(
        d.pick(
            f"x.sum({rows})",
            f"x.mean({rows})",
            f"x.amax({rows})",
            f"x.logsumexp({rows})",
            f"x.prod({rows})",
            f"x.norm(dim={rows})",
            f"x.norm(p=1, dim={rows})",
            f"x.var({rows}, correction=0)",
            f"x.select({rows}, 0)",
            f"x.median({rows}).values",
            f"x.max({rows}).values",
            f"x.nansum({rows})",
            f"torch.linalg.vector_norm(x, 3, dim={rows})",
            f"x.sort({rows}).values.select({rows}, -1)",
        )
    )
    d.layout = " ".join(axis for axis in d.axes if axis != "T")
    d.resized()


SHAPES: tuple[Operator, ...] = (
    laid_out,
    laid_out,
    activated,
    viewed,
    rearranged,
    rows_changed,
    poses_changed,
    dealt,
    written,
    written,
    ordered,
    scanned,
    reduced,
    of_waves,
    of_matrices,
)
