"""Held-out questions every so many steps, answered from the hard memory of inference; the best adapter stays.

    train.py recipe=… eval.path=held_out.jsonl eval.eval_steps=50 eval.early_stopping_patience=4

Measured is the cross-entropy of the reference answers in nats a token. The adapter of the best evaluation is kept in
``best/`` with its numbers, so a run that is resumed knows it; after `eval.early_stopping_patience` evaluations
without a better one
the run ends.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel

from data_prep.manifest import Row
from omnimem.budget import BudgetProfile
from omnimem.files import atomic_directory, atomic_write_json, remove_directory
from omnimem.recipe import Recipe
from train.checkpoint import save_adapter
from train.data import Samples, load_rows
from train.objective import StreamObjective

BEST = "best"
NUMBERS = "evaluation.json"


def held_out_rows(recipe: Recipe, supports_audio: bool = True) -> list[Row]:
    """Rows of ``eval.path``, checked like those of the training; none without it."""
    if recipe.eval.path is None:
        return []
    data = replace(recipe.data, path=recipe.eval.path, root=recipe.eval.root)
    return load_rows(data, supports_audio).rows


def _numbers(folder: Path) -> dict[str, Any]:
    return json.loads((folder / NUMBERS).read_text(encoding="utf-8"))


class Evaluation:
    """Evaluations of one run.

    Parameters
    ----------
    recipe : Recipe
        The run.
    folder : Path
        Its output folder.
    samples : Samples
        Held-out streams; without any, nothing is ever due.
    """

    def __init__(self, recipe: Recipe, folder: Path, samples: Samples) -> None:
        self.config, self.folder, self.samples = recipe.eval, folder / BEST, samples

    def due(self, step: int, steps: int) -> bool:
        """Whether to evaluate after `step` of so many steps."""
        return bool(self.samples) and (step % self.config.eval_steps == 0 or step == steps)

    def measure(self, objective: StreamObjective, accelerator: Accelerator) -> float:
        """Nats an answer token of the held-out questions; every process takes its share and gets the same number.

        Not a number where no question could be asked.
        """
        training = objective.model.training
        objective.model.eval()
        totals = torch.zeros(2, dtype=torch.float64)
        rounds = range(0, len(self.samples), accelerator.num_processes)
        for number in (first + accelerator.process_index for first in rounds):
            # All processes go through equally many streams; what is left over is not counted.
            outcome = objective([self.samples[number % len(self.samples)]])
            if number < len(self.samples):
                totals += torch.tensor([outcome.loss.item(), outcome.targets], dtype=torch.float64)
        objective.model.train(training)
        summed: Any = accelerator.reduce(totals.float().to(accelerator.device), "sum")
        loss, targets = summed.tolist()
        return loss / targets if targets else math.nan

    def keep_best(
        self, step: int, loss: float, model: PeftModel, profile: BudgetProfile, weights: dict[str, torch.Tensor]
    ) -> None:
        """Keep the adapter if it is among the best; only the main process calls it."""
        if not math.isfinite(loss):
            return
        kept = self._kept()
        again = [folder for folder, numbers in kept.items() if numbers["step"] == step]
        if (
            not again
            and len(kept) >= self.config.save_total_limit
            and all(one["loss"] <= loss for one in kept.values())
        ):
            return
        with atomic_directory(again[0] if again else self._other(step), overwrite=True) as folder:
            save_adapter(folder, model, profile, weights)
            atomic_write_json(folder / NUMBERS, {"step": step, "loss": loss})
        # Renamed only when complete: killed in between, the best one is found by its numbers, and named next time.
        best = next(iter(self._kept()))
        if best != self.folder:
            if self.folder.is_dir():
                self.folder.rename(self._other(_numbers(self.folder)["step"]))
            best.rename(self.folder)
        for folder in list(self._kept())[self.config.save_total_limit :]:
            remove_directory(folder)

    def _kept(self) -> dict[Path, dict[str, Any]]:
        """Folders and numbers of all that are kept, the best one first; of equals the earlier."""
        folders = [self.folder, *self.folder.parent.glob(f"{BEST}-step-*")]
        found = {folder: _numbers(folder) for folder in folders if (folder / NUMBERS).is_file()}
        return dict(sorted(found.items(), key=lambda one: (one[1]["loss"], one[1]["step"])))

    def _other(self, step: int) -> Path:
        """Where an adapter that is not the best stays."""
        return self.folder.with_name(f"{BEST}-step-{step:08d}")

    def best(self) -> dict[str, Any] | None:
        """Step and loss of the best evaluation so far."""
        return next(iter(self._kept().values()), None)

    def exhausted(self, step: int) -> str | None:
        """Why the run ends after `step`: the best evaluation is `eval.early_stopping_patience` evaluations old."""
        best = self.best()
        patience = self.config.early_stopping_patience
        if best is None or patience is None or step - best["step"] < patience * self.config.eval_steps:
            return None
        return f"none of {patience} evaluations was better than {best['loss']:.4f} after step {best['step']}"
