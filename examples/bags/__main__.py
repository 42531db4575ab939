"""`python -m examples.bags`: end to end beside frozen features, and a picture; see `--help`."""

import argparse
from pathlib import Path

from examples.docked_poses._require import require

INSTALL = 'pip install "scikit-learn>=1.5" "matplotlib>=3.9" "tqdm>=4.66"'
OUT = Path(__file__).parent / "out"


def main() -> None:
    """Trains, prints and draws."""
    parser = argparse.ArgumentParser(prog="python -m examples.bags", description=__doc__)
    parser.add_argument("--bags", type=int, default=400, help="to train on")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument(
        "--large", type=int, default=1000, help="images of the bag that is measured"
    )
    parser.add_argument("--picture", type=Path, default=OUT / "bags.png")
    options = parser.parse_args()
    require("sklearn", "matplotlib", "tqdm", install=INSTALL)

    import torch

    from examples.bags.report import run

    torch.set_num_threads(1)  # images as small as these gain nothing from a second
    print(run(options.bags, options.epochs, options.large, options.picture))


if __name__ == "__main__":
    main()
