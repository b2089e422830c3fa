"""`omnimem profile`: show, plot, diff, rescale and convert budget profiles. Only what takes a model needs torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnimem.cli.arguments import DTYPES, KV_DTYPES, above_zero, at_least
from omnimem.errors import OmniMemError

if TYPE_CHECKING:
    from omnimem.budget import BudgetProfile
    from omnimem.memory.codec import KvDtype
    from omnimem.selection import SelectionMethod


def add_command(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add ``profile`` and its actions; `shared` holds the options of every command."""
    profile = commands.add_parser(
        "profile", parents=[shared], help="budget profiles: show, plot, diff, rescale, convert"
    )
    profile.description = "Budget profiles: how many visual and audio tokens every layer retains."
    actions = profile.add_subparsers(title="actions", metavar="ACTION", required=True)
    show = actions.add_parser("show", parents=[shared], help="print the budget of every layer")
    show.add_argument("file", type=Path, metavar="FILE", help="profile, or published list of [audio, visual]")
    _add_model(show, "also print the bytes of every layer in this model")
    show.set_defaults(command=_show)
    convert = actions.add_parser("convert", parents=[shared], help="change the file format")
    convert.add_argument("source", type=Path, metavar="IN", help="profile, or published list of [audio, visual]")
    convert.add_argument("target", type=Path, metavar="OUT", help="file to write")
    convert.add_argument("--to", choices=("profile", "list"), default="profile", help="default: %(default)s")
    convert.set_defaults(command=_convert)
    rescale = actions.add_parser("rescale", parents=[shared], help="scale all budgets to another mean budget")
    rescale.add_argument("source", type=Path, metavar="IN")
    rescale.add_argument("target", type=Path, metavar="OUT", help="file to write")
    size = rescale.add_mutually_exclusive_group(required=True)
    size.add_argument("--mean-budget", type=at_least(int, 2), metavar="N")
    size.add_argument("--gib", type=above_zero, metavar="G", help="GiB of the retained tokens; needs --model")
    _add_model(rescale, "model whose memory --gib limits")
    rescale.set_defaults(command=_rescale)
    diff = actions.add_parser("diff", parents=[shared], help="compare the budgets of two profiles")
    diff.add_argument("first", type=Path, metavar="A")
    diff.add_argument("second", type=Path, metavar="B")
    diff.set_defaults(command=_diff)
    plot = actions.add_parser("plot", parents=[shared], help="plot budgets and calibration statistics over layers")
    plot.add_argument("file", type=Path, metavar="FILE")
    plot.add_argument("--out", type=Path, required=True, metavar="PNG", help="file to write (.png, .svg, .pdf)")
    plot.set_defaults(command=_plot)


def _add_model(command: argparse.ArgumentParser, meaning: str) -> None:
    command.add_argument("--model", metavar="MODEL", help=f"{meaning}: checkpoint, run, hub id, or `tiny`")
    command.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the model (default: %(default)s)")
    command.add_argument("--kv-dtype", choices=KV_DTYPES, help="stored keys and values (default: as in the profile)")


def _method_on(args: argparse.Namespace, profile: BudgetProfile) -> tuple[Any, SelectionMethod, KvDtype]:
    """Shapes of the model, the selection method of the profile, and how keys and values are stored."""
    from omnimem.backbones import load_backbone
    from omnimem.backbones.adapter import resolve_checkpoint
    from omnimem.selection import build_selection

    base, _ = resolve_checkpoint(args.model, None)
    backbone = load_backbone(base, dtype=args.dtype, device="meta")
    profile.check_model(backbone.config)
    selection = dict(profile.selection)
    method = build_selection(selection.pop("method", "omnimem"), **selection)
    return backbone, method, args.kv_dtype or profile.stream.get("kv_dtype", "auto")


def _show(args: argparse.Namespace) -> None:
    from omnimem.budget import BudgetProfile

    profile = BudgetProfile.load(args.file)
    measured = profile.statistics.get("layers", [])
    token = None
    if args.model is not None:
        from omnimem.memory.token_bytes import resident_bytes, token_bytes_of

        backbone, method, kv_dtype = _method_on(args, profile)
        token = token_bytes_of(backbone, method, kv_dtype)
    groups = ("visual", "audio") if measured else ()
    header = "".join(f" {f'{group} H':>9} {f'{group} s':>9}" for group in groups)
    header += "" if token is None else f" {'MiB':>10}"
    print(f"{'layer':>5} {'visual':>8} {'audio':>8} {'total':>8}{header}")
    for index, layer in enumerate(profile.layers):
        found = "".join(
            f" {measured[index][group]['entropy']:>9.3f} {measured[index][group]['redundancy']:>9.3f}"
            for group in groups
        )
        found += "" if token is None else f" {layer.total * token.total / 2**20:>10.3f}"
        print(f"{index:>5} {layer.visual:>8} {layer.audio:>8} {layer.total:>8}{found}")
    if measured:
        print("H: entropy of the attention scores divided by log K; s: mean redundancy")
    print(f"mean budget: {profile.mean_budget:g} tokens per layer")
    if token is not None:
        parts = ", ".join(f"{name} {size}" for name, size in token.parts().items())
        print(f"resident: {resident_bytes(profile, token) / 2**30:.4g} GiB without text; bytes per token: {parts}")


def _convert(args: argparse.Namespace) -> None:
    from omnimem.budget import BudgetProfile

    profile = BudgetProfile.load(args.source)
    if args.to == "list":
        profile.save_lists(args.target)
    else:
        profile.save(args.target)
    print(f"wrote {args.target}")


def _rescale(args: argparse.Namespace) -> None:
    from omnimem.budget import BudgetProfile
    from omnimem.budget.allocation import with_mean

    profile = BudgetProfile.load(args.source)
    if args.gib is None:
        scaled = with_mean(profile, args.mean_budget)
    elif args.model is None:
        raise OmniMemError("--gib needs --model: the bytes of a token depend on the model")
    else:
        from omnimem.memory.token_bytes import within

        scaled = within(profile, args.gib, *_method_on(args, profile))
    scaled.save(args.target)
    print(f"wrote {args.target}")


def _diff(args: argparse.Namespace) -> None:
    from omnimem.budget import BudgetProfile

    first, second = BudgetProfile.load(args.first), BudgetProfile.load(args.second)
    if len(first.layers) != len(second.layers):
        raise OmniMemError(
            f"{args.first} has {len(first.layers)} layers and {args.second} has {len(second.layers)}; "
            "compare profiles of the same model"
        )
    print(f"{'layer':>5} {'visual':>8} {'change':>8} {'audio':>8} {'change':>8}")
    for index, (a, b) in enumerate(zip(first.layers, second.layers, strict=True)):
        print(f"{index:>5} {a.visual:>8} {b.visual - a.visual:>+8} {a.audio:>8} {b.audio - a.audio:>+8}")
    print(f"mean budget: {first.mean_budget:g} and {second.mean_budget:g} tokens per layer")


def _plot(args: argparse.Namespace) -> None:
    from omnimem.budget import BudgetProfile
    from omnimem.measure.figures import plot_profile

    plot_profile(BudgetProfile.load(args.file), args.out)
    print(f"wrote {args.out}")
