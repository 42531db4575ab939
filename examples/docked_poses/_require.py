"""A missing package named together with the line that installs it."""

from importlib.util import find_spec

__all__ = ["DEMO", "DOCK", "require"]

DEMO = """\
pip install -r examples/docked_poses/requirements.txt
pip install --no-deps "pignet2>=0.0.1"  # the pymol and hydra it asks for are not needed"""
DOCK = """\
pip install "vina>=1.2.5" "meeko>=0.6" "gemmi>=0.6" "scipy>=1.13" "rdkit>=2024.3" "tqdm>=4.66"
pip install --no-deps "openmmforcefields>=0.14"   # proteins and ligands, MIT"""


def require(*packages: str, install: str) -> None:
    """Raises if a package is not installed.

    Args:
        *packages: Names as imported.
        install: The lines that install all of them.

    Raises:
        ModuleNotFoundError: naming every missing package, with `install`.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ModuleNotFoundError(
            f"This example needs {', '.join(missing)}, not installed here. Install with:\n{install}"
        )
