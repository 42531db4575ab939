"""Prints what is followed: `python -m tests.operators [samples]`, `... losses`.

`python -m tests.operators page` writes docs/operators.md.
"""

import sys
import warnings
from collections.abc import Iterable

import torch

from tests.operators.cases import reported
from tests.operators.coverage import examined, report
from tests.operators.layers import LAYERS
from tests.operators.losses import LOSSES
from tests.operators.page import PAGE, page
from tests.operators.samples import OPERATORS


def _lines(arguments: list[str]) -> Iterable[str]:
    if arguments == ["losses"]:
        return (reported(name, case) for name, case in {**LOSSES, **LAYERS}.items())
    samples = int(arguments[0]) if arguments else 4
    return report(outcome for name in OPERATORS for outcome in examined(name, samples))


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if sys.argv[1:] == ["page"]:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        for line in _lines(sys.argv[1:]):
            print(line)
