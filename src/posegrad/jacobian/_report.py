"""How a Jacobian is held, as a table."""

from collections.abc import Mapping

from posegrad.jacobian._backwards import Backwards
from posegrad.jacobian._block import Block
from posegrad.jacobian._parts import Factors
from posegrad.jacobian._table import Line, size, table

__all__ = ["kept_bytes", "report"]

HEADER = ("parameter", "uses", "held as", "each", "path")


def report(count: int, blocks: Mapping[str, Block], backwards: Backwards) -> str:
    """The size of J and of its matrix, the backwards, and a line for each group of parameters.

    Args:
        count: M, the number of rows.
        blocks: The blocks by parameter.
        backwards: What reading them took.
    """
    numbers = sum(block.shape.numel() for block in blocks.values())
    whole = sum(block.shape.numel() * block.dtype.itemsize for block in blocks.values())
    first = (
        f"{count} rows of {numbers} numbers, held in {size(kept_bytes(blocks))}; "
        f"as a matrix {size(count * whole)}"
    )
    return "\n".join(
        [first, str(backwards), table(HEADER, [_line(*item) for item in blocks.items()])]
    )


def _line(name: str, block: Block) -> Line:
    if not block.parts:
        return Line(name, ("0", "", "", "unused"))
    kinds = {"factors" if isinstance(part, Factors) else "rows" for part in block.parts}
    path = " + ".join(dict.fromkeys(part.path for part in block.parts))
    uses = "all" if path.startswith("rows of the whole graph") else str(block.uses)
    return Line(name, (uses, ", ".join(sorted(kinds)), size(block.bytes()), path))


def kept_bytes(blocks: Mapping[str, Block]) -> int:
    """The memory kept alive; what several parameters share counts once."""
    storages = {
        (storage.device, storage.data_ptr()): storage.nbytes()
        for block in blocks.values()
        for part in block.parts
        for storage in (tensor.untyped_storage() for tensor in part.held())
    }
    return sum(storages.values())
