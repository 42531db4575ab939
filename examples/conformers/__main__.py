"""`python -m examples.conformers`: the table of docs/conformers.md; see `--help`."""

import argparse

from examples.docked_poses._require import require

INSTALL = 'pip install "rdkit>=2024.3" "torch_geometric>=2.6" "tqdm>=4.66"'


def main() -> None:
    """Embeds, trains and prints."""
    parser = argparse.ArgumentParser(prog="python -m examples.conformers", description=__doc__)
    parser.add_argument("--compounds", type=int, default=160)
    parser.add_argument("--conformers", type=int, default=4)
    parser.add_argument("--folds", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=15)
    options = parser.parse_args()
    require("rdkit", "torch_geometric", "tqdm", install=INSTALL)

    import torch

    from examples.conformers.ensemble import cross_validate, table
    from examples.conformers.molecules import load

    torch.set_num_threads(1)  # graphs as small as these gain nothing from a second
    torch.set_flush_denormal(True)  # a tail of SchNet's Gaussians is denormal, and slow
    compounds = load(options.compounds, conformers=options.conformers)
    print(table(cross_validate(compounds, folds=options.folds, epochs=options.epochs)))


if __name__ == "__main__":
    main()
