"""`main` and the parser of all commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from omnimem.cli import data, measure, model, profile
from omnimem.cli.arguments import Parser
from omnimem.errors import OmniMemError, is_valid_text
from omnimem.guard import run_guarded
from omnimem.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if status := run_guarded("omnimem", lambda: _check_text(argv)):
        return status
    if "train" in argv and set(argv[: argv.index("train")]) <= {"--debug"}:
        # The arguments are key=value pairs, parsed as by train.py, which also decides which rank reports an error.
        from train.command import main as train

        argv.remove("train")
        return train(argv)
    args = build_parser().parse_args(argv)
    return run_guarded("omnimem", lambda: args.command(args), debug=args.debug)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    help_of_debug = "show the traceback of an error"
    shared = Parser(add_help=False)
    # No default here: it would undo the option in `omnimem --debug COMMAND`.
    shared.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=help_of_debug)
    parser = Parser(
        prog="omnimem",
        description="Fine-tune and run audio-visual language models with a KV cache of fixed size.",
        epilog="On several GPUs: accelerate launch -m omnimem train recipe=NAME key=value ...",
    )
    parser.add_argument("--debug", action="store_true", help=help_of_debug)
    parser.add_argument("--version", action="version", version=f"omnimem {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    model.add_commands(commands, shared)
    measure.add_commands(commands, shared)
    data.add_command(commands, shared)
    profile.add_command(commands, shared)
    return parser


def _check_text(arguments: Sequence[str]) -> None:
    """Refuse arguments that are not UTF-8: reports and recipes are UTF-8 and could not contain them."""
    for argument in arguments:
        if not is_valid_text(argument):
            raise OmniMemError(f"argument {argument!a} is not valid UTF-8 text; rename the file")
