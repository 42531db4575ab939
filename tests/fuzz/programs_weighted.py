"""Operators in which weights meet x."""

from collections.abc import Callable

from tests.fuzz.programs_draft import Draft
from tests.fuzz.programs_products import linear
from tests.fuzz.programs_weights import scalar, vector, weight

__all__ = ["WEIGHTED", "convolved", "expanded", "hooked", "looped", "scaled"]

Operator = Callable[[Draft], None]


def bilinear(d: Draft) -> None:
    d.settle()
    new = d.random.randint(1, 3)
    w = d.parameter(new, d.width, d.width)
    d.set(
        d.pick(
            f"F.bilinear(x, x.sin(), {w}, {vector(d, new)})",
            f"torch.einsum('mti,oij,mtj->mto', x, {w}, x)",
            f"torch.stack([(x @ v * x).sum(-1) for v in {w}], -1)",
        )
    )
    d.width = new


def scaled(d: Draft) -> None:
    w = d.random.choice([d.along(vector(d, d.width, 1.0)), scalar(d)])
    b = d.random.choice([d.along(vector(d, d.width)), scalar(d, 0.0)])
    d.set(
        d.pick(
            f"x * {w}",
            f"{w} * x + {b}",
            f"x / (2 + {w}.tanh())",
            f"({w} - x) * 0.5",
            f"x + {b}",
            f"torch.addcmul({b}, x, {w})",
            f"torch.addcdiv(x, x, 2 + ({w}).square(), value=0.5)",
            f"torch.lerp(x, ({b}).expand_as(x), 0.3)",
            f"torch.lerp(x.sin(), x, {w})",
            f"(x.square() + 1) ** ({w})",
            f"torch.maximum(x, ({b}))",
            f"torch.hypot(x, 1 + ({w}).square())",
            f"torch.atan2(x, 2 + ({w}).square())",
            f"torch.logaddexp(x, {b})",
            f"torch.where(x > 0, x * {w}, {b})",
            f"torch.where(x > 0, {w}, x)",
            f"torch.sub(x, {b}, alpha=2)",
            f"x.clamp(min=-1).mul({w})",
            f"torch.exp(-x.square() * ({w}).square())",
            f"x * {w} * {w}",
            f"x * {w} + x.sin() * {w}",
            f"Times.apply(x, {w})",
            f"TwoOutputs.apply(x, {w})[{d.pick('0', '1')}]",
            f"sum(TwoOutputs.apply(x, {w}))",
            f"F.prelu(x, {d.parameter(1)})",
            f"torch.rsub(x, {b})",
        )
    )


def expanded(d: Draft) -> None:
    """A weight expanded to all of x, or a part of it; trivially where a size is one."""
    w = d.along(vector(d, d.width, 1.0))
    inner = ", ".join(f"x.shape[{i}]" for i in range(d.ndim))
    name = d.name("e")
    d.emit(
        f"{name} = "
        + d.pick(
            f"({w}).expand_as(x)",
            f"({w}).expand({inner})",
            f"({w}).broadcast_to(x.shape)",
            f"torch.broadcast_tensors(x, {w})[1]",
            f"({w}) * torch.ones_like(x)",
            f"({w}) + torch.zeros_like(x)",
            f"({w}).expand_as(x).contiguous()",
            f"({w}).expand_as(x[:1]).expand_as(x)",
            f"torch.stack([({w}).expand_as(x[0])] * x.shape[0])",
            f"torch.cat([({w}).expand_as(x[:1])] * x.shape[0])",
        )
    )
    d.set(
        d.pick(f"x * {name}", f"x + {name}", f"x * {name} + {name}", f"torch.addcmul(x, {name}, x)")
    )


def channelled(d: Draft) -> None:
    """Widths of one that a weight or data broadcasts."""
    d.settle()
    new = d.random.randint(1, 3)
    if d.chance(0.5):
        d.set(f"x.mean(-1, keepdim=True) * {vector(d, new, 1.0)}")
    else:
        w = d.parameter(new, 1)
        d.set(
            f"(x.sum(-1)[..., None, None] * {w}).{d.pick('squeeze(-1)', 'sum(-1)', 'flatten(2)')}"
        )
    d.width = new


def token(d: Draft) -> None:
    """A row of parameters in front of each pose's rows."""
    d.settle()
    w = d.random.choice([d.parameter(1, 1, d.width), f"({vector(d, d.width)})[None, None]"])
    many = d.pick(f"{w}.expand(m, -1, -1)", f"{w}.repeat(m, 1, 1)", f"{w}.expand(m, 2, {d.width})")
    d.set(f"torch.cat([{many}, x], dim=1)")
    d.resized()


