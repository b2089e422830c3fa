"""Experiment trackers (Weights & Biases, trackio): a run of ours is one run there, also when it is resumed."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from omnimem.files import atomic_write_json
from omnimem.recipe import Recipe, to_dict

TRACKERS_FILE = "trackers.json"
"""In the run's folder: project, name and id of the run in each tracker."""


class Trackers:
    """The trackers that a recipe names.

    Parameters
    ----------
    recipe : Recipe
        ``train.report_to``, ``train.project`` and ``train.run_name``; all of it is recorded as the run's settings.
    output_dir : Path
        Folder of the run; without ``train.run_name`` its name is that of the tracked run.
    """

    def __init__(self, recipe: Recipe, output_dir: Path) -> None:
        path = output_dir / TRACKERS_FILE
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self._modules: list[Any] = []
        for library in recipe.train.report_to:
            module, before = import_module(library), known.get(library)
            run = before or {"project": recipe.train.project, "name": recipe.train.run_name or output_dir.name}
            settings = {key: run[key] for key in ("project", "name")}
            if library == "wandb":
                settings |= {"id": run.get("id"), "resume": "allow"}
            else:  # trackio finds a run by its name
                settings |= {"resume": "allow" if before else "never"}
            started = module.init(**settings, config=to_dict(recipe))
            known[library] = {**run, "id": started.id}
            self._modules.append(module)
        if self._modules:
            atomic_write_json(path, known)

    def log(self, values: dict[str, float], step: int) -> None:
        """Give the metrics of a step to all of them."""
        for module in self._modules:
            module.log(values, step=step)

    def close(self) -> None:
        """Wait until everything is delivered."""
        for module in self._modules:
            module.finish()
