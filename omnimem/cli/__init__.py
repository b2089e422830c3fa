"""The command `omnimem`: parse the command line, call the module that does the work, print.

    omnimem train recipe=quickstart
    omnimem export runs/quickstart --out quickstart-merged
    omnimem answer quickstart-merged clip.mp4 "What does the narrator say?"

Heavy modules are imported when a command runs, so every `--help` answers at once. Exit status: 0 success, 2 an error
with a known cause and remedy (usage, data, memory, disk; one line names it), 1 a bug or interrupted (`--debug` shows
the traceback).
"""

from omnimem.cli.command_line import build_parser, main

__all__ = ["build_parser", "main"]
