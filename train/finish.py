"""After the last step, as `finish` in the recipe says: export a merged checkpoint, answer a question."""

from __future__ import annotations

import gc
import logging
from pathlib import Path

from data_prep.manifest import Row, media_root
from omnimem.recipe import Recipe
from omnimem.stream import StreamingSession
from train.data import open_row
from train.export import export_run

log = logging.getLogger("omnimem.train")

MERGED_FOLDER = "merged"


def finish(recipe: Recipe, output_dir: Path, rows: list[Row]) -> None:
    """Export the run and answer ``finish.question`` about ``finish.media``, or about the clip of the first row.

    The caller must have released the trained model, because another one is loaded here.
    """
    if not recipe.finish.export and recipe.finish.question is None:
        return
    gc.collect()  # DeepSpeed engines are in reference cycles
    merged = output_dir / MERGED_FOLDER
    if recipe.finish.export:
        log.info("%s: %s", merged, export_run(output_dir, merged, overwrite=True))
    if question := recipe.finish.question:
        row = rows[0]
        if name := recipe.finish.media:
            row = Row(media_root(recipe.data.path, recipe.data.root) / name, (), recipe.data.audio, 0, name)
        session = StreamingSession.from_pretrained(merged if recipe.finish.export else output_dir)
        for _ in session.stream(*open_row(row, session.settings, session.backbone)):
            pass
        print(f"{Path(row.name).name}: {question}\n→ {session.ask(question, max_new_tokens=64)}")
