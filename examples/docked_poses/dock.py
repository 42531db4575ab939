"""Docks a published set of ligands anew: `python -m examples.docked_poses.dock --target tyk2`.

Makes the files of `data/` from scratch: proteins, ligands and affinities from the package
`openmmforcefields`, poses from AutoDock Vina. Each ligand starts from a fresh conformer, never from
its reference pose. Not part of the demo; some minutes for a target.

Vina's search is random. The same seed gives the same poses on the same machine and number of
cores, not elsewhere.
"""

import argparse
import os
from pathlib import Path

from examples.docked_poses._require import DOCK, require

__all__ = ["main"]

TARGETS = ("bace", "cdk2", "jnk1", "mcl1", "p38a", "ptp1b", "thrombin", "tyk2")


def main() -> None:
    """Reads the command line, docks, writes."""
    args = _arguments()
    require(
        *("vina", "meeko", "gemmi", "scipy", "rdkit", "tqdm", "openmmforcefields"), install=DOCK
    )
    # Only now: these import what was just looked for.
    from tqdm import tqdm

    from examples.docked_poses.docking import Docker, published_set
    from examples.docked_poses.posefiles import write

    protein, ligands = published_set(args.target)
    docker = Docker(
        protein,
        [ligand.reference for ligand in ligands],
        exhaustiveness=args.exhaustiveness,
        n_poses=args.poses,
        energy_range=args.energy_range,
        seed=args.seed,
        cpu=args.cpu,
    )
    chosen = ligands[: args.ligands]
    docked = [docker.dock(ligand) for ligand in tqdm(chosen, desc="Docking", unit="ligand")]
    for path in write(args.target, protein, docked, args.out):
        print(path)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.docked_poses.dock", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("--target", choices=TARGETS, default="tyk2", help="set to dock (default: tyk2)")
    add("--out", type=Path, default=Path("docked"), help="folder to write to (default: docked)")
    add("--ligands", type=int, help="dock only the first so many (default: all)")
    add("--poses", type=int, default=16, help="most poses of a ligand (default: 16)")
    add("--exhaustiveness", type=int, default=4, help="of Vina's search (default: 4)")
    add("--energy-range", type=float, default=8.0, help="worst to best pose, kcal/mol (default: 8)")
    add("--seed", type=int, default=7, help="of conformers and of the search (default: 7)")
    add("--cpu", type=int, default=os.cpu_count() or 1, help="cores for Vina (default: all)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
