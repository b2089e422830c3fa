"""The command `omnimem`: parse, call, print. What is done lives in the modules the commands import.

    omnimem train recipe=quickstart
    omnimem export runs/quickstart --out quickstart-merged
    omnimem answer quickstart-merged clip.mp4 "What does the narrator say?"

Nothing heavy is imported until a command runs, so every `--help` answers at once. Exit status: 0 done, 2
wrong usage or input (one line says what and what to do), 1 anything else (`--debug` shows the traceback).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from data_prep.commands import add_actions as add_data_actions
from omnimem import __version__
from omnimem.errors import OmniMemError, is_storable
from omnimem.guard import run_guarded
from train.stats_command import add_stats_action

DTYPES = ("float32", "bfloat16", "float16", "float64")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if status := run_guarded("omnimem", lambda: _check_text(argv)):
        return status
    if "train" in argv and set(argv[: argv.index("train")]) <= {"--debug"}:
        # Its arguments are those of train.py, key=value; which process reports an error is decided there too.
        from train.command import main as train

        argv.remove("train")
        return train(argv)
    args = build_parser().parse_args(argv)
    return run_guarded("omnimem", lambda: args.command(args), debug=args.debug)


def _check_text(arguments: Sequence[str]) -> None:
    """Refuse bytes that are no text: reports and recipes, which are UTF-8, could not name them."""
    for argument in arguments:
        if not is_storable(argument):
            raise OmniMemError(f"argument {argument!a} is not valid UTF-8 text; rename the file")


class Parser(argparse.ArgumentParser):
    """Says what was wrong on one line and leaves the usage to ``--help``."""

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    shows = "show the traceback of an error"
    everywhere = Parser(add_help=False)
    # Suppressed, so that a command's own default does not undo `omnimem --debug command`.
    everywhere.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=shows)
    parser = Parser(
        prog="omnimem",
        description="Audio-visual language models with a memory of fixed size.",
        epilog="On several GPUs: accelerate launch -m omnimem train recipe=NAME key=value ...",
    )
    parser.add_argument("--debug", action="store_true", help=shows)
    parser.add_argument("--version", action="version", version=f"omnimem {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    # Listed here for --help; `main` hands its arguments to train/command.py.
    commands.add_parser("train", help="fine-tune as a recipe says: recipe=NAME key=value ...")
    recipes = commands.add_parser("recipes", parents=[everywhere], help="list the recipes")
    recipes.description = "List the recipes that `omnimem train recipe=NAME` takes."
    recipes.set_defaults(command=_recipes)
    methods = commands.add_parser("methods", parents=[everywhere], help="list the selection methods and their options")
    methods.description = "List the selection methods: what each keeps, its options and their defaults."
    methods.set_defaults(command=_methods)

    export = commands.add_parser("export", parents=[everywhere], help="merge a run into one checkpoint")
    export.description = "Merge the adapters of a training run into a checkpoint, with its profile and model card."
    export.add_argument("run", type=Path, metavar="RUN", help="folder of the run (its output_dir)")
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    export.add_argument("--base", metavar="MODEL", help="merge into this model (default: the one the adapter names)")
    export.add_argument("--overwrite", action="store_true", help="replace DIR if it is not empty")
    export.add_argument("--dtype", choices=DTYPES, help="of the merged weights (default: as trained)")
    export.add_argument("--device", default="cpu", help="where it is merged and verified (default: %(default)s)")
    export.set_defaults(command=_export)

    answer = commands.add_parser("answer", parents=[everywhere], help="ask a question about a clip")
    answer.description = "Watch a clip with a bounded memory and answer a question about it."
    _add_answer_arguments(answer)
    answer.set_defaults(command=_answer)

    calibrate = commands.add_parser("calibrate", parents=[everywhere], help="budgets from a calibration set")
    calibrate.description = "Stream a calibration set, measure every layer, and allocate a budget profile (AVBA)."
    _add_calibrate_arguments(calibrate)
    calibrate.set_defaults(command=_calibrate)

    compare = commands.add_parser("compare", parents=[everywhere], help="methods and budgets on a set of questions")
    compare.description = (
        "Ask the same questions of every selection method at every budget: table, JSON, CSV, pictures."
    )
    _add_compare_arguments(compare)
    compare.set_defaults(command=_compare)

    bench = commands.add_parser("bench", parents=[everywhere], help="memory and latency against stream length")
    bench.description = (
        "Stream a clip, repeated, at growing lengths: peak memory and first-token latency of every method."
    )
    _add_bench_arguments(bench)
    bench.set_defaults(command=_bench)

    data = commands.add_parser("data", parents=[everywhere], help="convert, validate, prepare, count")
    data.description = "Manifests and media: other formats in, every file checked, decoded once, counted."
    actions = data.add_subparsers(title="actions", metavar="ACTION", required=True)
    add_data_actions(actions, everywhere)
    add_stats_action(actions, everywhere)

    profile = commands.add_parser("profile", parents=[everywhere], help="show, plot, compare, re-scale, convert")
    profile.description = "Budget profiles: how many visual and audio positions every layer keeps."
    actions = profile.add_subparsers(title="actions", metavar="ACTION", required=True)
    show = actions.add_parser("show", parents=[everywhere], help="print the budget of every layer")
    show.add_argument("file", type=Path, metavar="FILE", help="profile, or published list of [audio, visual]")
    show.set_defaults(command=_profile_show)
    convert = actions.add_parser("convert", parents=[everywhere], help="change the file format")
    convert.add_argument("source", type=Path, metavar="IN", help="profile, or published list of [audio, visual]")
    convert.add_argument("target", type=Path, metavar="OUT", help="file to write")
    convert.add_argument("--to", choices=("profile", "list"), default="profile", help="default: %(default)s")
    convert.set_defaults(command=_profile_convert)
    rescale = actions.add_parser("rescale", parents=[everywhere], help="the same distribution at another mean")
    rescale.add_argument("source", type=Path, metavar="IN")
    rescale.add_argument("target", type=Path, metavar="OUT", help="file to write")
    rescale.add_argument("--mean-budget", type=_at_least(int, 1), required=True, metavar="N")
    rescale.set_defaults(command=_profile_rescale)
    diff = actions.add_parser("diff", parents=[everywhere], help="compare the budgets of two profiles")
    diff.add_argument("first", type=Path, metavar="A")
    diff.add_argument("second", type=Path, metavar="B")
    diff.set_defaults(command=_profile_diff)
    plot = actions.add_parser("plot", parents=[everywhere], help="a picture of budgets and statistics over layers")
    plot.add_argument("file", type=Path, metavar="FILE")
    plot.add_argument("--out", type=Path, required=True, metavar="PNG", help="picture to write (.png, .svg, .pdf)")
    plot.set_defaults(command=_profile_plot)
    return parser


def _add_calibrate_arguments(calibrate: argparse.ArgumentParser) -> None:
    calibrate.add_argument("--model", required=True, metavar="MODEL", help="checkpoint, run, hub id, or `tiny`")
    calibrate.add_argument("--media", type=Path, required=True, metavar="DIR", help="folder of clips, or a manifest")
    calibrate.add_argument("--out", type=Path, required=True, metavar="FILE", help="profile to write")
    calibrate.add_argument(
        "--mean-budget", type=_at_least(int, 2), default=8192, metavar="N", help="default: %(default)s"
    )
    calibrate.add_argument("--ratio", type=_above_zero, default=5.0, metavar="R", help="default: %(default)s")
    calibrate.add_argument("--temperature", type=_above_zero, default=0.2, metavar="T", help="default: %(default)s")
    calibrate.add_argument(
        "--floor", type=_at_least(int, 1), default=16, metavar="N", help="least of a modality (default: %(default)s)"
    )
    calibrate.add_argument(
        "--max-seconds", type=_above_zero, default=60.0, metavar="S", help="of each clip (default: %(default)s)"
    )
    calibrate.add_argument("--fps", type=_above_zero, metavar="F", help="frames per second")
    calibrate.add_argument("--chunk-seconds", type=_above_zero, metavar="S", help="seconds read at a time")
    calibrate.add_argument("--device", default="auto", metavar="D")
    calibrate.add_argument("--dtype", choices=DTYPES, default="auto")


def _add_compare_arguments(compare: argparse.ArgumentParser) -> None:
    compare.add_argument("model", metavar="MODEL", help="run, exported checkpoint, hub id, or `tiny`")
    compare.add_argument("questions", metavar="QUESTIONS", help="manifest of clips and questions, or `quickstart`")
    compare.add_argument(
        "--mean-budgets", type=_list_of(_at_least(int, 2)), default=[1024, 2048, 4096, 8192], metavar="N,N,...",
        help="positions a layer keeps, on average (default: 1024,2048,4096,8192)",
    )  # fmt: skip
    compare.add_argument(
        "--ratio", type=_above_zero, metavar="R", help="visual to audio, without a profile (default: 5)"
    )
    compare.add_argument("--profile", type=Path, metavar="P", help="budgets in the proportions of this profile")
    compare.add_argument(
        "--lambda",
        dest="lambda_",
        type=_list_of(_at_least(float, 0)),
        metavar="L,L,...",
        help="λ of methods that have it",
    )
    compare.add_argument(
        "--temperature",
        type=_list_of(_above_zero),
        metavar="T,T,...",
        help="re-allocate a calibrated profile at every T",
    )
    compare.add_argument("--limit", type=_at_least(int, 1), metavar="N", help="only the first N clips")
    compare.add_argument(
        "--max-new-tokens", type=_at_least(int, 1), default=32, metavar="N", help="default: %(default)s"
    )
    compare.add_argument("--max-seconds", type=_above_zero, metavar="S", help="of each clip")
    _add_grid_arguments(compare)


def _add_bench_arguments(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("--model", default="tiny", metavar="MODEL", help="default: %(default)s")
    bench.add_argument("--media", type=Path, metavar="CLIP", help="clip to repeat (default: one of a checkout's tests)")
    bench.add_argument(
        "--lengths", type=_list_of(_above_zero), default=[30, 60, 120, 240], metavar="S,S,...",
        help="seconds of stream (default: 30,60,120,240)",
    )  # fmt: skip
    bench.add_argument(
        "--mean-budget", type=_at_least(int, 2), metavar="N", help="positions a layer keeps (default: 8192; tiny: 256)"
    )
    bench.add_argument("--ratio", type=_above_zero, default=5.0, metavar="R", help="default: %(default)s")
    bench.add_argument(
        "--rounds",
        type=_at_least(int, 1),
        default=5,
        metavar="N",
        help="questions a median is of (default: %(default)s)",
    )
    _add_grid_arguments(bench)


def _add_grid_arguments(command: argparse.ArgumentParser) -> None:
    """What `compare` and `bench` share."""
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder; finished cells in it are kept")
    command.add_argument("--overwrite", action="store_true", help="compute finished cells again")
    command.add_argument("--methods", default="all", metavar="M,M,...", help="selection methods (default: all)")
    command.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="M.KEY=VALUE",
        help="of a method, such as omnimem.variant=release",
    )
    command.add_argument("--fps", type=_above_zero, metavar="F", help="frames per second")
    command.add_argument("--chunk-seconds", type=_above_zero, metavar="S", help="seconds read at a time")
    command.add_argument(
        "--device", default="auto", metavar="D", help="such as cuda, cpu (default: cuda if there is one)"
    )
    command.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="default: bfloat16 on an accelerator, else float32"
    )


def _add_answer_arguments(answer: argparse.ArgumentParser) -> None:
    answer.add_argument("model", metavar="MODEL", help="run, exported checkpoint, hub id, or `tiny`")
    answer.add_argument("media", type=Path, metavar="MEDIA", help="video or audio file")
    answer.add_argument("question", metavar="QUESTION")
    answer.add_argument(
        "--at", type=_at_least(float, 0), metavar="T", help="ask at the end of the chunk with second T, not at the end"
    )
    answer.add_argument("--json", action="store_true", help="print one JSON object: answer, memory, times")
    answer.add_argument(
        "--max-new-tokens", type=_at_least(int, 1), default=256, metavar="N", help="default: %(default)s"
    )

    memory = answer.add_argument_group("memory", "default: what the checkpoint was trained with")
    memory.add_argument("--profile", type=Path, metavar="P", help="budget profile; replaces the two below")
    memory.add_argument(
        "--mean-budget", type=_at_least(int, 1), metavar="N", help="positions a layer keeps, on average"
    )
    memory.add_argument("--ratio", type=_above_zero, metavar="R", help="visual positions for each audio position")
    memory.add_argument("--method", metavar="M", help="selection method")
    memory.add_argument("--variant", choices=("paper", "release"), help="of the method omnimem")

    reading = answer.add_argument_group("reading the clip", "default: what the checkpoint was trained with")
    reading.add_argument("--fps", type=_above_zero, metavar="F", help="frames per second")
    reading.add_argument("--chunk-seconds", type=_above_zero, metavar="S", help="seconds read at a time")
    reading.add_argument("--max-seconds", type=_above_zero, metavar="S", help="stop reading here")
    reading.add_argument("--no-audio", dest="audio", action="store_false", help="read the picture only")
    reading.add_argument("--allow-truncated", action="store_true", help="answer from what a broken file still holds")

    machine = answer.add_argument_group("machine")
    machine.add_argument("--device", metavar="D", help="such as cuda, cuda:1, cpu (default: cuda if there is one)")
    machine.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on an accelerator, else float32")


def _at_least(kind: type[int] | type[float], least: int) -> Callable[[str], float]:
    """Return an argparse type: a finite number that is not below `least`."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            wanted = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None
        if value != value or value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        if value >= 2**31:
            raise argparse.ArgumentTypeError(f"must be below {2**31}, got {text[:20]}")
        return value

    return read


