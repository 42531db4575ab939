"""Products of x with a weight, in every way of writing them."""

from tests.fuzz.programs_draft import Draft
from tests.fuzz.programs_weights import vector, weight

__all__ = ["linear"]

LETTERS = "abcd"


def linear(d: Draft) -> None:
    new = d.random.randint(1, 4)
    w = weight(d, d.width, new)
    if d.is_last:
        d.set(_product(d, w, new))
    else:
        letters = LETTERS[: d.ndim]
        old = letters[d.feature]
        d.set(
            d.pick(
                f"torch.einsum('{letters},{old}z->{letters.replace(old, 'z')}', x, {w})",
                f"(x.movedim({d.feature}, -1) @ {w}).movedim(-1, {d.feature})",
                f"torch.tensordot(x, {w}, dims=([{d.feature}], [0])).movedim(-1, {d.feature})",
            )
        )
    d.width = new


def _product(d: Draft, w: str, new: int) -> str:
    letters, b = LETTERS[: d.ndim], vector(d, new)
    choices = [
        f"F.linear(x, {w}.t(), {b})",
        f"F.linear(x, {w}.t())",
        f"x @ {w}",
        f"x @ {w} + {b}",
        f"torch.einsum('{letters},{letters[-1]}z->{letters[:-1]}z', x, {w})",
        f"torch.tensordot(x, {w}, 1)",
        f"torch.inner(x, {w}.t())",
        f"(x[..., None] * {w}).sum(-2)",
        f"(x[..., None, :] @ {w})[..., 0, :]",
        f"torch.stack([x @ v for v in {w}.unbind(1)], -1)",
        f"({w}.t() @ x[..., None]).squeeze(-1)",
        f"({w}.t() @ x.mT).mT",
        f"({w}.mT.conj() @ x.mT).mT",
        f"Product.apply(x, {w})",
    ]
    if not d.cast:
        choices.append(f"{d.module(f'nn.Linear({d.width}, {new})')}(x)")
    if d.ndim == 2:
        choices += [f"torch.addmm({b}, x, {w})", f"torch.addmm({b}, x, {w}, beta=0.5, alpha=2)"]
    if d.ndim == 3:
        choices += [
            f"torch.bmm(x, {w}.expand(x.shape[0], -1, -1))",
            f"torch.baddbmm({b}, x, {w}.expand(x.shape[0], -1, -1))",
            f"torch.matmul(x, {w}.repeat(x.shape[0], 1, 1))",
        ]
    return d.random.choice(choices)
