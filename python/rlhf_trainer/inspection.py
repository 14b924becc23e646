"""`rlhf inspect COMMAND`: the rows of another command exactly as it will train them, token by token.

It takes the command's flags, reads its data as the command does, and exits with 1 and one message where that would
refuse them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .commands import COMMANDS, load
from .config.parse import parse_config
from .data.examples import Loaded
from .data.views import as_json, as_text, has_colours
from .errors import UsageError, did_you_mean
from .models.checks import check_lengths, check_vocabulary
from .models.loading import load_codec, load_codec_for, meta_model

ROWS = 5  # that are shown to a person who does not say how many


def inspect(argv: Sequence[str]) -> None:
    """Prints the rows: for a person, with what is learned in green or brackets, or a JSON object each (`--json`)."""
    readers = [name for name, command in COMMANDS.items() if command.reader is not None]
    parser = argparse.ArgumentParser(
        "rlhf inspect", "rlhf inspect COMMAND [the flags of COMMAND] [--json] [--rows N]", allow_abbrev=False,
        description=f"Shows the first rows of a command as it trains them. COMMAND: {', '.join(readers)}.",
    )  # fmt: skip
    parser.add_argument("command", metavar="COMMAND")
    parser.add_argument("--json", action="store_true", help="An object a row, of all rows: token ids and labels.")
    parser.add_argument("--rows", type=int, help=f"How many rows; default: {ROWS}, or all with --json.")
    options, flags = parser.parse_known_args(list(argv))
    if options.command not in readers:
        raise UsageError(
            f"expected one of {', '.join(readers)}; got {options.command!r}{did_you_mean(options.command, readers)}"
        )
    command = COMMANDS[options.command]
    config = parse_config(
        command.load_config(), flags, f"rlhf {options.command}", command.summary, {"output_dir": "inspect"}
    )
    loaded, tokenizer = read(config, load(command.reader))
    print(loaded.report(config.dataset_name), file=sys.stderr)
    most = ROWS if options.rows is None and not options.json else options.rows
    for example in loaded.examples[:most]:
        print(as_json(example) if options.json else as_text(example, tokenizer, colour=has_colours()))


def read(config: Any, reader: Any) -> tuple[Loaded[Any], Any]:
    """The examples, checked against the model's positions where it is there, and their tokenizer."""
    name = config.models[0] if hasattr(config, "models") else config.model_name_or_path
    if hasattr(config, "models"):
        codec, largest = load_codec(name, config, key="models"), None
    else:
        codec, largest = load_codec_for(config)
    loaded = reader(config, codec, config.dataset_name, config.dataset_train_split)
    if not Path(name).is_dir() or (Path(name) / "config.json").is_file():  # else it is a tokenizer alone
        model = meta_model(name, key="model_name_or_path", trust_remote_code=config.trust_remote_code)
        if largest is not None:
            check_vocabulary(model, largest)
        rows, lengths = [example.row for example in loaded.examples], [example.length for example in loaded.examples]
        check_lengths(model, rows, lengths, config.dataset_name)
    return loaded, codec.tokenizer
