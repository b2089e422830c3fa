"""Commands on models and runs: train, recipes, methods, export, answer, calibrate."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from omnimem.cli.arguments import DTYPES, KV_DTYPES, above_zero, add_device_arguments, add_reading_arguments, at_least


def add_commands(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add the commands; `shared` holds the options of every command."""
    # Listed here for --help only: `main` passes the arguments of train on to train/command.py.
    commands.add_parser("train", help="fine-tune with a recipe: recipe=NAME key=value ...")
    recipes = commands.add_parser("recipes", parents=[shared], help="list the recipes")
    recipes.description = "List the recipes for `omnimem train recipe=NAME`."
    recipes.set_defaults(command=_recipes)
    methods = commands.add_parser("methods", parents=[shared], help="list the selection methods and their options")
    methods.description = "List the selection methods: which tokens each retains, its options and their defaults."
    methods.set_defaults(command=_methods)
    _add_export(commands, shared)
    _add_answer(commands, shared)
    _add_calibrate(commands, shared)


def _recipes(_: argparse.Namespace) -> None:
    from omnimem.recipe import list_recipes, recipe_summary

    names = list_recipes()
    width = max(map(len, names))
    for name in names:
        print(f"{name:<{width}}  {recipe_summary(name)}")


def _methods(_: argparse.Namespace) -> None:
    from omnimem.selection.listing import print_methods

    print_methods()


def _add_export(commands: Any, shared: argparse.ArgumentParser) -> None:
    export = commands.add_parser("export", parents=[shared], help="merge a run into one checkpoint")
    export.description = (
        "Merge the adapter of a training run into its base model and save it with budget profile and model card."
    )
    export.add_argument("run", type=Path, metavar="RUN", help="folder of the run (its output_dir)")
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    export.add_argument("--base", metavar="MODEL", help="merge into this model (default: the adapter's base model)")
    export.add_argument("--overwrite", action="store_true", help="replace DIR if it is not empty")
    export.add_argument("--dtype", choices=DTYPES, help="dtype of the merged weights (default: as trained)")
    export.add_argument("--device", default="cpu", help="device for merging and verifying (default: %(default)s)")
    export.set_defaults(command=_export)


def _export(args: argparse.Namespace) -> None:
    from train.export import export_run

    names = ("run", "out", "overwrite", "dtype", "base", "device")
    checked = export_run(**{name: getattr(args, name) for name in names})
    print(f"{args.out}: {checked}")


def _add_answer(commands: Any, shared: argparse.ArgumentParser) -> None:
    answer = commands.add_parser("answer", parents=[shared], help="answer a question about a clip")
    answer.description = "Stream a clip through a model with a bounded KV cache, then answer a question about it."
    answer.add_argument("model", metavar="MODEL", help="run, exported checkpoint, hub id, or `tiny`")
    answer.add_argument("media", type=Path, metavar="MEDIA", help="video or audio file")
    answer.add_argument("question", metavar="QUESTION")
    answer.add_argument(
        "--at", type=at_least(float, 0), metavar="T", help="ask after the chunk that contains second T, not at the end"
    )
    answer.add_argument("--json", action="store_true", help="print one JSON object: answer, memory, times")
    answer.add_argument(
        "--max-new-tokens", type=at_least(int, 1), default=256, metavar="N", help="default: %(default)s"
    )

    memory = answer.add_argument_group("memory", "default: as the checkpoint was trained")
    memory.add_argument("--profile", type=Path, metavar="P", help="budget profile; replaces --mean-budget and --ratio")
    memory.add_argument(
        "--mean-budget", type=at_least(int, 2), metavar="N", help="mean number of retained tokens per layer"
    )
    memory.add_argument(
        "--gib",
        type=above_zero,
        metavar="G",
        help="GiB of the retained tokens; scales the profile, excludes --mean-budget",
    )
    memory.add_argument("--ratio", type=above_zero, metavar="R", help="visual tokens per audio token")
    memory.add_argument("--method", metavar="M", help="selection method")
    memory.add_argument("--variant", choices=("paper", "release"), help="variant of the method omnimem")
    memory.add_argument("--kv-dtype", choices=KV_DTYPES, help="stored keys and values; auto: dtype of the model")

    reading = answer.add_argument_group("reading the clip", "default: as the checkpoint was trained")
    add_reading_arguments(reading)
    reading.add_argument("--max-seconds", type=above_zero, metavar="S", help="read only the first S seconds")
    reading.add_argument("--no-audio", dest="audio", action="store_false", help="ignore the audio track")
    reading.add_argument("--allow-truncated", action="store_true", help="use the readable part of a truncated file")

    add_device_arguments(answer.add_argument_group("machine"), default=None)
    answer.set_defaults(command=_answer)


def _answer(args: argparse.Namespace) -> None:
    from omnimem.answer import answer_command

    answer_command(args)


def _add_calibrate(commands: Any, shared: argparse.ArgumentParser) -> None:
    calibrate = commands.add_parser("calibrate", parents=[shared], help="compute a budget profile from clips")
    calibrate.description = (
        "Stream calibration clips, measure every layer, and allocate a budget profile (audio-visual budget "
        "allocation, AVBA, arXiv 2606.07577)."
    )
    calibrate.add_argument("--model", required=True, metavar="MODEL", help="checkpoint, run, hub id, or `tiny`")
    calibrate.add_argument("--media", type=Path, required=True, metavar="DIR", help="folder of clips, or a manifest")
    calibrate.add_argument("--out", type=Path, required=True, metavar="FILE", help="profile to write")
    size = calibrate.add_mutually_exclusive_group()
    size.add_argument(
        "--mean-budget", type=at_least(int, 2), default=8192, metavar="N",
        help="mean number of retained tokens per layer (default: %(default)s)",
    )  # fmt: skip
    size.add_argument("--gib", type=above_zero, metavar="G", help="GiB of the retained tokens, instead")
    calibrate.add_argument(
        "--ratio", type=above_zero, default=5.0, metavar="R",
        help="visual tokens per audio token (default: %(default)s)",
    )  # fmt: skip
    calibrate.add_argument(
        "--temperature", type=above_zero, default=0.2, metavar="T",
        help="temperature of the budget allocation; higher is more uniform over layers (default: %(default)s)",
    )  # fmt: skip
    calibrate.add_argument(
        "--floor", type=at_least(int, 1), default=16, metavar="N",
        help="smallest budget of a modality in a layer (default: %(default)s)",
    )  # fmt: skip
    calibrate.add_argument(
        "--max-seconds", type=above_zero, default=60.0, metavar="S",
        help="read only the first S seconds of each clip (default: %(default)s)",
    )  # fmt: skip
    add_reading_arguments(calibrate)
    add_device_arguments(calibrate)
    calibrate.set_defaults(command=_calibrate)


def _calibrate(args: argparse.Namespace) -> None:
    from omnimem.calibrate import calibrate_command

    if args.media.is_dir():
        clips = sorted(path for path in args.media.iterdir() if path.is_file() and not path.name.startswith("."))
    else:
        from data_prep.manifest import read_manifest

        clips = [row.media for row in read_manifest(args.media).rows]
    settings = {"fps": args.fps, "chunk_seconds": args.chunk_seconds, "max_seconds": args.max_seconds}
    profile = calibrate_command(
        args.model,
        clips,
        args.out,
        args.mean_budget,
        args.gib,
        args.ratio,
        args.temperature,
        args.floor,
        {key: value for key, value in settings.items() if value is not None},
        args.device,
        args.dtype,
    )
    print(f"{args.out}: {profile.mean_budget:g} tokens per layer, from {profile.statistics['clips']} clips")
