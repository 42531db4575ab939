"""The operators a program is made of: each writes lines that take x and leave x.

Names in the text beside torch, F and x: p, the parameters; m, the number of poses; noise, ints,
mask and perm, random constants of the step; the functions of `programs_names`.
"""

from collections.abc import Callable

from tests.fuzz.programs_draft import Draft, Kept
from tests.fuzz.programs_products import linear
from tests.fuzz.programs_shapes import SHAPES, activated, viewed
from tests.fuzz.programs_weighted import (
    WEIGHTED,
    convolved,
    expanded,
    hooked,
    looped,
    scaled,
)
from tests.fuzz.programs_weights import weight

__all__ = ["BY_ROWS", "COUPLING", "OPERATORS", "draw", "ragged"]

Operator = Callable[[Draft], None]


# -- around other operators ----------------------------------------------------------------------


def branches(d: Draft) -> None:
    a, b = weight(d, d.width, 1), weight(d, d.width, 2)
    d.settle(d.pick("m T f", "mT f", "T m f"))
    d.set(f"torch.cat([x @ {a}, x.sin() @ {b}], dim=-1)")
    d.width = 3


def residual(d: Draft) -> None:
    """Adds, or appends, an earlier value."""
    found = [k for k in d.kept if k.layout == d.layout and k.sizes == d.sizes]
    same = [k for k in found if k.width == d.width]
    if same:
        d.set(d.pick("x + {}", "x * {}.sin()", "torch.lerp(x, {}, 0.5)").format(same[0].name))
    elif found:
        d.set(f"torch.cat([x, {found[0].name}], dim={d.feature})")
        d.width += found[0].width
        linear(d)
    else:
        linear(d)


def checkpointed(d: Draft) -> None:
    name = d.name("f")
    with d.block(f"def {name}(x, m):"):
        for _ in range(d.random.randint(1, 2)):
            draw(d, WEIGHTED + SHAPES)
        d.emit("return x, m")
    d.emit(f"x, m = checkpoint({name}, x, m, use_reentrant=False)")


def saved(d: Draft) -> None:
    opening = d.pick(
        "with torch.autograd.graph.save_on_cpu():",
        "with torch.autograd.graph.saved_tensors_hooks(lambda t: [t.clone()], lambda t: t[0]):",
        "with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):",
    )
    with d.block(opening):
        for _ in range(d.random.randint(1, 2)):
            draw(d, WEIGHTED + SHAPES)


def island(d: Draft) -> None:
    """A part in float32."""
    if d.cast:
        return
    d.single, d.cast = True, ".float()"
    d.set("x.float()")
    for _ in range(d.random.randint(1, 2)):
        draw(d, (linear, linear, scaled, expanded, convolved, looped))
    d.cast = ""
    d.set("x.double()")


def ragged(d: Draft) -> None:
    """Rows that belong to poses by their numbers from the start: atoms of molecules."""
    owners = d.name("o")
    d.emit("x = x.flatten(0, 1)", f"{owners} = {d.ints('m', 'len(x)')}", f"state({owners})")
    d.layout = "N f"
    for _ in range(d.random.randint(1, 3)):
        draw(d, BY_ROWS)
    d.set(
        d.pick(
            f"x.new_zeros(m, {d.width}).index_add(0, {owners}, x)",
            f"x.new_zeros(m, {d.width}).scatter_add(0, {owners}[:, None].expand_as(x), x)",
            f"x.new_zeros(m, {d.width}).index_put(({owners},), x, accumulate=True)",
        )
    )
    d.layout = "m f"
    d.resized()


BY_ROWS: tuple[Operator, ...] = (linear, linear, scaled, expanded, hooked, activated, viewed)

AROUND: tuple[Operator, ...] = (branches, residual, residual, checkpointed, saved, island)


# -- poses depend on each other ------------------------------------------------------------------


def coupled(d: Draft) -> None:
    d.settle()
    f = d.width
    projected = f"(x @ {d.parameter(f, f)}).transpose(0, 1)"
    d.set(
        d.pick(
            "x - x.mean(0)",
            "x.softmax(0)",
            "x.cumsum(0)",
            "x.sort(0).values",
            "x + x.roll(1, 0)",
            "x * x.amax(0)",
            f"F.scaled_dot_product_attention(*[{projected}] * 3).transpose(0, 1)",
            f"(x - x.mean((0, 1))) * {d.parameter(f)} / (0.1 + x.var((0, 1), correction=0))",
            f"{d.module(f'nn.BatchNorm1d({f}, eps=0.1)')}(torch.cat([x, x + 1], 1).mT).mT",
        )
    )
    d.mixes = True
    d.resized()


COUPLING: tuple[Operator, ...] = (coupled,)

OPERATORS: tuple[Operator, ...] = WEIGHTED + SHAPES + AROUND


def draw(d: Draft, operators: tuple[Operator, ...]) -> None:
    """Writes one operator; its result may stay for a residual, and may be tamed."""
    d.random.choice(operators)(d)
    if d.chance(0.35):
        d.set(d.pick("torch.tanh(x)", "torch.sin(x)", "F.silu(x)", "torch.tanh(x)", "F.gelu(x)"))
    if d.chance(0.3):
        name = d.name("h")
        d.emit(f"{name} = x")
        d.kept.append(Kept(name, d.layout, d.width, d.sizes))
