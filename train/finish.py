"""What a recipe asks for after the last step: a merged checkpoint, one question answered with it."""

from __future__ import annotations

import logging
from pathlib import Path

from data_prep.manifest import media_root
from omnimem.stream import StreamingSession
from train.config import Recipe
from train.export import export_run

log = logging.getLogger("omnimem.train")

MERGED_FOLDER = "merged"


def finish(recipe: Recipe, output_dir: Path) -> None:
    """Export and ask, as ``recipe.finish`` says; the clip is looked up where the data lie."""
    merged = output_dir / MERGED_FOLDER
    if recipe.finish.export:
        log.info("%s: %s", merged, export_run(output_dir, merged, overwrite=True))
    if recipe.finish.question and recipe.finish.media:
        clip = media_root(recipe.data.path, recipe.data.root) / recipe.finish.media
        session = StreamingSession.from_pretrained(merged if recipe.finish.export else output_dir)
        for _ in session.watch(clip):
            pass
        print(f"{clip.name}: {recipe.finish.question}\n→ {session.ask(recipe.finish.question, max_new_tokens=64)}")