def positions(d: Draft) -> None:
    d.settle()
    w = d.parameter(4, d.width)
    rows = "x.shape[1]"
    d.set(
        d.pick(
            f"x + F.embedding(torch.arange({rows}) % 4, {w})",
            f"x + {w}[torch.arange({rows}) % 4]",
            f"x + {w}[:{rows}].sum(0)",
            f"x + {w}.repeat(9, 1)[:{rows}]",
            f"x * {d.parameter(1, 1, d.width)}.expand(-1, {rows}, -1)",
            f"x + {d.parameter(7)}[torch.arange({rows})[:, None] % 4 + torch.arange({d.width})]",
        )
    )


def looked_up(d: Draft) -> None:
    """Rows of a table, by numbers of the data."""
    d.settle()
    w, i = d.parameter(5, d.width), d.ints(5, "m", "x.shape[1]")
    d.set(
        "x + "
        + d.pick(
            f"F.embedding({i}, {w})",
            f"F.embedding({i}, {w}, padding_idx=0)",
            f"{w}[{i}]",
            f"{w}.index_select(0, {i}.flatten()).view_as(x)",
            f"F.one_hot({i}, 5).to(x) @ {w}",
            f"F.embedding_bag({i}, {w}, mode='{d.pick('sum', 'mean')}')[:, None]",
            f"F.embedding({d.ints(5, 'm')}, {w})[:, None]",
            f"{w}.expand(m, -1, -1).gather(1, {i}[..., None].expand_as(x))",
            f"torch.take_along_dim({w}[None], {i}[..., None], 1)",
            f"{w}.t()[:, {i}].permute(1, 2, 0)",
        )
    )


