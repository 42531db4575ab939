"""`python -m benchmarks.table benchmarks/results/….json`: print the tables of a JSON file."""

import json
import sys
from pathlib import Path

from benchmarks.table import markdown

if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())))