def _list_of(kind: Callable[[str], float]) -> Callable[[str], list[float]]:
    """Return an argparse type: numbers between commas, each once, in the order given."""

    def read(text: str) -> list[float]:
        return list(dict.fromkeys(kind(part) for part in text.split(",")))

    return read


def _above_zero(text: str) -> float:
    value = _at_least(float, 0)(text)
    if value < 1e-6:  # smaller ones are no longer 0 and yet too small to divide by
        raise argparse.ArgumentTypeError(f"must be above 0.000001, got {text}")
    return value


def _recipes(_: argparse.Namespace) -> None:
    from omnimem.recipe import list_recipes, recipe_summary

    names = list_recipes()
    width = max(map(len, names))
    for name in names:
        print(f"{name:<{width}}  {recipe_summary(name)}")


def _methods(_: argparse.Namespace) -> None:
    from omnimem.selection.listing import print_methods

    print_methods()


def _export(args: argparse.Namespace) -> None:
    from train.export import export_run

    names = ("run", "out", "overwrite", "dtype", "base", "device")
    checked = export_run(**{name: getattr(args, name) for name in names})
    print(f"{args.out}: {checked}")


def _answer(args: argparse.Namespace) -> None:
    from omnimem.answer import answer_command

    answer_command(args)


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
        args.ratio,
        args.temperature,
        args.floor,
        {key: value for key, value in settings.items() if value is not None},
        args.device,
        args.dtype,
    )
    print(f"{args.out}: {profile.mean_budget:g} positions a layer from {profile.statistics['clips']} clips")


