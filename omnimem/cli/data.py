"""`omnimem data`: convert, validate and prepare (done in `data_prep`), and stats (`train/data_stats.py`).

omnimem data validate quickstart
omnimem data stats quickstart
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnimem.cli.arguments import above_zero, at_least, jpeg_quality, pixels_or_none
from train.stats_command import add_stats_action

if TYPE_CHECKING:
    from data_prep.decoded_clips.command import RecipeData


def add_command(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add ``data`` and its actions; `shared` holds the options of every command."""
    data = commands.add_parser("data", parents=[shared], help="manifests and clips: convert, validate, prepare, stats")
    data.description = "Manifests and media: convert other formats, check every file, decode once, count tokens."
    actions = data.add_subparsers(title="actions", metavar="ACTION", required=True)
    _add_convert(actions, shared)
    _add_validate(actions, shared)
    _add_prepare(actions, shared)
    add_stats_action(actions, shared)


def _add_convert(actions: Any, shared: argparse.ArgumentParser) -> None:
    convert = actions.add_parser("convert", parents=[shared], help="write a manifest from another project's data")
    convert.description = (
        "Write a manifest from video-SALMONN 2 JSON, LLaMA-Factory (ShareGPT), ms-swift, Hugging Face datasets or "
        "CSV. Bad rows are refused with a reason, the others are converted. Rejected answers of preference pairs are "
        "copied to the manifest, but nothing trains on them."
    )
    convert.add_argument("sources", nargs="+", metavar="IN", help="files, data set folders, or hub ids owner/name")
    convert.add_argument("--to", required=True, metavar="OUT.jsonl", help="manifest to write")
    convert.add_argument("--root", metavar="DIR", help="data root, which holds all media (default: the folder of IN)")
    formats = ("auto", "video_salmonn2", "sharegpt", "swift", "csv", "huggingface")
    convert.add_argument("--from", dest="format", choices=formats, default="auto", help="format (default: auto)")
    convert.add_argument("--split", default="train", help="split of a Hugging Face data set (default: train)")
    convert.add_argument(
        "--audio", choices=("auto", "on", "off"), default="auto",
        help="audio of videos: as IN says (auto), always (on), never (off)",
    )  # fmt: skip
    convert.add_argument(
        "--answers", choices=("auto", "letter", "index", "index1", "text"), default="auto",
        help="how answers name their option; index counts from 0, index1 from 1 (default: auto)",
    )  # fmt: skip
    convert.add_argument(
        "--on-bad-row", choices=("skip", "error"), default="skip",
        help="skip bad rows, or stop at the first (default: skip)",
    )  # fmt: skip
    convert.add_argument("--no-open", action="store_true", help="only check that media files exist, do not open them")
    convert.set_defaults(command=_convert)


def _convert(args: argparse.Namespace) -> None:
    from data_prep.convert import convert

    report = convert(
        args.sources,
        args.to,
        root=args.root,
        format=args.format,
        split=args.split,
        audio=args.audio,
        answers=args.answers,
        on_bad_row=args.on_bad_row,
        open_media=not args.no_open,
    )
    print("\n".join(report.lines()))


def _add_validate(actions: Any, shared: argparse.ArgumentParser) -> None:
    validate = actions.add_parser("validate", parents=[shared], help="decode every file and check every row")
    validate.description = (
        "Decode every media file of a manifest or below a folder, and report which are unusable or unusual. Results "
        "are saved: an interrupted run resumes, and unchanged files are not decoded again."
    )
    validate.add_argument("target", metavar="TARGET", help="manifest, `quickstart`, folder of media, or a media file")
    validate.add_argument("--root", type=Path, metavar="DIR", help="data root of a manifest (default: its folder)")
    validate.add_argument(
        "--report", type=Path, metavar="JSON", help="default: MANIFEST.validated.json; ./validated.json for a folder"
    )
    validate.add_argument(
        "--workers", type=at_least(int, 1), metavar="N", help="processes (default: number of CPU cores)"
    )
    validate.add_argument("--fast", action="store_true", help="read packet timestamps only, decode nothing")
    validate.add_argument("--fresh", action="store_true", help="ignore earlier results")
    validate.add_argument("--strict", action="store_true", help="exit with status 2 if any file or row is unusable")
    validate.set_defaults(command=_validate)


