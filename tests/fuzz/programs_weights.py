"""Weights of a program: parameters as they are, tied, or computed from others."""

from collections.abc import Callable

from tests.fuzz.programs_draft import Draft

__all__ = ["scalar", "vector", "weight"]

Computed = Callable[[Draft, int, int], str]


def _transposed(d: Draft, r: int, c: int) -> str:
    return f"{d.parameter(c, r)}.{d.pick('t()', 'mT', 'transpose(0, 1)')}"


def _tied(d: Draft, r: int, c: int) -> str:
    turned = d.tied(c, r)
    return d.tied(r, c) or (f"{turned}.t()" if turned else d.parameter(r, c))


def _masked(d: Draft, r: int, c: int) -> str:
    w = d.parameter(r, c)
    return d.pick(
        f"({w} * {d.mask(r, c)})",
        f"{w}.triu()",
        f"{w}.masked_fill({d.mask(r, c)}, 0.5)",
        f"torch.where({d.mask(r, c)}, {w}, {d.parameter(r, c)})",
        f"torch.where({d.mask(r, c)}, {w}, {w}.tanh())",
    )


def _pointwise(d: Draft, r: int, c: int) -> str:
    w = d.parameter(r, c)
    return d.pick(
        f"{w}.tanh()", f"{w}.softmax({d.pick('0', '1')})", f"(2 * {w})", f"{w}.sin().mul(0.5)"
    )


def _low_rank(d: Draft, r: int, c: int) -> str:
    a, b = d.parameter(r, 2), d.parameter(2, c)
    return d.pick(f"({a} @ {b})", f"torch.einsum('ik,kj->ij', {a}, {b})", f"torch.mm({a}, {b})")


def _normed(d: Draft, r: int, c: int) -> str:
    w, g = d.parameter(r, c), d.parameter(r, 1, centre=1.0, spread=0.2)
    return d.pick(
        f"torch._weight_norm({w}, {g}, 0)",
        f"({g} * {w} / {w}.norm(dim=1, keepdim=True))",
        f"({w} / {w}.norm())",
        f"F.normalize({w}, dim=0)",
    )


def _arranged(d: Draft, r: int, c: int) -> str:
    w = d.parameter(r, c)
    return d.pick(
        f"{w}.flip({d.pick('0', '1')})",
        f"{w}.roll(1, {d.pick('0', '1')})",
        f"{w}[{d.perm(r)}]",
        f"{w}.index_select(1, {d.perm(c)})",
        f"{w}.view(-1)[{d.perm(r * c)}].view({r}, {c})",
        f"{w}.gather(0, {d.ints(r, r, c)})",
        f"torch.stack({w}.unbind(0)[::-1])",
        f"{w}.as_strided(({r}, {c}), ({c}, 1))" if not d.cast else w,
    )


def _sliced(d: Draft, r: int, c: int) -> str:
    return d.pick(
        f"{d.parameter(r + 1, c)}[1:]",
        f"{d.parameter(r, 2 * c)}[:, ::2]",
        f"{d.parameter(2, r, c)}[1]",
        f"{d.parameter(2, r, c)}.unbind(0)[0]",
        f"{d.parameter(2 * r, c)}.chunk(2)[1]",
        f"{d.parameter(r * c)}.view({r}, {c})",
        f"{d.parameter(3, r, c)}.sum(0)",
        f"{d.parameter(r, c, 2)}.select(-1, 1)",
    )


def _joined(d: Draft, r: int, c: int) -> str:
    if r == 1:
        return d.parameter(r, c)
    a = d.parameter(1, c)
    return d.pick(
        f"torch.cat([{a}, {d.parameter(r - 1, c)}])",
        f"torch.cat([{a}] * {r})",
        f"F.pad({d.parameter(r - 1, c)}, (0, 0, 1, 0))",
    )


def _spread(d: Draft, r: int, c: int) -> str:
    return d.pick(
        f"{d.parameter(r, 1)}.expand({r}, {c})",
        f"{d.parameter(c)}.expand({r}, {c})",
        f"{d.parameter(1, c)}.repeat({r}, 1)",
        f"{d.parameter(1, 1)}.expand({r}, {c})",
        f"{d.parameter()}.expand({r}, {c})",
        f"{d.parameter(r, 1)}.repeat_interleave({c}, 1)",
        f"torch.outer({d.parameter(r)}, {d.parameter(c)})",
    )


