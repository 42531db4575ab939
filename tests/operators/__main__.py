"""Prints what is inferred: `python -m tests.operators [samples]`, `... losses`."""

import sys
import warnings
from collections.abc import Iterable

import torch

from tests.operators.cases import reported
from tests.operators.coverage import examined, report
from tests.operators.layers import LAYERS
from tests.operators.losses import LOSSES
from tests.operators.samples import OPERATORS


def _lines(arguments: list[str]) -> Iterable[str]:
    if arguments == ["losses"]:
        return (reported(name, case) for name, case in {**LOSSES, **LAYERS}.items())
    samples = int(arguments[0]) if arguments else 4
    return report(outcome for name in OPERATORS for outcome in examined(name, samples))


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for line in _lines(sys.argv[1:]):
        print(line)
