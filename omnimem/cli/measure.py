"""Commands that measure selection methods: compare, bench."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from omnimem.cli.arguments import above_zero, add_device_arguments, add_reading_arguments, at_least, list_of


def add_commands(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add the commands; `shared` holds the options of every command."""
    _add_compare(commands, shared)
    _add_bench(commands, shared)


def _add_compare(commands: Any, shared: argparse.ArgumentParser) -> None:
    compare = commands.add_parser("compare", parents=[shared], help="accuracy of methods and budgets on questions")
    compare.description = (
        "Ask the same questions with every selection method at every budget; write a table as JSON and CSV, and plots."
    )
    compare.add_argument("model", metavar="MODEL", help="run, exported checkpoint, hub id, or `tiny`")
    compare.add_argument("questions", metavar="QUESTIONS", help="manifest of clips and questions, or `quickstart`")
    sizes = compare.add_mutually_exclusive_group()
    sizes.add_argument(
        "--mean-budgets", type=list_of(at_least(int, 2)), metavar="N,N,...",
        help="mean numbers of retained tokens per layer (default: 1024,2048,4096,8192)",
    )  # fmt: skip
    sizes.add_argument(
        "--gib",
        type=list_of(above_zero),
        metavar="G,G,...",
        help="GiB of the retained tokens; each method gets as many",
    )
    compare.add_argument(
        "--ratio", type=above_zero, metavar="R", help="visual tokens per audio token, without a profile (default: 5)"
    )
    compare.add_argument("--profile", type=Path, metavar="P", help="scale this budget profile to every size")
    compare.add_argument(
        "--lambda", dest="lambda_", type=list_of(at_least(float, 0)), metavar="L,L,...",
        help="values of the option lambda, for methods that have it",
    )  # fmt: skip
    compare.add_argument(
        "--temperature", type=list_of(above_zero), metavar="T,T,...",
        help="temperatures of the budget allocation, for a calibrated profile",
    )  # fmt: skip
    compare.add_argument("--limit", type=at_least(int, 1), metavar="N", help="use only the first N clips")
    compare.add_argument(
        "--max-new-tokens", type=at_least(int, 1), default=32, metavar="N", help="default: %(default)s"
    )
    compare.add_argument("--max-seconds", type=above_zero, metavar="S", help="read only the first S seconds of a clip")
    _add_table_arguments(compare)
    compare.set_defaults(command=_compare)


def _compare(args: argparse.Namespace) -> None:
    from data_prep.manifest import manifest_fingerprint, read_manifest
    from omnimem.measure.compare import compare_command

    if args.mean_budgets is None and args.gib is None:
        args.mean_budgets = [1024, 2048, 4096, 8192]
    manifest = read_manifest(args.questions, on_bad_row="skip")
    rows = manifest.rows[: args.limit]
    compare_command(args, rows, manifest_fingerprint(rows), manifest.problems)


def _add_bench(commands: Any, shared: argparse.ArgumentParser) -> None:
    bench = commands.add_parser("bench", parents=[shared], help="memory and latency by stream length")
    bench.description = (
        "Stream a clip, repeated to growing lengths, with every method: peak memory and first-token latency."
    )
    bench.add_argument("--model", default="tiny", metavar="MODEL", help="default: %(default)s")
    bench.add_argument("--media", type=Path, metavar="CLIP", help="clip to repeat (default: a quickstart clip)")
    bench.add_argument(
        "--lengths", type=list_of(above_zero), default=[30, 60, 120, 240], metavar="S,S,...",
        help="stream lengths in seconds (default: 30,60,120,240)",
    )  # fmt: skip
    bench.add_argument(
        "--mean-budget", type=at_least(int, 2), metavar="N",
        help="mean number of retained tokens per layer (default: 8192; tiny: 256)",
    )  # fmt: skip
    bench.add_argument(
        "--ratio",
        type=above_zero,
        default=5.0,
        metavar="R",
        help="visual tokens per audio token (default: %(default)s)",
    )
    bench.add_argument(
        "--rounds", type=at_least(int, 1), default=5, metavar="N",
        help="questions whose median latency is reported (default: %(default)s)",
    )  # fmt: skip
    _add_table_arguments(bench)
    bench.set_defaults(command=_bench)


def _bench(args: argparse.Namespace) -> None:
    from data_prep.shipped import QUICKSTART_CLIP
    from omnimem.measure.bench import bench_command

    args.media = args.media or QUICKSTART_CLIP
    bench_command(args)


def _add_table_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options that `compare` and `bench` share."""
    command.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write; finished cells are reused"
    )
    command.add_argument("--overwrite", action="store_true", help="compute finished cells again")
    command.add_argument(
        "--methods", default="all", metavar="M,M,...", help="selection methods (default: all without trained heads)"
    )
    command.add_argument(
        "--option", action="append", default=[], metavar="M.KEY=VALUE",
        help="option of a method, such as omnimem.variant=release",
    )  # fmt: skip
    add_reading_arguments(command)
    add_device_arguments(command)
