"""`python -m benchmarks --suite …`: run a suite, write its JSON, print its tables."""

import argparse
import json
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import (
    bags,
    batches,
    forms,
    multipose,
    operator,
    ordinary,
    overhead,
    processes,
    rules,
    scaling,
)
from benchmarks.settings import Memory, Settings
from benchmarks.table import markdown

RESULTS = Path(__file__).parent / "results"


class _Suite(NamedTuple):
    """A suite: how to run it, what it can be narrowed to, how its memory is measured, and where."""

    run: Callable[[Sequence[str], Settings], dict[str, Any]]
    names: Collection[str]
    memory: Memory | None = None
    devices: Collection[str] = ("cpu", "cuda")


SUITES: dict[str, _Suite] = {
    "multipose": _Suite(multipose.run, multipose.NAMES, multipose.MEMORY),
    "docked": _Suite(multipose.run_docked, multipose.DOCKED, multipose.MEMORY),
    **{
        suite: _Suite(
            partial(batches.run, suite), dict.fromkeys(sum(tasks.values(), ())), batches.MEMORY
        )
        for suite, tasks in batches.SUITES.items()
    },
    "bags": _Suite(bags.run, bags.CASES, bags.MEMORY),
    "scaling": _Suite(scaling.run, scaling.CASES, scaling.MEMORY),
    "processes": _Suite(processes.run, processes.CASES, devices=("cpu",)),
    "overhead": _Suite(overhead.run, overhead.NETWORKS),
    "operator": _Suite(operator.run, operator.NAMES, devices=("cpu",)),
    "forms": _Suite(forms.run, forms.LAYERS),
    "rules": _Suite(rules.run, rules.NETWORKS),
    **{
        suite: _Suite(partial(ordinary.run, suite), cases, devices=("cpu",))
        for suite, cases in ordinary.SUITES.items()
    },
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--suite", choices=list(SUITES), default="multipose")
    names = "; ".join(f"{name}: {', '.join(suite.names)}" for name, suite in SUITES.items())
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"parts of the suite. {names}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="cpu", help="not on a GPU")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--no-memory", action="store_true", help="skip the process for each case")
    parser.add_argument("--processes", type=int, default=1, help="how many of these at once")
    parser.add_argument("--output", type=Path, help="default: results/SUITE-DEVICE.json")
    arguments = parser.parse_args()
    if (arguments.only or arguments.no_memory) and not arguments.output:
        parser.error("a part of a suite goes to a file of its own: --output")
    if arguments.device not in SUITES[arguments.suite].devices:
        parser.error(f"{arguments.suite} is not for --device {arguments.device}")
    known = SUITES[arguments.suite].names
    unknown = [name for name in arguments.only or () if name not in known]
    if unknown:
        parser.error(f"{arguments.suite} has no {', '.join(unknown)}; it has {', '.join(known)}")
    return arguments


def main() -> None:
    """Run what the command line asks for."""
    arguments = _arguments()
    settings = Settings(
        rounds=arguments.rounds,
        threads=arguments.threads,
        clock="gpu" if arguments.device == "cuda" else arguments.clock,
        device=arguments.device,
        processes=arguments.processes,
    )
    suite = SUITES[arguments.suite]
    result = suite.run(arguments.only or list(suite.names), settings)
    output: Path = arguments.output or RESULTS / f"{arguments.suite}-{arguments.device}.json"
    _write(result, output)  # at once: what comes next takes long, and may be stopped
    if suite.memory and not arguments.no_memory:
        settings.measure(result["rows"], suite.memory)
        _write(result, output)
    # Read back: the tables come from the file alone.
    print(markdown(json.loads(output.read_text())))


def _write(result: dict[str, Any], output: Path) -> None:
    output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
