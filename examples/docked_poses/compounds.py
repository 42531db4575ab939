"""The docked compounds: for each its measured affinity and a graph of every pose."""

import lzma
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from rdkit import Chem
from torch import Tensor
from torch_geometric.data import Data
from tqdm import tqdm

from examples.docked_poses.pignet import graph
from examples.docked_poses.pocket import Protein

__all__ = ["NATIVE", "Compound", "graphs", "load"]

DATA = Path(__file__).parent / "data"
NATIVE = 2.0  # Å from the reference pose: the usual bound for "found"


@dataclass(frozen=True, eq=False)
class Compound:
    """One ligand and its docked poses, best Vina score first.

    Attributes:
        name: Name in the published set.
        dg: Measured binding free energy, kcal/mol.
        poses: One graph for each pose.
        rmsd: Distance of each pose to the reference pose `[m]`, Å.
    """

    name: str
    dg: float
    poses: list[Data]
    rmsd: Tensor

    def top(self, n: int | None) -> Self:
        """The same compound with its n best poses by Vina's score; all of them for None."""
        return replace(self, poses=self.poses[:n], rmsd=self.rmsd[:n])


def load(target: str = "tyk2", *, data: Path = DATA) -> list[Compound]:
    """All compounds of a target, in file order.

    Args:
        target: A name with `<target>.sdf.xz` and `<target>_protein.pdb.xz` in `data`.
        data: Folder of the two files.
    """
    groups: dict[str, list[tuple[Chem.Mol, Data]]] = {}
    found = tqdm(graphs(target, data=data), desc="Building graphs", unit="pose", leave=False)
    for molecule, pose in found:
        groups.setdefault(molecule.GetProp("_Name"), []).append((molecule, pose))
    return [_compound(name, group) for name, group in groups.items()]


def graphs(target: str, *, data: Path = DATA) -> Iterator[tuple[Chem.Mol, Data]]:
    """Each docked pose of a target as a molecule and as a graph, in file order; see `load`."""
    protein = Protein(data / f"{target}_protein.pdb.xz")
    with lzma.open(data / f"{target}.sdf.xz") as file:
        for molecule in Chem.ForwardSDMolSupplier(file, removeHs=False):
            yield molecule, graph(molecule, protein.around(molecule))


def _compound(name: str, group: list[tuple[Chem.Mol, Data]]) -> Compound:
    group = sorted(group, key=lambda pair: pair[0].GetDoubleProp("vina"))
    first, _ = group[0]
    return Compound(
        name=name,
        dg=first.GetDoubleProp("dG_exp"),
        poses=[pose for _, pose in group],
        rmsd=torch.tensor([molecule.GetDoubleProp("rmsd_ref") for molecule, _ in group]),
    )
