"""The command line: `rlhf dpo --config x.yaml [--flag value ...]` and `rlhf demo`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from .errors import UsageError


def run_dpo(argv: Sequence[str]) -> None:
    from .config import DPOConfig, parse_config

    config = parse_config(DPOConfig, argv, "rlhf dpo", "Train a language model on pairs of preferred responses (DPO).")
    from transformers.utils import logging

    from .dpo import train_dpo  # torch takes seconds to import: not before the flags are known good

    logging.disable_progress_bar()  # a run shows one bar, its own
    train_dpo(config)


def run_demo(argv: Sequence[str]) -> None:
    from .config import DemoConfig, parse_config

    config = parse_config(DemoConfig, argv, "rlhf demo", "See DPO raise a known reward, from scratch, in two minutes.")
    from transformers.utils import logging

    from .demo import run

    logging.disable_progress_bar()
    run(config)


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "dpo": (run_dpo, "train a model on a file of preferences with DPO"),
    "demo": (run_demo, "two minutes on a CPU: a tiny model, a hidden reward, DPO, before and after"),
}


def usage() -> str:
    commands = "\n".join(f"  {name:<6} {summary}" for name, (_, summary) in COMMANDS.items())
    return (
        f"usage: rlhf COMMAND [--config file.yaml] [--flag value ...]\n\n{commands}\n\n"
        "rlhf COMMAND --help lists its flags."
    )


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    name, *rest = argv
    if name not in COMMANDS:
        print(f"rlhf: unknown command {name!r}\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        COMMANDS[name][0](rest)
    except UsageError as error:
        print(f"rlhf {name}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
