"""The program in a `ChildProcess`: it compares formulas, or checks JSON. Lines of JSON in, "yes" or "no" out.

Run as a file, so it imports nothing of this package; and of others only what its check needs.
"""

import json
import resource
import sys

MEMORY = 4 * 2**30  # bytes


def formulas():
    """[answer, expected]: whether they are equal."""
    from math_verify import LatexExtractionConfig, parse, verify

    def read(text):
        return parse(f"${text}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)

    # Twelve digits: by the default of six, 0.3333333 would be 1/3.
    return lambda answer, expected: verify(read(expected), read(answer), float_rounding=12, timeout_seconds=None)


def schemas():
    """[text, schema]: whether the text is JSON that the schema allows."""
    import jsonschema
    import referencing

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    def is_valid(text, schema):
        value = json.loads(text, parse_constant=refuse)
        maker = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
        # The default registry would look for references in the network.
        return maker(schema, registry=referencing.Registry()).is_valid(value)

    return is_valid


def main(check):
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    replies, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no reply
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        try:
            holds = check(*json.loads(line))
        except Exception:  # anything may come of anything: what is not understood, nested too deeply, too large
            holds = False
        print("yes" if holds else "no", file=replies, flush=True)


if __name__ == "__main__":
    main({"formulas": formulas, "schemas": schemas}[sys.argv[1]]())
