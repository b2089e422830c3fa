"""Fine-tune with the compressed cache active, as a recipe says; every `key=value` overrides it.

    accelerate launch train.py recipe=quickstart
    accelerate launch train.py recipe=quickstart train.max_steps=3 output_dir=runs/try
    omnimem train recipe=quickstart

`omnimem train` is the same program without the launcher, for one device; on several, `accelerate launch -m omnimem
train recipe=NAME` needs no checkout. `omnimem recipes` lists the recipes, `dry_run=true` prints the plan of a run.

Exit status: 0 done, 2 an error with a known cause and remedy (usage, data, memory, disk), 1 a bug or interrupted;
`--debug` shows tracebacks. The launcher reports 1 for every failure and adds its own traceback (with one process,
`accelerate launch -q` omits it). To check a recipe before a long job is queued, `omnimem train recipe=NAME
dry_run=true` exits with status 2 if it is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from omnimem.guard import run_guarded
from omnimem.recipe import Recipe, list_recipes, load_recipe
from train.launcher import launched_rank, wait_for_error_message


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the recipe, train, and return the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    if "--help" in args or "-h" in args:
        print(f"{__doc__}\nRecipes: {', '.join(list_recipes())}")
        return 0
    debug = "--debug" in args
    rank = launched_rank()

    # Every rank finds the same error in a recipe, so only rank 0 prints it. A later error may concern a single rank
    # (its clip, its disk), which prints it itself.
    recipes: list[Recipe] = []
    pairs = [arg for arg in args if arg != "--debug"]
    status = run_guarded("train", lambda: recipes.append(load_recipe(pairs)), debug, quiet=rank > 0)
    if status:
        if rank:
            wait_for_error_message()
        return status
    return run_guarded(f"train (rank {rank})" if rank else "train", lambda: _run(recipes[0]), debug)


def _run(recipe: Recipe) -> None:
    from train.loop import run

    run(recipe)
