"""The actions of `omnimem data`: what each takes on the command line, and the one call it makes.

    omnimem data convert train.json --to train.jsonl
    omnimem data validate train.jsonl
    omnimem data prepare train.jsonl --to prepared

Nothing heavy is imported until an action runs. `stats` is added by `train.stats_command`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_actions(actions: Any, shared: argparse.ArgumentParser) -> None:
    """Add the actions to the subparsers of `omnimem data`; `shared` are the options every command has."""
    _add_convert(actions, shared)
    _add_validate(actions, shared)
    _add_prepare(actions, shared)


def _add_convert(actions: Any, shared: argparse.ArgumentParser) -> None:
    convert = actions.add_parser("convert", parents=[shared], help="a manifest from another project's data")
    convert.description = (
        "Write a manifest from video-SALMONN 2 JSON, LLaMA-Factory (ShareGPT), ms-swift, Hugging Face datasets or "
        "CSV. Bad rows are refused one by one, with reasons; good rows go on. Of preference pairs the "
        "rejected answers are kept but not trained on."
    )
    convert.add_argument("sources", nargs="+", metavar="IN", help="files, data set folders, or hub ids owner/name")
    convert.add_argument("--to", required=True, metavar="OUT.jsonl", help="manifest to write")
    convert.add_argument("--root", metavar="DIR", help="data root: media lie in it (default: the folder of IN)")
    formats = ("auto", "video_salmonn2", "sharegpt", "swift", "csv", "huggingface")
    convert.add_argument("--from", dest="format", choices=formats, default="auto", help="format (default: auto)")
    convert.add_argument("--split", default="train", help="of a Hugging Face data set (default: train)")
    heard = "what is heard: what IN says (auto), every video (on), none (off)"
    convert.add_argument("--audio", choices=("auto", "on", "off"), default="auto", help=heard)
    given = "how answers name their option; index counts from 0, index1 from 1 (default: auto)"
    readings = ("auto", "letter", "index", "index1", "text")
    convert.add_argument("--answers", choices=readings, default="auto", help=given)
    bad = "leave bad rows out, or stop at the first (default: skip)"
    convert.add_argument("--on-bad-row", choices=("skip", "error"), default="skip", help=bad)
    convert.add_argument("--no-open", action="store_true", help="see that media files are there, but do not open them")
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
    validate = actions.add_parser("validate", parents=[shared], help="open and decode every file, check every row")
    validate.description = (
        "Look at every media file of a manifest, or below a folder: what cannot be used, what is odd. Results are "
        "kept: an interrupted run goes on, and files that have not changed are not looked at again."
    )
    validate.add_argument("target", metavar="TARGET", help="manifest, `quickstart`, folder of media, or a media file")
    validate.add_argument("--root", type=Path, metavar="DIR", help="media of a manifest (default: beside it)")
    validate.add_argument(
        "--report", type=Path, metavar="JSON", help="default: MANIFEST.validated.json; ./validated.json for a folder"
    )
    validate.add_argument("--workers", type=_count, metavar="N", help="processes (default: as many as processors)")
    validate.add_argument("--fast", action="store_true", help="open files and read their times; decode nothing")
    validate.add_argument("--fresh", action="store_true", help="use no earlier result")
    validate.add_argument("--strict", action="store_true", help="status 2 if any file or row cannot be used")
    validate.set_defaults(command=_validate)


def _count(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return number


def _validate(args: argparse.Namespace) -> None:
    from data_prep.validate import validate_command

    validate_command(args)


def _add_prepare(actions: Any, shared: argparse.ArgumentParser) -> None:
    prepare = actions.add_parser("prepare", parents=[shared], help="decode every clip once, for training to read")
    prepare.description = (
        "Decode the clips of a manifest once, into a folder that data.path of a recipe may name instead of it. "
        "What is there is not done again; an interrupted run goes on."
    )
    prepare.add_argument("manifest", nargs="?", metavar="MANIFEST", help="manifest or `quickstart`")
    prepare.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to write")
    prepare.add_argument("--root", metavar="DIR", help="folder that holds the media (default: the manifest's)")
    named = "take what is not given here from a recipe's data section; further words are its key=value"
    prepare.add_argument("--recipe", nargs="+", metavar=("NAME", "KEY=VALUE"), help=named)
    shared_by = "folder of the decoded clips, which several DIRs may share (default: DIR/clips)"
    prepare.add_argument("--clips", type=Path, metavar="DIR", help=shared_by)
    prepare.add_argument("--on-bad-row", choices=("error", "skip"), default="error", help="default: %(default)s")

    decoding = prepare.add_argument_group("decoding")
    divides = "frames per second; training may use any rate that divides it (default: 1)"
    decoding.add_argument("--fps", type=_positive, metavar="F", help=divides)
    short = "scale frames down to this shorter side; none keeps them (default: 360)"
    decoding.add_argument("--short-side", type=_pixels, metavar="N", help=short)
    decoding.add_argument("--max-seconds", type=_positive, metavar="S", help="clips end here")
    decoding.add_argument("--audio", choices=("on", "off"), help="whether sound is kept (default: on)")
    exact = "webp and png are exact, webp is smaller; jpeg is not exact and takes a quarter (default: webp)"
    decoding.add_argument("--frames", choices=("webp", "png", "jpeg"), help=exact)
    decoding.add_argument("--quality", type=_quality, metavar="Q", help="of jpeg, 1 to 95 (default: 90)")
    samples = "float32 is exact, int16 takes half (default: float32)"
    decoding.add_argument("--sound", choices=("float32", "int16"), help=samples)

    machine = prepare.add_argument_group("machine")
    machine.add_argument("--workers", type=_count, metavar="N", help="clips at once (default: as many as CPU cores)")
    cluster = "ray: on the Ray cluster there is, or a local one (default: process)"
    machine.add_argument("--executor", choices=("process", "ray"), default="process", help=cluster)
    prepare.set_defaults(command=_prepare)


def _prepare(args: argparse.Namespace) -> None:
    from data_prep.prepare.command import prepare_command

    prepare_command(args)


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return number


def _pixels(text: str) -> str:
    if text != "none" and (not text.isascii() or not text.isdigit() or int(text) < 2):
        raise argparse.ArgumentTypeError(f"must be at least 2 pixels or none, got {text!r}")
    return text


def _quality(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() else 0
    if not 1 <= number <= 95:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 95, got {text!r}")
    return number