def _compare(args: argparse.Namespace) -> None:
    from data_prep.manifest import manifest_fingerprint, read_manifest
    from omnimem.measure.compare import compare_command

    manifest = read_manifest(args.questions, on_bad_row="skip")
    rows = manifest.rows[: args.limit]
    compare_command(args, rows, manifest_fingerprint(rows), manifest.problems)


def _bench(args: argparse.Namespace) -> None:
    from omnimem.measure.bench import bench_command

    bench_command(args)


def _profile_rescale(args: argparse.Namespace) -> None:
    from omnimem.budget import BudgetProfile
    from omnimem.budget.allocation import with_mean

    with_mean(BudgetProfile.load(args.source), args.mean_budget).save(args.target)
    print(f"wrote {args.target}")


def _profile_diff(args: argparse.Namespace) -> None:
    from omnimem.budget import BudgetProfile

    first, second = BudgetProfile.load(args.first), BudgetProfile.load(args.second)
    if len(first.layers) != len(second.layers):
        raise OmniMemError(f"{args.first} has {len(first.layers)} layers, {args.second} {len(second.layers)}")
    print(f"{'layer':>5} {'visual':>8} {'':>8} {'audio':>8} {'':>8}")
    for index, (a, b) in enumerate(zip(first.layers, second.layers, strict=True)):
        print(f"{index:>5} {a.visual:>8} {b.visual - a.visual:>+8} {a.audio:>8} {b.audio - a.audio:>+8}")
    print(f"mean budget: {first.mean_budget:g} and {second.mean_budget:g} positions a layer")


