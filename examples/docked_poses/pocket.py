"""The residues of a protein around one ligand pose."""

import lzma
from pathlib import Path

import numpy as np
from rdkit import Chem

__all__ = ["Protein"]

# Protonation states by name are a force field's convention; RDKit knows the residue as HIS.
_RENAMED = {"HID": "HIS", "HIE": "HIS", "HIP": "HIS"}


class Protein:
    """Heavy atoms of a protein, ready to be cut around many poses.

    Args:
        path: A PDB file, compressed with xz.
    """

    def __init__(self, path: Path) -> None:
        with lzma.open(path, "rt") as file:
            records = [line for line in file if line.startswith(("ATOM", "HETATM"))]
        heavy = [line for line in records if line[76:78].strip() != "H"]
        self._lines = [
            line[:17] + _RENAMED.get(line[17:20], line[17:20]) + line[20:] for line in heavy
        ]
        self._xyz = np.array([[float(line[i : i + 8]) for i in (30, 38, 46)] for line in heavy])
        # Chain, number and insertion code: what makes a residue one residue.
        _, self._residue = np.unique([line[21:27] for line in heavy], return_inverse=True)
        self._cut: dict[bytes, Chem.Mol] = {}

    def around(self, ligand: Chem.Mol, *, cutoff: float = 5.0) -> Chem.Mol:
        """Whole residues with a heavy atom within `cutoff` Å of a heavy atom of the ligand."""
        heavy = [atom.GetIdx() for atom in ligand.GetAtoms() if atom.GetAtomicNum() > 1]
        xyz = ligand.GetConformer().GetPositions()[heavy]  # [l, 3]
        distance = np.linalg.norm(self._xyz[:, None] - xyz, axis=-1)  # [p, l]
        near = self._residue[distance.min(axis=1) < cutoff]
        keep = np.isin(self._residue, near)  # [p]
        # Poses in the same place touch the same residues: sanitize each set of them once.
        if (key := keep.tobytes()) not in self._cut:
            block = "".join(line for line, kept in zip(self._lines, keep, strict=True) if kept)
            self._cut[key] = Chem.MolFromPDBBlock(block)
        return self._cut[key]
