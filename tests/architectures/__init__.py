"""The table of architectures: what a Jacobian can be read off, how, and what is refused.

`python -m tests.architectures` writes it to docs/support.md.
"""

from tests.architectures.layers import LAYERS, NORMS, SEQUENCES
from tests.architectures.row import Architecture
from tests.architectures.uses import POSES, SHARED, STATES

__all__ = ["ARCHITECTURES", "SECTIONS", "Architecture"]

SECTIONS = {
    "Layers": LAYERS,
    "Normalisation, and batches whose poses depend on each other": NORMS,
    "Sequences": SEQUENCES,
    "Parameters shared, made or used in other ways": SHARED,
    "Poses, inputs and outputs": POSES,
    "States and machinery": STATES,
}

ARCHITECTURES = {name: row for rows in SECTIONS.values() for name, row in rows.items()}