def convolved(d: Draft) -> None:
    d.settle()
    groups = d.width if d.chance(0.3) else 1
    new = groups if groups > 1 else d.random.randint(1, 4)
    w, b = d.parameter(new, d.width // groups, 2), vector(d, new)
    t = d.parameter(d.width, new, 2)
    how = d.pick("padding=1", "padding=1, dilation=2", "padding=2, stride=2")
    choices = [
        f"F.conv1d(x.mT, {w}, {b}, {how}, groups={groups}).mT",
        f"F.conv1d(F.pad(x.mT, (1, 1), 'replicate'), {w}, groups={groups}).mT",
        f"F.conv2d(x.mT[:, :, None], {w}[:, :, None], {b}, 1, (0, 1), 1, {groups})[:, :, 0].mT",
        f"F.conv1d(x.flatten(0, 1)[..., None], {w}[..., :1], groups={groups}).view(m, -1, {new})",
    ]
    if groups == 1:
        choices += [
            f"F.conv_transpose1d(x.mT, {t}, {b}).mT",
            f"F.conv1d(F.pad(x, (0, 0, 1, 0)).mT, {w}).mT",
            f"F.pad(x, (0, 0, 1, 1)).unfold(1, 2, 1).flatten(2) @ {d.parameter(2 * d.width, new)}",
        ]
    d.set(d.random.choice(choices))
    d.width = new
    d.resized()


def recurrent(d: Draft) -> None:
    d.settle()
    new = d.random.randint(1, 3)
    kind = d.pick("GRU", "LSTM", "RNN")
    if d.chance(0.3):
        cell, name = d.module(f"nn.GRUCell({d.width}, {new})"), d.name("h")
        d.emit(f"{name} = x.new_zeros(m, {new})")
        with d.block("for row in x.unbind(1):"):
            d.emit(f"{name} = {cell}(row, {name})")
        d.set(f"{name}[:, None]")
        d.resized()
    else:
        d.set(f"{d.module(f'nn.{kind}({d.width}, {new}, batch_first=True)')}(x)[0]")
    d.width = new


def normalised(d: Draft) -> None:
    w, b, f = d.parameter(d.width, centre=1.0), d.parameter(d.width), d.width
    if d.chance(0.5):
        d.settle()
        d.set(
            d.pick(
                f"F.group_norm(x.mT, 1, {w}, {b}, eps=0.1).mT",
                f"F.group_norm(x.mT, {f}, {w}, {b}, eps=0.1).mT",
                f"F.batch_norm(x.mT, {d.noise(f)}, 1 + {d.noise(f)} ** 2, {w}, {b}).mT",
                f"F.normalize(x, dim={d.pick('1', '2')}, eps=0.1) * {w}",
                f"{d.module(f'nn.GroupNorm(1, {f}, eps=0.1)')}(x.mT).mT",
            )
        )
    else:
        d.settle(d.pick("m T f", "T m f", "mT f", "m 1 T f"))
        d.set(
            d.pick(
                f"F.layer_norm(x, ({f},), {w}, {b}, eps=0.1)",
                f"F.layer_norm(x, ({f},), {w}, None, eps=0.1)",
                f"F.rms_norm(x, ({f},), {w}, eps=0.1)",
                f"{d.module(f'nn.LayerNorm({f}, eps=0.1)')}(x)",
                f"(x - x.mean(-1, True)) * {w} / (0.1 + x.var(-1, keepdim=True, correction=0))",
            )
        )


def attention(d: Draft) -> None:
    d.settle()
    f = d.width
    q, k, v = (weight(d, f, f) for _ in range(3))
    near = f"{d.parameter(3)}[torch.arange(x.shape[1])[:, None] % 3]"
    d.set(
        d.pick(
            f"F.scaled_dot_product_attention(x @ {q}, x @ {k}, x @ {v})",
            f"F.scaled_dot_product_attention(x @ {q}, x, x, is_causal=True)",
            f"((x @ {q}) @ x.mT).softmax(-1) @ x",
            f"torch.einsum('mst,mtd->msd', torch.bmm(x @ {q}, (x @ {k}).mT).softmax(-1), x)",
            f"{d.module(f'nn.MultiheadAttention({f}, 1, batch_first=True)')}(x, x, x)[0]",
            f"((x @ {q}) @ x.mT + {near}).softmax(-1) @ x",
        )
    )


def routed(d: Draft) -> None:
    """Experts: where x is positive one weight, elsewhere another."""
    d.settle(d.pick("m T f", "mT f", "T m f"))
    a, b, name = weight(d, d.width, d.width), weight(d, d.width, d.width), d.name("on")
    d.emit(f"{name} = x.detach().sum(-1) > 0")
    d.set(
        d.pick(
            f"torch.where({name}[..., None], x @ {a}, x @ {b})",
            f"x.index_put(({name},), x[{name}] @ {a})",
            f"torch.zeros_like(x).index_put(({name},), x[{name}] @ {a}) + x",
            f"x.masked_scatter({name}[..., None].expand_as(x), x[{name}] @ {a})",
            f"(torch.stack([{a}, {b}])[{name}.long()] @ x[..., None])[..., 0]",
            f"x * ({d.parameter(2, d.width)}[{name}.long()])",
        )
    )


def looped(d: Draft) -> None:
    """Poses, or rows, one after another in Python."""
    d.settle(d.pick("m T f", "T m f", "mT f"))
    new = d.random.randint(1, 4)
    w, b = weight(d, d.width, new), vector(d, new)
    d.set(
        d.pick(
            f"torch.stack([one @ {w} + {b} for one in x])",
            f"torch.stack([F.linear(x[i], {w}.t()) for i in range(len(x))])",
            f"torch.cat([one @ {w} for one in x.split(1)])",
            f"torch.cat([(one @ {w}).tanh() * i for i, one in enumerate(x.tensor_split(2), 1)])",
        )
    )
    d.width = new


def distances(d: Draft) -> None:
    d.settle()
    new, f = d.random.randint(1, 3), d.width
    w = d.parameter(new, f)
    d.set(
        d.pick(
            f"torch.cdist(x, {w})",
            f"torch.cdist(x, {w}, p=1.0)",
            f"torch.cdist(x, {w}.expand(m, -1, -1))",
            f"torch.cdist(x.flatten(0, 1), {w}).view(m, -1, {new})",
            f"(x[:, :, None] - {w}).norm(dim=-1)",
            f"torch.cdist({w}, x).mT",
            f"F.cosine_similarity(x[:, :, None], {w}, dim=-1)",
        )
    )
    d.width = new


def hooked(d: Draft) -> None:
    d.set(f"{d.pick('Doubled', 'Turned', 'Saving')}.apply(x)")


WEIGHTED: tuple[Operator, ...] = (
    linear,
    linear,
    linear,
    bilinear,
    scaled,
    scaled,
    expanded,
    expanded,
    channelled,
    token,
    positions,
    looked_up,
    convolved,
    recurrent,
    normalised,
    attention,
    routed,
    looped,
    distances,
    hooked,
)
