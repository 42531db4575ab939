"""Docked poses as tensors: each pose's ligand and the protein atoms around it.

The files in `data/` hold Vina poses of three targets with measured binding free energies, as plain
arrays of heavy atoms. A pose here is one set of atoms, ligand first, then the protein atoms within
a cutoff of *that* ligand pose.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["KT", "TARGETS", "Pose", "by_ligand", "load", "load_all"]

DATA = Path(__file__).parent / "data"
TARGETS = ("cdk2", "tyk2", "thrombin")
KT = 0.593  # kcal/mol at 298 K


@dataclass(frozen=True, eq=False)
class Pose:
    """One docked pose of one ligand.

    Attributes:
        z: Atomic numbers `[a]`, ligand atoms first.
        xyz: Coordinates `[a, 3]` in Å.
        n_ligand: How many of the atoms are the ligand's.
        target: Name of the protein.
        ligand: Name of the ligand, unique within its target.
        dg: Measured binding free energy of the ligand, kcal/mol.
        vina: Vina's score of the pose, kcal/mol.
        rmsd: Distance to the reference pose, Å.
    """

    z: Tensor
    xyz: Tensor
    n_ligand: int
    target: str
    ligand: str
    dg: float
    vina: float
    rmsd: float


def load(target: str, *, cutoff: float = 5.0, data: Path = DATA) -> list[Pose]:
    """Poses of one target, ligand by ligand, best Vina score first.

    Args:
        target: One of `TARGETS`.
        cutoff: Protein atoms within this distance of a ligand atom belong to the pose, Å.
            At most 8, since the files hold no atoms farther out.
        data: Folder of the `.npz` files.

    Returns:
        One `Pose` for each docked pose, coordinates in float32.
    """
    with np.load(data / f"{target}.npz") as archive:
        arrays = {name: archive[name] for name in archive.files}
    pocket_z = torch.from_numpy(arrays["pocket_z"]).long()
    pocket_xyz = torch.from_numpy(arrays["pocket_xyz"])
    poses = []
    for k, ligand in enumerate(arrays["pose_ligand"]):
        atoms = slice(arrays["pose_ptr"][k], arrays["pose_ptr"][k + 1])
        ligand_z = torch.from_numpy(arrays["atom_z"][atoms]).long()
        ligand_xyz = torch.from_numpy(arrays["atom_xyz"][atoms])
        near = (torch.cdist(pocket_xyz, ligand_xyz) <= cutoff).any(dim=1)  # [P]
        pose = Pose(
            z=torch.cat([ligand_z, pocket_z[near]]),  # [a]
            xyz=torch.cat([ligand_xyz, pocket_xyz[near]]),  # [a, 3]
            n_ligand=len(ligand_z),
            target=target,
            ligand=str(arrays["ligand_name"][ligand]),
            dg=float(arrays["dg_exp_kcal_mol"][ligand]),
            vina=float(arrays["pose_vina_kcal_mol"][k]),
            rmsd=float(arrays["pose_rmsd_ref"][k]),
        )
        poses.append(pose)
    return poses


def load_all(*, cutoff: float = 5.0) -> list[Pose]:
    """Poses of all targets, in the order of `TARGETS`."""
    return [pose for target in TARGETS for pose in load(target, cutoff=cutoff)]


def by_ligand(poses: Iterable[Pose]) -> list[list[Pose]]:
    """Group poses by ligand, keeping the order of both."""
    groups: dict[tuple[str, str], list[Pose]] = {}
    for pose in poses:
        groups.setdefault((pose.target, pose.ligand), []).append(pose)
    return list(groups.values())
