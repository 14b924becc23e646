"""The program in the process that checks JSON: [text, schema] in, "valid" or "other" out, by the line.

Run as a file, so it imports nothing of this package.
"""

import json
import resource
import sys

import jsonschema
import referencing

MEMORY = 4 * 2**30  # bytes


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            text, schema = json.loads(line)
            value = json.loads(text, parse_constant=refuse_constant)
            maker = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
            # The default registry would look for references in the network.
            valid = maker(schema, registry=referencing.Registry()).is_valid(value)
        except Exception:  # anything may come of anything: not JSON, nested too deeply, numbers too large to divide
            valid = False
        print("valid" if valid else "other", flush=True)


if __name__ == "__main__":
    main()
