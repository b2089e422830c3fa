"""Fine-tune with the bounded memory active, as a recipe says; every `key=value` overrides it.

    accelerate launch train.py recipe=quickstart
    accelerate launch train.py recipe=quickstart train.max_steps=3 output_dir=runs/try
    omnimem train recipe=quickstart

`omnimem train` is the same program without the launcher, for one device; on several, `accelerate launch -m omnimem
train recipe=NAME` needs no checkout. `omnimem recipes` lists the recipes, `dry_run=true` prints the plan of a run.

Exit status: 0 done, 2 wrong usage or input, 1 anything else; `--debug` shows tracebacks. The launcher reports 1 for
every failure and adds a traceback of its own: `accelerate launch -q` leaves it out on one device, and `omnimem train
recipe=NAME dry_run=true` checks a recipe, with status 2, before a long job is queued.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

from omnimem.guard import run_guarded
from omnimem.recipe import Recipe, list_recipes, load_recipe

GRACE_SECONDS = 2.0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the recipe, train, and return the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    if "--help" in args or "-h" in args:
        print(f"{__doc__}\nRecipes: {', '.join(list_recipes())}")
        return 0
    debug = "--debug" in args
    rank = int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0)

    # Every rank finds the same error in a recipe, so rank 0 alone prints it. A later error may concern a single rank
    # (its clip, its disk), which prints it itself.
    recipes: list[Recipe] = []
    parse = [arg for arg in args if arg != "--debug"]
    status = run_guarded("train", lambda: recipes.append(load_recipe(parse)), debug, quiet=rank > 0)
    if status:
        if rank:  # the launcher ends all ranks with the first that fails: rank 0 needs the time to say why
            time.sleep(GRACE_SECONDS)
        return status
    return run_guarded(f"train (rank {rank})" if rank else "train", lambda: _run(recipes[0]), debug)


def _run(recipe: Recipe) -> None:
    from train.loop import run

    run(recipe)
