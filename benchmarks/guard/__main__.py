"""`python -m benchmarks.guard --base REV [--head REV]`: is head slower than base, on this machine, now?

Each side is built in a folder of its own (build/guard/<commit>) and runs in a process of its own. The
two take turns in random order; a turn is one run of one case. verdict.py says what is made of the times; besides, the
instructions of one run are counted, where valgrind is installed.

Exit status: 1 if a case is slower, or no longer runs; 2 if the comparison could not be made; else 0.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.guard.compare import Broken, compare
from benchmarks.harness.worker import Ended


def folder(text: str) -> Path:
    if not (path := Path(text).resolve()).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no folder")
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    base, head = (parser.add_mutually_exclusive_group(required=needed) for needed in (True, False))
    base.add_argument("--base", metavar="REV", help="the commit to compare with")
    base.add_argument("--base-folder", type=folder, help="a folder that holds a built rlhf_kernels, instead")
    head.add_argument("--head", metavar="REV", help="the commit in question (default: the working tree as it is)")
    head.add_argument("--head-folder", type=folder, help="a folder that holds a built rlhf_kernels, instead")
    parser.add_argument("--cases", default="", metavar="REGEX", help="only those whose name contains it")
    parser.add_argument("--seconds", type=float, default=150, help="of timing, all cases together")
    parser.add_argument("--sets", type=int, default=3, help="how often processes are started anew")
    parser.add_argument("--threads", type=int, default=1, help="1: processor time; more: time by the clock")
    parser.add_argument("--no-instructions", action="store_true", help="count none")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: a test of this command")
    try:
        return compare(parser.parse_args())
    except (Broken, Ended) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
