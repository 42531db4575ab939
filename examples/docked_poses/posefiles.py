"""The files of `data/`: poses as molecules (`.sdf.xz`) and as plain arrays (`.npz`)."""

import lzma
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rdkit import Chem

from examples.docked_poses.docking import Docked

__all__ = ["write"]

_POCKET = 8.0  # Å around any pose: what the arrays keep of the protein


def write(target: str, protein: Path, docked: Sequence[Docked], folder: Path) -> list[Path]:
    """Writes molecules, arrays and the protein of one target.

    Args:
        target: Name the files begin with.
        protein: The PDB file that was docked into.
        docked: One entry for each ligand.
        folder: Where to; made if missing.

    Returns:
        The paths written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    molecules, arrays = folder / f"{target}.sdf.xz", folder / f"{target}.npz"
    compressed = folder / f"{target}_protein.pdb.xz"
    with lzma.open(molecules, "wt") as file, Chem.SDWriter(file) as writer:
        for one in docked:
            _write_poses(writer, one)
    np.savez_compressed(arrays, **_arrays(protein, docked))
    compressed.write_bytes(lzma.compress(protein.read_bytes(), preset=9))
    return [molecules, arrays, compressed]


def _write_poses(writer: Chem.SDWriter, docked: Docked) -> None:
    molecule = Chem.Mol(docked.poses)
    molecule.ClearProp("meeko")
    molecule.SetProp("_Name", docked.ligand.name)
    molecule.SetProp("dG_exp", f"{docked.ligand.dg:.4f}")
    for k, conformer in enumerate(molecule.GetConformers()):
        molecule.SetProp("vina", f"{docked.vina[k]:.3f}")
        molecule.SetProp("rmsd_ref", f"{docked.rmsd[k]:.3f}")
        molecule.SetProp("pose", str(k))
        writer.write(molecule, confId=conformer.GetId())


def _arrays(protein: Path, docked: Sequence[Docked]) -> dict[str, Any]:
    heavy = [Chem.RemoveHs(one.poses) for one in docked]
    z = [np.array([atom.GetAtomicNum() for atom in molecule.GetAtoms()]) for molecule in heavy]
    counts = [molecule.GetNumConformers() for molecule in heavy]  # poses of each ligand
    xyz = [c.GetPositions() for molecule in heavy for c in molecule.GetConformers()]  # [a, 3] each
    every_xyz = np.concatenate(xyz).astype(np.float32)  # [A, 3]
    pocket_z, pocket_xyz = _pocket(protein, every_xyz)
    return {
        "ligand_name": np.array([one.ligand.name for one in docked]),
        "dg_exp_kcal_mol": np.array([one.ligand.dg for one in docked], dtype=np.float32),
        "pose_ligand": np.repeat(np.arange(len(docked), dtype=np.int32), counts),
        "pose_ptr": np.cumsum([0, *map(len, xyz)], dtype=np.int32),
        "atom_z": np.concatenate([np.tile(a, n) for a, n in zip(z, counts, strict=True)]).astype(
            np.uint8
        ),
        "atom_xyz": every_xyz,
        "pose_vina_kcal_mol": np.concatenate([one.vina for one in docked]).astype(np.float32),
        "pose_rmsd_ref": np.concatenate([one.rmsd for one in docked]).astype(np.float32),
        "pocket_z": pocket_z,
        "pocket_xyz": pocket_xyz,
    }


def _pocket(protein: Path, ligands: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Heavy protein atoms near any of the ligand atoms `[A, 3]`: numbers `[P]`, places `[P, 3]`."""
    molecule = Chem.MolFromPDBFile(
        str(protein), sanitize=False, removeHs=False, proximityBonding=False
    )
    z = np.array([atom.GetAtomicNum() for atom in molecule.GetAtoms()], dtype=np.uint8)
    xyz = molecule.GetConformer().GetPositions().astype(np.float32)  # [p, 3]
    near = [
        z[i] > 1 and np.linalg.norm(ligands - xyz[i], axis=1).min() <= _POCKET
        for i in range(len(z))
    ]
    return z[near], xyz[near]
