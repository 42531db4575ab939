"""Measured compounds, their conformers and their fingerprints, all by RDKit."""

import csv
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rdkit import Chem, RDConfig
from rdkit.Chem import rdDistGeom, rdFingerprintGenerator
from torch_geometric.data import Data
from tqdm import tqdm

__all__ = ["Compound", "load"]

DATA = Path(RDConfig.RDContribDir) / "FreeWilson" / "data"
NAME = "CHEMBL2321810"


@dataclass(frozen=True, eq=False)
class Compound:
    """One measured compound.

    Attributes:
        smiles: As published.
        pic50: Measured, -log10 of mol/l.
        conformers: Heavy atoms of each: `z` `[a]`, and `pos` `[a, 3]` in Å.
        fingerprint: Morgan counts of radius 2, `[2048]`.
    """

    smiles: str
    pic50: float
    conformers: list[Data]
    fingerprint: np.ndarray


def load(count: int, *, conformers: int, seed: int = 0, data: Path = DATA) -> list[Compound]:
    """Compounds drawn at random from RDKit's file, each with its conformers.

    Args:
        count: How many; there are 1017.
        conformers: How many of each ETKDG is asked for. A few compounds get fewer.
        seed: Of the draw and of ETKDG.
        data: Folder of the files.
    """
    lines = (data / f"{NAME}.smi").read_text(encoding="utf-8").splitlines()
    with (data / f"{NAME}_act.csv").open(encoding="utf-8") as file:
        measured = {row["Name"]: float(row["Act"]) for row in csv.DictReader(file)}
    drawn = random.Random(seed).sample(lines, count)
    bar = tqdm(map(str.split, drawn), total=count, desc="Embedding", unit="compound", leave=False)
    return [_compound(smiles, measured[name], conformers, seed) for smiles, name in bar]


def _compound(smiles: str, pic50: float, conformers: int, seed: int) -> Compound:
    molecule = Chem.MolFromSmiles(smiles)
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=2048)
    fingerprint = generator.GetCountFingerprintAsNumPy(molecule).astype(np.float64)
    return Compound(smiles, pic50, _embedded(molecule, conformers, seed), fingerprint)


def _embedded(molecule: Chem.Mol, count: int, seed: int) -> list[Data]:
    """Conformers by ETKDG, embedded with hydrogens and handed on without."""
    full = Chem.AddHs(molecule)
    options = rdDistGeom.ETKDGv3()
    options.randomSeed = seed + 1  # RDKit multiplies it: from 0 all conformers are the same
    options.useRandomCoords = True  # never gives up on a strained ring
    rdDistGeom.EmbedMultipleConfs(full, count, options)
    heavy = Chem.RemoveHs(full)
    z = torch.tensor([atom.GetAtomicNum() for atom in heavy.GetAtoms()])
    found = [torch.tensor(c.GetPositions(), dtype=torch.float32) for c in heavy.GetConformers()]
    if not found:
        raise ValueError(f"ETKDG found no conformer of {Chem.MolToSmiles(molecule)}.")
    return [Data(z=z, pos=xyz) for xyz in found]
