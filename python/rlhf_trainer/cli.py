"""The command line: `rlhf COMMAND --config x.yaml [--flag value ...]`."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .commands import COMMANDS
from .errors import TrainingError, UsageError, did_you_mean

LAUNCH = "--accelerate_config"  # a preset, or a file that `accelerate config` wrote
PRESETS = Path(__file__).parent / "config" / "accelerate"
INSPECT = "inspect"  # a command about the others, with their flags


def run(name: str, argv: Sequence[str]) -> None:
    """Runs a command; its function is imported when the flags are known good, as torch takes seconds."""
    if name == INSPECT:
        from .inspection import inspect

        inspect(argv)
        return
    from .config.parse import parse_config

    command = COMMANDS[name]
    summary = command.summary
    config = parse_config(command.load_config(), argv, f"rlhf {name}", f"{summary[0].upper()}{summary[1:]}.")
    from transformers.utils import logging

    logging.disable_progress_bar()  # a run shows one bar, its own
    from .config.base import TrainConfig
    from .training.processes import leave_processes

    if isinstance(config, TrainConfig) and config.dry_run:
        from .planning import dry_run

        dry_run(name, config)
        return
    function = command.load_function()
    from .training.memory import lack_of_memory

    try:
        with lack_of_memory(config, lambda: f"rlhf {name}"):
            function(config)
    finally:
        leave_processes()


def launch(argv: Sequence[str]) -> None:
    """Becomes `accelerate launch` of the same command: in the processes, and with the sharding, of a preset or file."""
    words, options = list(argv), []
    for flag in (LAUNCH, "--num_processes"):
        while flag in words:
            at = words.index(flag)
            value = words[at + 1 : at + 2]
            if not value:
                raise UsageError(f"{flag}: expected a value after it")
            del words[at : at + 2]
            options += [flag, *value]
    name = options[1]
    path = Path(name) if Path(name).is_file() else PRESETS / f"{name}.yaml"
    if not path.is_file():
        shipped = ", ".join(sorted(preset.stem for preset in PRESETS.glob("*.yaml")))
        raise UsageError(f"{LAUNCH}: expected a file, or one of {shipped}; got {name!r}")
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path), *options[2:]]
    os.execv(sys.executable, [*start, "-m", "rlhf_trainer", *words])


def usage() -> str:
    """The commands, a line each."""
    summaries = {name: command.summary for name, command in COMMANDS.items()}
    summaries[INSPECT] = "show the rows of a command as it will train them: `rlhf inspect sft ...`"
    width = max(map(len, summaries))
    commands = "\n".join(f"  {name:<{width}} {summary}" for name, summary in summaries.items())
    return (
        f"usage: rlhf COMMAND [--config file.yaml] [--flag value ...]\n\n{commands}\n\n"
        "rlhf COMMAND --help lists its flags.\n"
        f"rlhf COMMAND ... {LAUNCH} fsdp2 [--num_processes N] runs it on several devices: ddp, fsdp2,\n"
        "fsdp2-offload, or a file of `accelerate config`."
    )


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    name, *rest = argv
    if name not in (*COMMANDS, INSPECT):
        nearest = did_you_mean(name, [*COMMANDS, INSPECT])
        print(f"rlhf: unknown command {name!r}{nearest}\n`rlhf --help` lists the commands", file=sys.stderr)
        return 2
    try:
        if LAUNCH in rest:
            launch(argv)
        run(name, rest)
    except (UsageError, TrainingError) as error:
        print(f"rlhf {name}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) and name != INSPECT else 1
    except KeyboardInterrupt:
        print(
            f"\nrlhf {name}: interrupted; the same command with --resume_from_checkpoint goes on from what it has kept",
            file=sys.stderr,
        )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
