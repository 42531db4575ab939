"""What a reader of graphs warns of: slow ways, and why they are taken."""

from collections.abc import Sequence
from itertools import groupby

from torch import Tensor

from posegrad.errors import listed

__all__ = [
    "coupled_message",
    "disagreement_message",
    "modules_of",
    "nan_message",
    "nested_message",
]


def modules_of(names: Sequence[str]) -> str:
    """The modules that hold some parameters, for a message."""
    modules = [module for module, _ in groupby(name.rpartition(".")[0] or name for name in names)]
    return ", ".join(modules[:8]) + (f" and {len(modules) - 8} more" if len(modules) > 8 else "")


def coupled_message(names: Sequence[str]) -> str:
    """Poses depend on each other."""
    return (
        f"The predictions of different poses depend on each other through the activations of: "
        f"{modules_of(names)}. Batch statistics or a mean over the batch do that. Their per-pose "
        f"gradients are exact, but take one backward through the graph for each prediction."
    )


def nan_message(names: Sequence[str], output: Tensor) -> str:
    """Gradients are nan or infinite, so that nobody knows whose they are."""
    places = (~output.detach().isfinite()).nonzero().tolist()
    shown = [place[0] if len(place) == 1 else place for place in places]
    where = f", as the output is at {listed(shown)}" if shown else ""
    return (
        f"Gradients are nan or infinite at the activations of: {modules_of(names)}{where}. Whose "
        f"they are cannot be told then, so this Jacobian takes one backward through the graph for "
        f"each number of the output."
    )


def disagreement_message(names: frozenset[str]) -> str:
    """Rows were not those of autograd."""
    return (
        f"The per-pose gradients read off the graph do not add up to autograd's for: "
        f"{modules_of(sorted(names))}. A hook or a custom backward that is not linear does that. "
        f"They are taken by slower, exact ways from now on."
    )


def nested_message() -> str:
    """The shapes of tensors are no numbers."""
    return (
        "Nested tensors are in the graph of this output, and no pose can be followed through "
        "them. The per-pose gradients are exact, but take one backward through the graph for each "
        "number of the output. Padded tensors with a mask, or ragged ones, take only one."
    )