def _profile_plot(args: argparse.Namespace) -> None:
    from omnimem.budget import BudgetProfile
    from omnimem.budget.picture import plot_profile

    plot_profile(BudgetProfile.load(args.file), args.out)
    print(f"wrote {args.out}")


def _profile_show(args: argparse.Namespace) -> None:
    from omnimem.budget import BudgetProfile

    profile = BudgetProfile.load(args.file)
    measured = profile.statistics.get("layers", [])
    groups = ("visual", "audio") if measured else ()
    header = "".join(f" {f'{group} H':>9} {f'{group} s':>9}" for group in groups)
    print(f"{'layer':>5} {'visual':>8} {'audio':>8} {'total':>8}{header}")
    for index, layer in enumerate(profile.layers):
        found = "".join(
            f" {measured[index][group]['entropy']:>9.3f} {measured[index][group]['redundancy']:>9.3f}"
            for group in groups
        )
        print(f"{index:>5} {layer.visual:>8} {layer.audio:>8} {layer.total:>8}{found}")
    if measured:
        print("H: entropy of the attention mass over log K; s: mean redundancy")
    print(f"mean budget: {profile.mean_budget:g} positions a layer")


def _profile_convert(args: argparse.Namespace) -> None:
    from omnimem.budget import BudgetProfile

    profile = BudgetProfile.load(args.source)
    if args.to == "list":
        profile.save_lists(args.target)
    else:
        profile.save(args.target)
    print(f"wrote {args.target}")
