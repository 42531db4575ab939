"""`python -m benchmarks --suite …`: run a suite, write its JSON, print its tables."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import forms, gramian, multipose, rules
from benchmarks.cases import CASES
from benchmarks.methods import RULES
from benchmarks.rounds import CLOCKS
from benchmarks.table import markdown

RESULTS = Path(__file__).parent / "results"


def _multipose(arguments: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    sizes = [int(m) for m in arguments.poses.split(",")]
    return multipose.run(sizes, arguments.rules, memory=not arguments.no_memory, **settings)


def _gramian(arguments: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    return gramian.run(arguments.cases, memory=not arguments.no_memory, **settings)


def _rules(arguments: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    return rules.run(arguments.networks, **settings)


def _forms(arguments: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    return forms.run(arguments.layers, **settings)


SUITES: dict[str, Callable[[argparse.Namespace, dict[str, Any]], dict[str, Any]]] = {
    "multipose": _multipose,
    "gramian": _gramian,
    "forms": _forms,
    "rules": _rules,
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--suite", choices=list(SUITES), default="multipose")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--no-memory", action="store_true", help="skip the process for each case")
    parser.add_argument("--output", type=Path, help="default: results/SUITE-cpu.json")
    only = parser.add_argument_group("of one suite")
    only.add_argument("--poses", default="4,16,64", help="multipose: numbers, comma-separated")
    for option, suite, names in (
        ("--rules", "multipose", RULES),
        ("--cases", "gramian", CASES),
        ("--layers", "forms", forms.LAYERS),
        ("--networks", "rules", rules.NETWORKS),
    ):
        every, text = list(names), f"{suite}: {'; '.join(names)}"
        only.add_argument(
            option, nargs="+", choices=every, default=every, help=text, metavar="NAME"
        )
    return parser.parse_args()


def main() -> None:
    """Run what the command line asks for."""
    arguments = _arguments()
    settings = {name: getattr(arguments, name) for name in ("rounds", "threads", "clock")}
    result = SUITES[arguments.suite](arguments, settings)
    output: Path = arguments.output or RESULTS / f"{arguments.suite}-cpu.json"
    output.write_text(json.dumps(result, indent=1) + "\n")
    # Read back: the tables come from the file alone.
    print(markdown(json.loads(output.read_text())))


if __name__ == "__main__":
    main()
