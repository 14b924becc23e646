"""`python -m benchmarks.report`: docs/performance.md and its pictures from benchmarks/results."""

import argparse
from pathlib import Path

from benchmarks.harness.peers import ROOT
from benchmarks.report.performance import write

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results", help="folder of the JSON files")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of performance.md and images/")
    options = parser.parse_args()
    write(options.results, options.docs)
