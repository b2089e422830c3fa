"""The argument parser and the argument types that the commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NoReturn

DTYPES = ("float32", "bfloat16", "float16", "float64")

KV_DTYPES = ("auto", "fp8", "int8", "int4")

LARGEST = 2**31
"""Numbers on the command line are below this: libraries fail on larger ones."""


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that reports an error on one line and prints the usage only for ``--help``."""

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def at_least(kind: type[int] | type[float], least: int) -> Callable[[str], float]:
    """Return an argument type: a number of `kind` from `least` to below `LARGEST`."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            wanted = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None
        if value != value or value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        if value >= LARGEST:
            raise argparse.ArgumentTypeError(f"must be below {LARGEST}, got {text[:20]}")
        return value

    return read


def above_zero(text: str) -> float:
    """Argument type: a number above 0."""
    value = at_least(float, 0)(text)
    if value < 1e-6:  # smaller numbers are above 0 but too small to divide by
        raise argparse.ArgumentTypeError(f"must be above 0.000001, got {text}")
    return value


def list_of(kind: Callable[[str], float]) -> Callable[[str], list[float]]:
    """Return an argument type: comma-separated numbers, duplicates removed, in the given order."""

    def read(text: str) -> list[float]:
        return list(dict.fromkeys(kind(part) for part in text.split(",")))

    return read


def pixels_or_none(text: str) -> str:
    """Argument type: a number of pixels of at least 2, or the word none."""
    if text != "none" and (not text.isascii() or not text.isdigit() or int(text) < 2):
        raise argparse.ArgumentTypeError(f"must be at least 2 pixels or none, got {text!r}")
    return text


def jpeg_quality(text: str) -> int:
    """Argument type: a whole number from 1 to 95."""
    number = int(text) if text.isascii() and text.isdigit() else 0
    if not 1 <= number <= 95:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 95, got {text!r}")
    return number


def add_reading_arguments(command: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add ``--fps`` and ``--chunk-seconds``."""
    command.add_argument("--fps", type=above_zero, metavar="F", help="frames per second")
    command.add_argument("--chunk-seconds", type=above_zero, metavar="S", help="length of a chunk in seconds")


def add_device_arguments(
    command: argparse.ArgumentParser | argparse._ArgumentGroup, default: str | None = "auto"
) -> None:
    """Add ``--device`` and ``--dtype``."""
    command.add_argument(
        "--device", default=default, metavar="D", help="such as cuda, cuda:1, cpu (default: cuda if available)"
    )
    command.add_argument(
        "--dtype", choices=DTYPES, default=default, help="default: bfloat16 on an accelerator, else float32"
    )
