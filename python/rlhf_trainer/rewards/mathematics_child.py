"""The program in the process that compares formulas: pairs (answer, expected) in, "equal" or "other" out, by the line.

Run as a file, so it imports nothing of this package.
"""

import json
import resource
import sys

from math_verify import LatexExtractionConfig, parse, verify

MEMORY = 4 * 2**30  # bytes


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    replies, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no reply
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        try:
            answer, expected = (
                parse(f"${text}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)
                for text in json.loads(line)
            )
            # Twelve digits: by the default of six, 0.3333333 would be 1/3.
            equal = verify(expected, answer, float_rounding=12, timeout_seconds=None)
        except Exception:  # anything may come of a parser of anything; what is not understood is not equal
            equal = False
        print("equal" if equal else "other", file=replies, flush=True)


if __name__ == "__main__":
    main()
