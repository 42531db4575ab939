"""`python -m examples.private`: a private classifier of digits, three ways; see `--help`."""

import argparse
from pathlib import Path

from examples.docked_poses._require import require

INSTALL = 'pip install "opacus>=1.6" "scikit-learn>=1.5" "matplotlib>=3.9" "tqdm>=4.66"'
OUT = Path(__file__).parent / "out"


def main() -> None:
    """Trains, prints and draws."""
    parser = argparse.ArgumentParser(prog="python -m examples.private", description=__doc__)
    parser.add_argument("--epsilon", type=float, default=3.0, help="what training may cost")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=40, help="steps that are timed, of each way")
    parser.add_argument("--picture", type=Path, default=OUT / "private.png")
    options = parser.parse_args()
    require("opacus", "sklearn", "matplotlib", "tqdm", install=INSTALL)

    import torch

    from examples.private.report import run

    torch.set_num_threads(1)  # images as small as these gain nothing from a second
    print(run(options.epsilon, options.epochs, options.rounds, options.picture))


if __name__ == "__main__":
    main()
