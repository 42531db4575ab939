"""`python -m benchmarks --suite multipose`: run a suite, write its JSON, print its tables."""

import argparse
import json
from pathlib import Path

from benchmarks import multipose
from benchmarks.methods import RULES
from benchmarks.table import markdown

RESULTS = Path(__file__).parent / "results"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--suite", choices=["multipose"], default="multipose")
    parser.add_argument("--poses", default="4,16,64", help="numbers of poses, comma-separated")
    parser.add_argument("--rules", nargs="+", choices=list(RULES), default=list(RULES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=list(multipose.CLOCKS), default="wall")
    parser.add_argument("--no-memory", action="store_true", help="skip the process for each case")
    parser.add_argument("--output", type=Path, default=RESULTS / "multipose-cpu.json")
    return parser.parse_args()


def main() -> None:
    """Run what the command line asks for."""
    arguments = _arguments()
    result = multipose.run(
        [int(m) for m in arguments.poses.split(",")],
        arguments.rules,
        rounds=arguments.rounds,
        threads=arguments.threads,
        clock=arguments.clock,
        memory=not arguments.no_memory,
    )
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    # Read back: the tables come from the file alone.
    print(markdown(json.loads(arguments.output.read_text())))


if __name__ == "__main__":
    main()