def _validate(args: argparse.Namespace) -> None:
    from data_prep.validate import validate_command

    validate_command(args)


def _add_prepare(actions: Any, shared: argparse.ArgumentParser) -> None:
    prepare = actions.add_parser("prepare", parents=[shared], help="decode every clip once, for training to read")
    prepare.description = (
        "Decode the clips of a manifest once, into a folder that a recipe's data.path can name in place of the "
        "manifest. Existing shards are reused; an interrupted run resumes."
    )
    prepare.add_argument("manifest", nargs="?", metavar="MANIFEST", help="manifest or `quickstart`")
    prepare.add_argument("--to", type=Path, required=True, metavar="DIR", help="prepared folder to write")
    prepare.add_argument("--root", metavar="DIR", help="data root (default: the manifest's folder)")
    prepare.add_argument(
        "--recipe", nargs="+", metavar=("NAME", "KEY=VALUE"),
        help="take options that are not given from this recipe's data section, with overrides key=value",
    )  # fmt: skip
    prepare.add_argument(
        "--clips", type=Path, metavar="DIR",
        help="folder of the shards, which several prepared folders may share (default: DIR/clips)",
    )  # fmt: skip
    prepare.add_argument(
        "--on-bad-row", choices=("error", "skip"), default="error",
        help="refuse the manifest, or skip bad rows (default: %(default)s)",
    )  # fmt: skip

    decoding = prepare.add_argument_group("decoding")
    decoding.add_argument(
        "--fps", type=above_zero, metavar="F",
        help="frames per second; training may use any rate that divides it (default: 1)",
    )  # fmt: skip
    decoding.add_argument(
        "--short-side", type=pixels_or_none, metavar="N",
        help="scale frames down to this shorter side; none keeps their size (default: 360)",
    )  # fmt: skip
    decoding.add_argument("--max-seconds", type=above_zero, metavar="S", help="decode only the first S seconds")
    decoding.add_argument("--audio", choices=("on", "off"), help="whether to store audio (default: on)")
    decoding.add_argument(
        "--frame-format", choices=("webp", "png", "jpeg"),
        help="webp and png are lossless, webp is smaller; jpeg is lossy and takes a quarter (default: webp)",
    )  # fmt: skip
    decoding.add_argument("--jpeg-quality", type=jpeg_quality, metavar="Q", help="1 to 95 (default: 90)")
    decoding.add_argument(
        "--audio-dtype", choices=("float32", "int16"), help="float32 is exact, int16 takes half (default: float32)"
    )

    machine = prepare.add_argument_group("machine")
    machine.add_argument(
        "--workers", type=at_least(int, 1), metavar="N", help="clips decoded in parallel (default: number of CPU cores)"
    )
    machine.add_argument(
        "--executor", choices=("process", "ray"), default="process",
        help="ray: on the running Ray cluster, or a local one (default: process)",
    )  # fmt: skip
    prepare.set_defaults(command=_prepare)


def _prepare(args: argparse.Namespace) -> None:
    from data_prep.decoded_clips.command import prepare_command

    prepare_command(args, _recipe_data(args.recipe) if args.recipe else None)


def _recipe_data(words: list[str]) -> RecipeData:
    """Decoding settings, manifest and data root of a recipe; without audio for a model that does not support it."""
    from data_prep.decoded_clips.command import RecipeData
    from data_prep.decoded_clips.format import PrepareSettings
    from omnimem.backbones import backbone_class, detect_backbone
    from omnimem.recipe import load_recipe

    name, *overrides = words
    recipe = load_recipe([f"recipe={name}", *overrides])
    backbone = recipe.model.backbone or detect_backbone(recipe.model.name_or_path, use_builtin_config=True)
    data, audio = recipe.data, recipe.data.audio and backbone_class(backbone).supports_audio
    settings = PrepareSettings(fps=data.fps, short_side=data.short_side, max_seconds=data.max_seconds, audio=audio)
    return RecipeData(settings, data.path, data.root)
