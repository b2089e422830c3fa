"""Evaluation on held-out questions during training, with hard selection as at inference.

    accelerate launch train.py recipe=quickstart eval.path=held_out.jsonl eval.early_stopping_patience=4

The result is the cross-entropy of the reference answers in nats per token. The adapter of the best evaluation is saved
in ``best/`` with its result, which a resumed run reads. After `eval.early_stopping_patience` evaluations without a new
best the run ends.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from data_prep.manifest import Row
from omnimem.budget import BudgetProfile
from omnimem.files import atomic_directory, atomic_write_json, remove_directory
from omnimem.recipe import Recipe
from train.checkpoint import save_adapter
from train.data import load_rows
from train.objective import StreamObjective
from train.samples import Samples

BEST = "best"
RESULT = "evaluation.json"


def held_out_rows(recipe: Recipe, supports_audio: bool = True) -> list[Row]:
    """Rows of ``eval.path``, checked like training rows; none if it is not set."""
    if recipe.eval.path is None:
        return []
    data = replace(recipe.data, path=recipe.eval.path, root=recipe.eval.root)
    return load_rows(data, supports_audio).rows


class Evaluation:
    """Evaluations of one run.

    Parameters
    ----------
    recipe : Recipe
        The run.
    folder : Path
        Its output folder.
    samples : Samples
        Held-out streams; without any, no evaluation takes place.
    """

    def __init__(self, recipe: Recipe, folder: Path, samples: Samples) -> None:
        self.config, self.samples, self._best_folder = recipe.eval, samples, folder / BEST

    def due(self, step: int, steps: int) -> bool:
        """Whether to evaluate after step `step` of `steps`."""
        return bool(self.samples) and (step % self.config.eval_steps == 0 or step == steps)

    def measure(self, objective: StreamObjective, accelerator: Accelerator) -> float:
        """Mean loss of the held-out questions in nats per answer token; the processes share the work.

        All processes get the same number; NaN if no question could be asked.
        """
        training = objective.model.training
        objective.model.eval()
        totals = torch.zeros(2, dtype=torch.float64)
        rounds = range(0, len(self.samples), accelerator.num_processes)
        for number in (first + accelerator.process_index for first in rounds):
            # All processes run the same number of streams; repeated ones are not counted.
            result = objective([self.samples[number % len(self.samples)]])
            if number < len(self.samples):
                totals += torch.tensor([result.loss.item(), result.answer_tokens], dtype=torch.float64)
        objective.model.train(training)
        summed: Any = accelerator.reduce(totals.float().to(accelerator.device), "sum")
        loss, targets = summed.tolist()
        return loss / targets if targets else math.nan

    def keep_best(
        self, step: int, loss: float, model: Any, profile: BudgetProfile, weights: dict[str, torch.Tensor]
    ) -> None:
        """Save the adapter if it is among the best; only the main process calls it."""
        if not math.isfinite(loss):
            return
        saved = self._saved()
        same_step = [folder for folder, result in saved.items() if result["step"] == step]
        if (
            not same_step
            and len(saved) >= self.config.save_total_limit
            and all(result["loss"] <= loss for result in saved.values())
        ):
            return
        with atomic_directory(same_step[0] if same_step else self._folder(step), overwrite=True) as folder:
            save_adapter(folder, model, profile, weights)
            atomic_write_json(folder / RESULT, {"step": step, "loss": loss})
        # `best/` is renamed only after the new adapter is complete. If the run is killed before that, the next call
        # finds the best adapter by its saved result.
        best = next(iter(self._saved()))
        if best != self._best_folder:
            if self._best_folder.is_dir():
                self._best_folder.rename(self._folder(_read_result(self._best_folder)["step"]))
            best.rename(self._best_folder)
        for folder in list(self._saved())[self.config.save_total_limit :]:
            remove_directory(folder)

    def _saved(self) -> dict[Path, dict[str, Any]]:
        """Folders and results of the saved adapters, best first; of equal ones the earlier first."""
        folders = [self._best_folder, *self._best_folder.parent.glob(f"{BEST}-step-*")]
        results = {folder: _read_result(folder) for folder in folders if (folder / RESULT).is_file()}
        return dict(sorted(results.items(), key=lambda item: (item[1]["loss"], item[1]["step"])))

    def _folder(self, step: int) -> Path:
        """Folder of an adapter before it becomes the best, and after a better one replaces it."""
        return self._best_folder.with_name(f"{BEST}-step-{step:08d}")

    def best(self) -> dict[str, Any] | None:
        """Step and loss of the best evaluation so far."""
        return next(iter(self._saved().values()), None)

    def early_stop_reason(self, step: int) -> str | None:
        """Reason to end the run after `step`: no new best within `eval.early_stopping_patience` evaluations."""
        best = self.best()
        patience = self.config.early_stopping_patience
        if best is None or patience is None or step - best["step"] < patience * self.config.eval_steps:
            return None
        return f"{patience} evaluations without a better loss than {best['loss']:.4f} of step {best['step']}"


def _read_result(folder: Path) -> dict[str, Any]:
    """Step and loss of a saved adapter."""
    return json.loads((folder / RESULT).read_text(encoding="utf-8"))
