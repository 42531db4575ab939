"""AutoDock Vina on a published set of ligands.

References:
    Eberhardt et al., "AutoDock Vina 1.2.0", J. Chem. Inf. Model. 2021, 61, 3891.
    Wang et al., J. Am. Chem. Soc. 2015, 137, 2695: the proteins, ligands and affinities.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from meeko import (
    MoleculePreparation,
    PDBQTMolecule,
    PDBQTWriterLegacy,
    Polymer,
    RDKitMolCreate,
    ResidueChemTemplates,
)
from rdkit import Chem
from rdkit.Chem import rdDistGeom, rdMolAlign
from vina import Vina

__all__ = ["Docked", "Docker", "Ligand", "published_set"]

_MARGIN = 5.0  # Å of box beyond the outermost atom of any ligand, on each side


@dataclass(frozen=True)
class Ligand:
    """A ligand of the set.

    Attributes:
        name: Its name in the set.
        dg: Measured binding free energy, kcal/mol.
        reference: The molecule with hydrogens, in the set's modelled pose.
    """

    name: str
    dg: float
    reference: Chem.Mol


@dataclass(frozen=True)
class Docked:
    """A ligand with its docked poses, best score first.

    Attributes:
        ligand: What was docked.
        poses: The molecule with hydrogens, one conformer for each pose.
        vina: Score of each pose, kcal/mol.
        rmsd: Distance of each pose to the reference pose, Å.
    """

    ligand: Ligand
    poses: Chem.Mol
    vina: list[float]
    rmsd: list[float]


def published_set(target: str) -> tuple[Path, list[Ligand]]:
    """Protein file and ligands of a target, as the package `openmmforcefields` ships them."""
    spec = find_spec("openmmforcefields")
    assert spec is not None  # the caller has looked
    assert spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "data" / "perses_jacs_systems" / target
    (protein,), (ligands,) = folder.glob("*_protein.pdb"), folder.glob("*_ligands*.sdf")
    molecules = Chem.SDMolSupplier(str(ligands), removeHs=False)
    return protein, [
        Ligand(m.GetProp("_Name"), m.GetDoubleProp("r_user_dG.exp"), m) for m in molecules
    ]


class Docker:
    """Vina with one rigid protein and one box, for many ligands.

    Args:
        protein: A PDB file with hydrogens.
        around: Molecules that the box encloses.
        exhaustiveness: Number of independent searches.
        n_poses: Most poses of a ligand.
        energy_range: No pose scores worse than the best by more than this, kcal/mol.
        seed: Of starting conformers and of the search.
        cpu: Number of cores.
    """

    def __init__(
        self,
        protein: Path,
        around: Sequence[Chem.Mol],
        *,
        exhaustiveness: int,
        n_poses: int,
        energy_range: float,
        seed: int,
        cpu: int,
    ) -> None:
        self._exhaustiveness, self._n_poses = exhaustiveness, n_poses
        self._energy_range, self._seed = energy_range, seed
        self._vina = Vina(cpu=cpu, seed=seed, verbosity=0)
        with tempfile.TemporaryDirectory() as folder:  # Vina takes receptors as files only
            receptor = Path(folder) / "receptor.pdbqt"
            receptor.write_text(_receptor(protein))
            self._vina.set_receptor(str(receptor))
        xyz = np.concatenate([molecule.GetConformer().GetPositions() for molecule in around])
        low, high = xyz.min(axis=0) - _MARGIN, xyz.max(axis=0) + _MARGIN
        self._vina.compute_vina_maps(((low + high) / 2).tolist(), (high - low).tolist())

    def dock(self, ligand: Ligand) -> Docked:
        """Docks one ligand from a fresh conformer."""
        self._vina.set_ligand_from_string(self._prepare(ligand.reference))
        self._vina.dock(exhaustiveness=self._exhaustiveness, n_poses=self._n_poses)
        found = {"n_poses": self._n_poses, "energy_range": self._energy_range}
        written = PDBQTMolecule(self._vina.poses(**found), skip_typing=True)
        poses = RDKitMolCreate.from_pdbqt_mol(written)[0]
        return Docked(
            ligand=ligand,
            poses=poses,
            vina=[float(energy) for energy in self._vina.energies(**found)[:, 0]],
            rmsd=_distances(poses, ligand.reference),
        )

    def _prepare(self, reference: Chem.Mol) -> str:
        """The ligand in PDBQT, in a conformer that knows nothing of the reference pose."""
        molecule = Chem.Mol(reference)
        molecule.RemoveAllConformers()
        rdDistGeom.EmbedMolecule(molecule, randomSeed=self._seed)
        (setup,) = MoleculePreparation().prepare(molecule)
        text, fine, problem = PDBQTWriterLegacy.write_string(setup)
        if not fine:
            raise ValueError(f"meeko cannot write {reference.GetProp('_Name')}: {problem}")
        return str(text)


def _receptor(protein: Path) -> str:
    """The protein in PDBQT, all of it rigid."""
    templates = ResidueChemTemplates.create_from_defaults()
    polymer = Polymer.from_pdb_string(protein.read_text(), templates, MoleculePreparation())
    rigid, _ = PDBQTWriterLegacy.write_from_polymer(polymer)
    return str(rigid)


def _distances(poses: Chem.Mol, reference: Chem.Mol) -> list[float]:
    """Heavy-atom RMSD in place, over the symmetries of the molecule, Å."""
    poses, reference = Chem.RemoveHs(poses), Chem.RemoveHs(reference)
    ids = [conformer.GetId() for conformer in poses.GetConformers()]
    return [rdMolAlign.CalcRMS(Chem.Mol(poses, confId=i), reference) for i in ids]