def _generated(d: Draft, r: int, c: int) -> str:
    return d.pick(
        f"({d.noise(3)} @ {d.parameter(3, r * c)}).view({r}, {c})",
        f"({d.parameter(2)}.tanh() @ {d.parameter(2, r * c)}).view({r}, {c})",
        f"F.linear({d.parameter(r, 2)}.tanh(), {d.parameter(c, 2)}, {d.parameter(c)})",
    )


def _written(d: Draft, r: int, c: int) -> str:
    name, w = d.name("v"), d.parameter(r, c)
    zeros = f"x.new_zeros({r}, {c})"
    d.emit(
        d.pick(
            f"{name} = {zeros}.index_put(({d.perm(r)},), {w})",
            f"{name} = {zeros}.index_add(0, {d.ints(r, r)}, {w})",
            f"{name} = {zeros}.scatter_add(0, {d.ints(r, r, c)}, {w})",
            f"{name} = {zeros}.copy_({w})",
            f"{name} = {w}.clone(); {name}[0] *= 2",
            f"{name} = {w}.clone(); {name}[:, -1:] = {d.parameter(r, 1)}",
            f"{name} = {w} * 1; {name}.mul_({d.parameter(c)})",
        )
    )
    return name


def _of_matrices(d: Draft, r: int, c: int) -> str:
    w, n = d.parameter(c, c, spread=0.2), d.parameter(r, c)
    eye = f"torch.eye({c}).to(x)"
    return d.pick(
        f"({n} @ torch.linalg.inv({eye} + {w}))",
        f"torch.linalg.solve({eye} + {w}, {n}.t()).t()",
        f"({n} @ torch.linalg.matrix_exp({w}))",
        f"({n} @ torch.linalg.cholesky({eye} + {w} @ {w}.t()))",
        f"({n} @ torch.linalg.qr({eye} + {w})[0])",
        f"({n} @ {w} @ {w})",
        f"({n} * torch.linalg.det({eye} + {w}))",
        f"({n} / (1 + torch.linalg.svdvals({eye} + {w})[0]))",
    )


def _of_waves(d: Draft, r: int, c: int) -> str:
    w = d.parameter(r, c)
    return d.pick(
        f"torch.fft.fft({w}).real",
        f"torch.fft.irfft(torch.fft.rfft({w}).conj(), n={c})",
        f"torch.view_as_real(torch.fft.fft({w}, dim=0))[..., 1]",
    )


def _by_function(d: Draft, r: int, c: int) -> str:
    w = d.parameter(r, c)
    return d.pick(
        f"Doubled.apply({w})",
        f"checkpoint(torch.tanh, {w}, use_reentrant=False)",
        f"checkpoint(lambda w: Doubled.apply(w.sin()), {w}, use_reentrant=False)",
    )


def _cast(d: Draft, r: int, c: int) -> str:
    d.single = True
    return f"{d.parameter(r, c)}.float().to(x)"


COMPUTED: tuple[Computed, ...] = (
    _transposed,
    _tied,
    _tied,
    _masked,
    _pointwise,
    _low_rank,
    _normed,
    _arranged,
    _sliced,
    _joined,
    _spread,
    _generated,
    _written,
    _of_matrices,
    _of_waves,
    _by_function,
    _cast,
)


def weight(d: Draft, rows: int, columns: int) -> str:
    """An expression of shape `[rows, columns]`."""
    if d.chance(0.5):
        return d.parameter(rows, columns)
    return d.random.choice(COMPUTED)(d, rows, columns)


def vector(d: Draft, width: int, centre: float = 0.0) -> str:
    """An expression of shape `[width]`."""
    plain = d.parameter(width, centre=centre)
    if d.chance(0.6):
        return plain
    return d.pick(
        d.tied(width) or plain,
        f"{d.parameter(1, centre=centre)}.expand({width})",
        f"{d.parameter(centre=centre)}.expand({width})",
        f"{d.parameter(width, 2)}.prod(1)",
        f"{plain}.cumsum(0)",
        f"{plain}.softmax(0)",
        f"({plain} * {d.parameter()})",
        f"{d.parameter(width + 1, centre=centre)}[1:]",
        f"{plain}.flip(0)",
        f"({plain} + {d.parameter(width)})",
        f"{plain}.sort().values",
        f"{d.parameter(2, width)}.amax(0)",
        f"({d.parameter(width, width)} @ {plain})",
        f"{d.parameter(width, width)}.diagonal()",
    )


def scalar(d: Draft, centre: float = 1.0) -> str:
    """An expression of no or one dimension of one number."""
    plain = d.parameter(centre=centre, spread=0.3)
    return d.pick(
        plain, plain, d.parameter(1, centre=centre), f"{d.parameter(3)}.sum()", f"{plain}.exp()"
    )
