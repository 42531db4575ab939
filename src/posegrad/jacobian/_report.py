"""How a Jacobian is held, as a table."""

from collections.abc import Mapping

from posegrad.jacobian._block import Block

__all__ = ["report"]


def report(blocks: Mapping[str, Block]) -> str:
    """A line for each parameter: the paths its rows came by, its uses, and the size held."""
    rows = [("parameter", "path", "uses", "MiB")]
    for name, block in blocks.items():
        path = " + ".join(dict.fromkeys(part.path for part in block.parts)) or "unused"
        rows.append((name, path, str(len(block.parts)), f"{block.bytes() / 2**20:.2f}"))
    first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
    return "\n".join(
        f"{name:<{first}}  {path:<{second}}  {uses:>4}  {size}" for name, path, uses, size in rows
    )
